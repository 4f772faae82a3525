"use strict";
// The texts: filtered by the search box, in the chosen order, and only so many at a time made into elements.
(() => {
  const AT_A_TIME = 12;
  const [section, cards, search, order, count, more] = ["texts", "cards", "search", "order", "count", "more"].map(
    (id) => document.getElementById(id),
  );
  let written = "", texts = [], orders = [], haystacks = [], shown = AT_A_TIME;

  // All that a run says becomes text here, never markup.
  const element = (tag, className, text, ...children) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text) node.textContent = text;
    node.append(...children);
    return node;
  };
  const speech = (tag, className, text) => Object.assign(element(tag, className, text), { dir: "auto" });

  const answerOf = (answer) => {
    const heading = element("h4", "", "", element("i", "dot " + answer.color), answer.name);
    heading.append(...answer.chips.map(([text, kind]) => element("span", "chip " + kind, text)));
    const signs = answer.signs.map((sign) => element("li", "", sign));
    const list = signs.length ? [element("ul", "signs", "", ...signs)] : [];
    return element("section", "", "", heading, ...list, speech("p", "answer", answer.text));
  };
  const cardOf = (text) => {
    const answers = element("div", "answers", "", ...text.answers.map(answerOf));
    const source = text.source ? [element("span", "source", text.source)] : [];
    return element("article", "panel card", "", ...source, speech("h3", "prompt", text.prompt), answers);
  };
  const haystackOf = (text) => {
    const said = text.answers.flatMap((answer) => [answer.name, answer.text, ...answer.signs]);
    return [text.prompt, text.source, ...said].join("\n").toLocaleLowerCase();
  };

  // Marks what was found without touching the text; a browser that cannot shows it unmarked.
  const mark = (words) => {
    if (!("highlights" in CSS)) return;
    const ranges = [];
    const walker = document.createTreeWalker(cards, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const text = node.data.toLocaleLowerCase();
      if (text.length !== node.data.length) continue;
      for (const word of words) {
        for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
          const range = document.createRange();
          range.setStart(node, at);
          range.setEnd(node, at + word.length);
          ranges.push(range);
        }
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };

  const show = () => {
    const words = search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const indices = orders.find((one) => one.name === order.value)?.indices ?? [];
    const found = indices.filter((i) => words.every((word) => haystacks[i].includes(word)));
    cards.replaceChildren(...found.slice(0, shown).map((i) => cardOf(texts[i])));
    mark(words);
    const left = found.length - shown;
    more.hidden = left <= 0;
    more.textContent = "Show " + Math.min(left, AT_A_TIME) + " more of " + left;
    count.textContent = words.length ? found.length + " of " + texts.length : texts.length + (texts.length === 1 ? " text" : " texts");
  };
  const again = () => { shown = AT_A_TIME; show(); };

  const read = () => {
    const now = document.getElementById("reading").textContent;
    if (now === written) return;
    ({ texts, orders } = JSON.parse(now));
    written = now;
    haystacks = texts.map(haystackOf);
    const chosen = order.value;
    order.replaceChildren(...orders.map((one) => new Option(one.label, one.name)));
    if (orders.some((one) => one.name === chosen)) order.value = chosen;
    section.hidden = texts.length === 0;
    show();
  };
  search.addEventListener("input", again);
  search.form.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("change", again);
  more.addEventListener("click", () => { shown += AT_A_TIME; show(); });
  document.addEventListener("trimtab:changed", read);
  read();
})();
