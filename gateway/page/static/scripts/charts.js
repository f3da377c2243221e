// Charts of the last five minutes: one time axis, and the values under the pointer, or under the arrow keys, in all of them.

const KEPT = 300; // samples, one a second
const HEIGHT = 48;
const SVG = "http://www.w3.org/2000/svg";

const charts = [];
let pointed = null; // how many samples ago, null where nothing is pointed at
let sampledAt = 0; // the time of the last sample, in seconds

function drawn(parent, tag, values) {
  return parent.appendChild(attributes(document.createElementNS(SVG, tag), values));
}

// A card with the values of some series: `names` are those of the feed, `labels` what tells several apart.
function addChart(parent, { title, names, labels = [], format, classes = "" }) {
  const chart = { names, labels, format, series: {}, note: make("small", "note"), values: make("p", "figure") };
  const plot = (chart.plot = make("div", "plot"));
  attributes(plot, { role: "slider", tabindex: 0, "aria-label": `${title}, last five minutes`, "aria-valuemin": 1 - KEPT, "aria-valuemax": 0 });
  const svg = drawn(plot, "svg", { viewBox: `0 0 ${KEPT} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": true });
  const line = (name, d = "") => drawn(svg, "path", { class: name, d });
  line("grid", `M0 ${HEIGHT - 0.5}H${KEPT}${[0, 1, 2, 3, 4].map((minute) => `M${minute * 60} 0V${HEIGHT}`).join("")}`);
  chart.area = line("area");
  chart.lines = names.map((_, at) => line(at ? "second" : ""));
  chart.pointer = line("pointer");
  const axis = make("div", "axis", ...["−5 min", "−4", "−3", "−2", "−1", "now"].map((text) => make("span", "", text)));
  parent.append(make("li", `card ${classes}`, make("div", "row between", make("h2", "", title), chart.note), chart.values, plot, axis));
  charts.push(chart);
  listen(plot);
}

function listen(plot) {
  const point = ({ clientX }) => {
    const { left, width } = plot.getBoundingClientRect();
    pointAt(Math.round((1 - (clientX - left) / width) * KEPT));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, () => pointAt(null));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1, PageUp: -30, PageDown: 30, Home: KEPT, End: -KEPT }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    pointAt((pointed ?? 0) + step);
  });
}

function pointAt(ago) {
  pointed = ago === null ? null : Math.min(KEPT - 1, Math.max(0, ago));
  charts.forEach(showValues);
}

function outlines(values, peak) {
  const x = (at) => KEPT - values.length + at;
  const y = (value) => (HEIGHT - 1 - (value / peak) * (HEIGHT - 4)).toFixed(1);
  let [filled, line, begun] = ["", "", null];
  values.forEach((value, at) => {
    if (value === null) {
      begun = null;
      return;
    }
    const next = values[at + 1] ?? null;
    line += `${begun === null ? "M" : "L"}${x(at)} ${y(value)}`;
    if (begun === null && next === null) line += "h1"; // one alone is a dot
    begun ??= at;
    if (next === null) {
      const top = values.slice(begun, at + 1).map((one, past) => `L${x(begun + past)} ${y(one)}`).join("");
      filled += `M${x(begun)} ${HEIGHT}${top}L${x(at)} ${HEIGHT}Z`;
    }
  });
  return { line, filled };
}

// Show a sample, or all of them where there is a history.
function showCharts({ now, history, time }) {
  sampledAt = time;
  for (const chart of charts) {
    for (const name of chart.names) {
      chart.series[name] = history ? history[name] : [...(chart.series[name] ?? []), now[name]].slice(-KEPT);
    }
    const known = chart.names.flatMap((name) => chart.series[name]).filter(isKnown);
    chart.peak = known.length ? Math.max(...known) : null;
    chart.names.forEach((name, at) => {
      const { line, filled } = outlines(chart.series[name], chart.peak || 1);
      chart.lines[at].setAttribute("d", line);
      if (!at) chart.area.setAttribute("d", filled);
    });
    chart.now = now;
    showValues(chart);
  }
}

function showValues(chart) {
  const { names, labels, format, series, peak } = chart;
  if (!chart.now) return;
  const values = names.map((name) => format(pointed === null ? chart.now[name] : series[name].at(-1 - pointed)));
  const texts = values.map((value, at) => (labels[at] ? `${labels[at]} ${value}` : value));
  if (chart.shown !== texts.join()) {
    chart.shown = texts.join();
    chart.values.replaceChildren(...values.flatMap((value, at) => (labels[at] ? [make("small", "", `${labels[at]} `), `${value} `] : [value])));
  }
  const at = new Date((sampledAt - (pointed ?? 0)) * 1000).toLocaleTimeString();
  show(chart.note, pointed !== null ? at : peak === null ? "" : `peak ${format(peak)}`);
  chart.pointer.setAttribute("d", pointed === null ? "" : `M${KEPT - 1 - pointed} 0V${HEIGHT}`);
  attributes(chart.plot, { "aria-valuenow": -(pointed ?? 0), "aria-valuetext": `${pointed === null ? "now" : at}: ${texts.join(", ")}` });
}
