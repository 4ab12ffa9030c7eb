// Draws each picture when it comes near the screen, in the colours of the page, and again when those change.
(() => {
  "use strict";
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = {
    displaylogo: false,
    displayModeBar: "hover",
    showSendToCloud: false, // the button would upload the figure
    plotlyServerURL: "",
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };

  const template = (palette) => {
    const line = { gridcolor: style("--grid"), zerolinecolor: style("--edge"), linecolor: style("--edge"), automargin: true };
    const axis = { ...line, ticks: "", tickfont: { color: style("--soft") }, title: { font: { size: 13, color: style("--soft") }, standoff: 10 } };
    const [low, zero, high] = ["--low", "--zero", "--high"].map(style);
    return {
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: style("--ink") },
        colorway: palette,
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        xaxis: axis,
        yaxis: axis,
        separators: ".,",
        dragmode: "zoom",
        hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--line"), font: { color: style("--ink") } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--edge"), activecolor: style("--accent") },
        colorscale: {
          diverging: [[0, low], [0.5, zero], [1, high]],
          sequential: [[0, zero], [1, high]],
          sequentialminus: [[0, low], [1, zero]],
        },
      },
    };
  };

  const draw = (plot) => {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const palette = style("--palette").split(/\s+/);
    for (const trace of figure.data) {
      if (trace.meta && Number.isInteger(trace.meta.hue)) {
        const colour = palette[trace.meta.hue % palette.length];
        trace.marker = { ...trace.marker, color: colour };
        trace.line = { ...trace.line, color: colour };
        if (trace.fill) trace.fillcolor = colour + ["26", "40"][trace.meta.band]; // the inner band is the darker one
      }
    }
    for (const mark of [...(figure.layout.shapes || []), ...(figure.layout.annotations || [])]) {
      if (mark.name === "fault") {
        mark.line = { ...mark.line, color: style("--alarm") };
        mark.font = { ...mark.font, color: style("--alarm") };
      }
    }
    const shades = style("--shades").split(/\s+/);
    for (const trace of figure.data) {
      if (trace.meta && trace.meta.depths) {
        const colors = trace.meta.depths.map((depth) => shades[Math.min(depth, shades.length - 1)]);
        trace.marker = { ...trace.marker, colors };
        trace.textfont = { ...trace.textfont, color: style("--ink") };
      }
    }
    figure.layout.template = template(palette);
    plot.classList.remove("waiting");
    plot.dataset.drawn = "yes";
    Plotly.react(plot, figure.data, figure.layout, config);
  };

  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          near.unobserve(entry.target);
          draw(entry.target);
        }
      }
    },
    { rootMargin: "600px 0px" },
  );
  let plots = [];
  const watch = () => {
    plots = [...document.querySelectorAll(".plot")];
    for (const plot of plots) {
      near.observe(plot);
      plot.addEventListener("figure", () => near.observe(plot)); // a live page has set other numbers
    }
  };
  watch();
  document.addEventListener("pictures", watch); // or other pictures

  const again = () => plots.filter((plot) => plot.dataset.drawn).forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details.long").forEach((long) => (long.open = true));
    plots.forEach(draw);
  });
  addEventListener("afterprint", again);
})();
