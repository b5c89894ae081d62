// Making elements and writing numbers. Whatever comes from data enters the page as text nodes or attribute values.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const known = (value) => typeof value === "number" && Number.isFinite(value);
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : "\u2013");
const superscript = (n) => String(n).replace(/./g, (c) => "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[+c] ?? "\u207b");

// Three significant digits: 0.0123, 1.23, 123; very small and large ones as 1.2 x 10^-7.
function short(value, digits = 3) {
  if (!known(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) {
    const [mantissa, power] = value.toExponential(1).split("e");
    return `${minus(mantissa)}\u00d710${superscript(+power)}`;
  }
  return minus(size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(digits)));
}
const minus = (text) => text.replace("-", "\u2212");

function percent(value, digits = 2) {
  if (!known(value)) return "\u2013";
  const number = 100 * value;
  if (number === 0) return "0 %";
  if (Math.abs(number) < 0.001) return `${short(number, digits)} %`;
  return `${minus(String(Math.abs(number) >= 9.95 ? Math.round(number) : +number.toPrecision(digits)))} %`;
}

// A token as it can be read: line breaks and tabs as signs, a lone blank as an open box; invisible and
// direction-changing characters by their number, so that no text can reorder what stands around it.
function visible(token) {
  const text = token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5")
    .replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      (c) => `\u2039U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`);
  return text.trim() === "" ? text.replace(/ /g, "\u2423") : text;
}
const tokenNode = (token, cls = "") => el("code", { class: `token ${cls}`, dir: "ltr" }, visible(token.replace(/^ /, "")) || "\u2423");

function table(columns, rows, { cls = "", caption = null } = {}) {
  return el("div", { class: "scroll" }, el("table", { class: cls },
    caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col", class: c.num ? "num" : "", title: c.title }, c.name)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) =>
      el(i === 0 ? "th" : "td", { scope: i === 0 ? "row" : null, class: columns[i].num ? "num" : "" }, cell)))))));
}

function section(id, title, lead, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title), lead && el("p", { class: "lead" }, lead), children);
}

const command = (text) => el("code", { class: "command" }, text);
