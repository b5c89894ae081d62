// Plots as inline SVG, drawn at the width that they have; colours are classes, so that the theme needs no redrawing.

const TEXT_WIDTH = 6.4; // of a digit at the size of the axes, pixels

function niceTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999) || power;
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) ticks.push(+value.toPrecision(12));
  return ticks;
}

function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.ceil(Math.log10(high) - 1e-9);
  const decades = last - first;
  const inside = (value) => value >= low * 0.999 && value <= high * 1.001;
  const multiples = decades <= 1 ? [1, 2, 3, 5] : decades <= 2 ? [1, 2, 5] : [1];
  const stride = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = first; power <= last; power++)
    if ((power - first) % stride === 0 || decades <= 2) for (const m of multiples) ticks.push(m * 10 ** power);
  return ticks.filter(inside);
}

function scale(axis, from, to) {
  let [low, high] = axis.domain;
  const log = axis.log;
  if (log) { low = Math.log10(low); high = Math.log10(high); }
  if (high - low < 1e-12) { low -= 0.5; high += 0.5; }
  const map = (value) => from + (((log ? Math.log10(value) : value) - low) / (high - low)) * (to - from);
  map.back = (pixel) => { const v = low + ((pixel - from) / (to - from)) * (high - low); return log ? 10 ** v : v; };
  return map;
}

function axisText(value, axis) {
  if (axis.format) return axis.format(value);
  if (axis.log && (value >= 1e5 || value < 1e-3)) {
    const power = Math.round(Math.log10(value));
    return Math.abs(Math.log10(value) - power) < 1e-9 ? `10${superscript(power)}` : short(value, 2);
  }
  return value >= 10000 ? `${short(value / 1000)}k` : short(value);
}

// spec: {title, note, x, y, height, marks, legend, alt}; an axis is {label, domain, log, format}.
// A mark is {kind: line|points|bars|rule, ...}. Returns a <figure> that redraws itself when its width changes.
function plot(spec) {
  const holder = el("div", { class: "plot" });
  const figure = el("figure", { class: `chart ${spec.cls || ""}` },
    el("figcaption", {}, el("strong", {}, spec.title), spec.note && el("span", {}, spec.note)),
    spec.legend && el("ul", { class: "legend" }, spec.legend.map(({ cls, text, dashed }) =>
      el("li", {}, el("i", { class: `key ${cls}${dashed ? " dashed" : ""}` }), text))),
    holder);
  let drawn = 0;
  const draw = (width) => {
    width = Math.round(width);
    if (!width || width === drawn) return;
    drawn = width;
    holder.replaceChildren(drawPlot(spec, width));
  };
  if (typeof ResizeObserver === "function") new ResizeObserver(([entry]) => draw(entry.contentRect.width)).observe(holder);
  else requestAnimationFrame(() => draw(holder.clientWidth || 320));
  return figure;
}

