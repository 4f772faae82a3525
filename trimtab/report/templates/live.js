"use strict";
// The page of `trimtab watch`: asks the server that it came from for a newer page, and changes what differs in place,
// so that scroll position, zoom, search and open details stay as the reader left them.
(() => {
  const POLL = 2000;
  const badge = document.getElementById("live");
  const parts = ["header nav", "main"];
  // What the server wrote last; the document itself also holds what scripts have drawn into it.
  let written = parts.map((part) => document.querySelector(part).cloneNode(true));

  const tell = (state) => {
    badge.dataset.state = state;
    const changed = badge.dataset.changed ? new Date(Number(badge.dataset.changed)) : null;
    const today = changed && changed.toDateString() === new Date().toDateString();
    const time = !changed ? "" : " · changed " + (today ? changed.toLocaleTimeString() : changed.toLocaleString());
    badge.lastElementChild.textContent = (state === "gone" ? "no answer from trimtab watch" : state) + time;
  };

  // Only what the server changed: a script may have set attributes of its own.
  const attributes = (node, was, now) => {
    for (const { name } of [...was.attributes]) if (!now.hasAttribute(name)) node.removeAttribute(name);
    for (const { name, value } of [...now.attributes]) if (was.getAttribute(name) !== value) node.setAttribute(name, value);
  };
  const alike = (was, now) =>
    was.nodeType === now.nodeType && was.nodeName === now.nodeName && was.id === now.id &&
    was.className === now.className && was.childNodes.length === now.childNodes.length;
  const replace = (node, now) => {
    if (node.nodeType === Node.ELEMENT_NODE) for (const plot of node.querySelectorAll(".plot")) Plotly.purge(plot);
    node.replaceWith(document.importNode(now, true));
  };
  const children = (node, was, now) => {
    const [own, before, after] = [node, was, now].map((one) => [...one.childNodes]);
    after.forEach((child, i) => change(own[i], before[i], child));
  };
  // Sections come and go; those with the same id or class are the same.
  const sections = (node, was, now) => {
    const keyed = (parent) => {
      const seen = {};
      return new Map([...parent.children].map((child) => {
        const key = child.id || child.className || child.tagName;
        seen[key] = (seen[key] ?? 0) + 1;
        return [key + " " + seen[key], child];
      }));
    };
    const [own, before, after] = [node, was, now].map(keyed);
    for (const [key, child] of own) {
      if (after.has(key)) continue;
      for (const plot of child.querySelectorAll(".plot")) Plotly.purge(plot);
      child.remove();
    }
    let next = null;
    for (const [key, child] of [...after].reverse()) {
      const old = own.get(key);
      if (old) change(old, before.get(key), child);
      else node.insertBefore(document.importNode(child, true), next);
      next = next ? next.previousElementSibling : node.lastElementChild;
    }
  };
  const change = (node, was, now) => {
    if (was.id === "texts" || was.isEqualNode(now)) return; // the texts are drawn from their own JSON
    if (was.nodeName === "MAIN") sections(node, was, now);
    else if (!alike(was, now)) replace(node, now);
    else if (now.nodeType === Node.TEXT_NODE) node.data = now.data;
    else if (now.nodeType === Node.ELEMENT_NODE) {
      attributes(node, was, now);
      if (!node.classList.contains("plot")) children(node, was, now); // a plot is drawn from its own JSON
    }
  };

  // Whatever grows above it, what the reader looks at stays where it is.
  const inPlace = (act) => {
    const seen = scrollY > 0 && [...document.querySelectorAll("main > *, .card, figure")].find(
      (node) => node.getBoundingClientRect().bottom > 60 && node.getBoundingClientRect().top > -200,
    );
    const top = seen && seen.getBoundingClientRect().top;
    const settle = () => {
      if (seen && seen.isConnected) scrollBy({ top: seen.getBoundingClientRect().top - top, behavior: "instant" });
    };
    act();
    settle();
    requestAnimationFrame(() => requestAnimationFrame(settle)); // plots take their last few pixels as they are painted
  };

  const update = (text) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    const fresh = parts.map((part) => page.querySelector(part));
    inPlace(() => {
      parts.forEach((part, i) => {
        const node = document.querySelector(part);
        change(node, written[i], fresh[i]);
      });
      for (const id of ["figures", "reading"]) {
        document.getElementById(id).textContent = page.getElementById(id).textContent;
      }
      document.title = page.title;
      attributes(badge, badge, page.getElementById("live"));
      document.dispatchEvent(new Event("trimtab:changed"));
    });
    written = fresh;
  };

  let state = badge.dataset.state;
  const poll = async () => {
    try {
      const answer = await fetch("?since=" + badge.dataset.version, { cache: "no-store" });
      if (answer.status === 200) {
        update(await answer.text());
        state = badge.dataset.state;
      }
      tell(answer.ok ? state : "gone");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // which is how fetch says that nobody answers
      tell("gone");
    }
  };
  const go = async () => {
    if (!document.hidden) await poll();
    setTimeout(go, POLL);
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  tell(state);
  setTimeout(go, POLL);
})();
