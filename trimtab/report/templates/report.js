"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const system = matchMedia("(prefers-color-scheme: dark)");
  const SHOWN_AT_FIRST = 12;
  let chosen = null;

  const style = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  // Colours in the figures are names like "c1"; everything else passes as it is.
  const painted = (value) => {
    if (typeof value === "string") return /^c[0-6]$/.test(value) ? style(value) : value;
    if (Array.isArray(value)) return value.map(painted);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part)]));
  };
  const inked = (bars) => ({ ...bars, color: style("ink") });
  const paintedTrace = (trace) => {
    const own = ["line", "marker"].filter((key) => key in trace).map((key) => [key, painted(trace[key])]);
    const bars = ["error_x", "error_y"].filter((key) => key in trace && trace.type === "bar");
    return { ...trace, ...Object.fromEntries(own), ...Object.fromEntries(bars.map((key) => [key, inked(trace[key])])) };
  };

  const axis = (given) => ({
    gridcolor: style("line"), zerolinecolor: style("line"), linecolor: style("line"), automargin: true,
    ...given, title: { text: given?.title ?? "", font: { size: 12 }, standoff: 8 },
  });

  const layout = ({ layout: { xaxis, yaxis, ...others } }) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    margin: { l: 48, r: 14, t: 26, b: 40 }, hovermode: "closest", bargap: 0.45,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style("muted") },
    hoverlabel: { bgcolor: style("panel"), bordercolor: style("line"), font: { color: style("ink") } },
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" },
    xaxis: axis(xaxis), yaxis: axis(yaxis), ...painted(others),
  });

  const draw = () => {
    for (const plot of plots) {
      const figure = figures[Number(plot.dataset.figure)];
      const settings = { responsive: true, displaylogo: false, displayModeBar: false };
      Plotly.react(plot, figure.traces.map(paintedTrace), layout(figure), settings);
    }
  };

  const show = () => {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    draw();
  };
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();

  const cards = document.getElementById("cards");
  if (!cards) return;
  const [search, order, count, more] = ["search", "order", "count", "more"].map((id) => document.getElementById(id));
  let all = false;

  const filter = () => {
    const words = search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const found = [...cards.children].filter((card) => {
      const text = card.textContent.toLocaleLowerCase();
      card.hidden = !words.every((word) => text.includes(word));
      return !card.hidden;
    });
    const surplus = all ? [] : found.slice(SHOWN_AT_FIRST);
    for (const card of surplus) card.hidden = true;
    more.hidden = surplus.length === 0;
    more.textContent = "Show all " + found.length;
    count.textContent = found.length + " of " + cards.children.length;
  };
  const sort = () => {
    const worst = order.value === "worst";
    const rank = (card) => (worst ? Number(card.dataset.worst) : -Number(card.dataset.changed));
    cards.append(...[...cards.children].sort((a, b) => rank(a) - rank(b)));
    filter();
  };
  search.addEventListener("input", filter);
  search.form.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("change", sort);
  more.addEventListener("click", () => { all = true; filter(); });
  filter();
})();