function drawPlot(spec, width) {
  const height = spec.height || 220;
  const { x, y } = spec;
  const ticksOf = (axis, count, logCount) => {
    const found = axis.log ? logTicks(...axis.domain, logCount) : [];
    return found.length > 1 ? found : niceTicks(...axis.domain, count);
  };
  const yTicks = ticksOf(y, 4, 6);
  const labels = yTicks.map((value) => axisText(value, y));
  const left = y.hidden ? 6 : Math.min(120, 16 + TEXT_WIDTH * Math.max(2, ...labels.map((text) => text.length)));
  const right = width - 10, top = y.label ? 24 : 10, bottom = height - (x.label ? 40 : 24);
  const xTicks = ticksOf(x, Math.max(2, Math.floor(width / 110)), Math.max(2, Math.floor(width / 90)));
  const X = scale(x, left, right), Y = scale(y, bottom, top);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.alt || spec.title });
  if (!y.hidden) for (const [i, value] of yTicks.entries()) root.append(
    svg("line", { class: "grid", x1: left, x2: right, y1: Y(value), y2: Y(value) }),
    svg("text", { class: "tick", x: left - 7, y: Y(value) + 3.5, "text-anchor": "end" }, labels[i]));
  if (!x.hidden) for (const value of xTicks) {
    const at = X(value), text = axisText(value, x), half = (text.length * TEXT_WIDTH) / 2;
    root.append(svg("line", { class: "tickmark", x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
      svg("text", { class: "tick", x: Math.min(at, width - half - 1), y: bottom + 16, "text-anchor": "middle" }, text));
  }
  if (!x.hidden) root.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  if (y.label) root.append(svg("text", { class: "label", x: 2, y: 11 }, y.label));
  if (x.label) root.append(svg("text", { class: "label", x: right, y: height - 5, "text-anchor": "end" }, x.label));
  for (const mark of spec.marks) root.append(MARKS[mark.kind](mark, X, Y, { left, right, top, bottom, x, y }));
  return root;
}

const drawable = (axis, value) => known(value) && (!axis.log || value > 0);

const MARKS = {
  line(mark, X, Y, { x, y }) {
    let path = "", pen = "M";
    const dots = [];
    mark.x.forEach((value, i) => {
      if (!drawable(x, value) || !drawable(y, mark.y[i])) { pen = "M"; return; }
      const px = X(value).toFixed(1), py = Y(mark.y[i]).toFixed(1);
      path += `${pen}${px} ${py}`; pen = "L";
      if (mark.x.length <= 40) dots.push(svg("circle", { class: `dot ${mark.cls}`, cx: px, cy: py, r: 2.2 },
        svg("title", {}, `${mark.name ? mark.name + ", " : ""}${short(value)}: ${short(mark.y[i])}`)));
    });
    return svg("g", {}, svg("path", { class: `line ${mark.cls}${mark.dashed ? " dashed" : ""}`, d: path }), dots);
  },
  bars(mark, X, Y, { bottom }) { // edges has one more entry than counts
    return svg("g", {}, Array.from(mark.counts, (count, i) => {
      if (!count) return null;
      const from = X(mark.edges[i]), to = X(mark.edges[i + 1]), at = Math.min(Y(Math.max(count, mark.floor || 0)), bottom - 1);
      return svg("rect", { class: `bar ${mark.cls}`, x: from + 0.5, y: at, width: Math.max(to - from - 1, 0.8), height: bottom - at },
        svg("title", {}, mark.tell(i)));
    }));
  },
  points(mark, X, Y, { x, y }) { // items: {x, y, cls, title, open}
    const group = svg("g", { class: mark.open ? "clickable" : "" });
    let lastX = -1e9, lastY = -1e9, lastSize = 0; // of the label before: labels that would touch it are left out
    for (const item of mark.items) {
      if (!drawable(x, item.x) || !drawable(y, item.y)) continue;
      const point = svg("circle", { class: `point ${item.cls}`, cx: X(item.x).toFixed(1), cy: Y(item.y).toFixed(1), r: item.r || mark.r || 3 });
      if (item.title) point.append(svg("title", {}, item.title));
      if (mark.open) point.dataset.latent = item.latent;
      group.append(point);
      if (!item.label || (Math.abs(X(item.x) - lastX) < 14 + lastSize && Math.abs(Y(item.y) - lastY) < 14)) continue;
      [lastX, lastY, lastSize] = [X(item.x), Y(item.y), TEXT_WIDTH * item.label.length];
      group.append(svg("text", { class: "pointlabel", x: lastX + 7, y: lastY + 4 }, item.label));
    }
    if (mark.open) group.addEventListener("click", (event) => {
      const latent = event.target.closest("[data-latent]")?.dataset.latent;
      if (latent !== undefined) mark.open(+latent);
    });
    return group;
  },
  rule(mark, X, Y, { top, bottom, left, right }) {
    const vertical = mark.x !== undefined, at = vertical ? X(mark.x) : Y(mark.y);
    const line = vertical ? { x1: at, x2: at, y1: top, y2: bottom } : { x1: left, x2: right, y1: at, y2: at };
    const near = vertical && at + 8 + TEXT_WIDTH * (mark.text || "").length > right; // no room on the right
    return svg("g", {}, svg("line", { class: `rule ${mark.cls || ""}`, ...line }), mark.text && svg("text",
      { class: "rulelabel", x: vertical ? at + (near ? -5 : 5) : right, y: vertical ? top + 9 : at - 5, "text-anchor": near || !vertical ? "end" : "start" }, mark.text));
  },
  diagonal(mark, X, Y, { x, y }) {
    const low = Math.max(x.domain[0], y.domain[0]), high = Math.min(x.domain[1], y.domain[1]);
    return low < high ? svg("line", { class: "rule", x1: X(low), y1: Y(low), x2: X(high), y2: Y(high) }) : svg("g", {});
  },
};

// The lowest and highest of what can be drawn, with some air; for a log axis of the values above 0.
function domainOf(values, { log = false, zero = false, air = 0.06 } = {}) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (known(value) && (!log || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) { const pad = (high / low) ** air; return [low / Math.max(pad, 1.08), high * Math.max(pad, 1.08)]; }
  if (zero) low = Math.min(low, 0);
  const pad = (high - low || Math.abs(high) || 1) * air;
  return [zero && low === 0 ? 0 : low - pad, high + pad];
}

function histogram(values, edges) {
  const counts = new Array(edges.length - 1).fill(0);
  for (const value of values) {
    if (!known(value) || value < edges[0]) continue;
    let bin = edges.findIndex((edge) => value < edge) - 1;
    if (bin === -2) bin = edges.length - 2;
    if (bin >= 0) counts[bin]++;
  }
  return counts;
}
