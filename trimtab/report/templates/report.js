"use strict";
(() => {
  const root = document.documentElement;
  let figures, plots;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;

  const read = () => {
    figures = JSON.parse(document.getElementById("figures").textContent);
    plots = [...document.querySelectorAll(".plot")];
  };

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
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, uirevision: "kept",
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
  document.addEventListener("trimtab:changed", () => { read(); draw(); });
  read();
  show();
})();
