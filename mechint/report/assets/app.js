// Routes, keys, theme. #latent=5 is a latent, #at=concepts a section; with several runs #run=1 stands before.

const SHOWN = 25; // rows of the table of latents, at first
const RUNS = FACTS.runs.map((facts, index) => ({ index, facts, latents: null, state: { sort: "density", query: "", shown: SHOWN } }));
const SEVERAL = RUNS.length > 1;
for (const run of RUNS) {
  const prefix = SEVERAL ? `run=${run.index}` : "";
  run.home = `#${prefix}`;
  run.at = (name) => `#${prefix}${prefix && "&"}at=${name}`;
  run.url = (latent) => `#${prefix}${prefix && "&"}latent=${latent}`;
  run.open = (latent) => { location.hash = run.url(latent); };
}

const main = el("main", { id: "main", tabindex: "-1" });
const views = new Map(); // overviews that were made, by run index (-1: side by side)
const scrolls = new Map();
let shownView = null;

function route() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const asked = parts.has("run") ? Number(parts.get("run")) : SEVERAL ? -1 : 0;
  const run = RUNS[asked] || (SEVERAL ? null : RUNS[0]);
  const latent = run && run.latents && /^\d+$/.test(parts.get("latent") || "") ? Number(parts.get("latent")) : null;
  return { run, latent: latent !== null && latent < run.latents.d_sae ? latent : null, at: parts.get("at"), wrong: parts.has("latent") && latent === null ? parts.get("latent") : null };
}

function overview(run) {
  if (!run) return sideBySide();
  const parts = [examples(run), causal(run), concepts(run), decoderMap(run), browser(run, run.state), firing(run), quality(run), training(run), provenance(run), missing(run)].filter(Boolean);
  const contents = el("nav", { class: "contents", "aria-label": "sections" }, parts.map((part) => el("a", { href: run.at(part.id) }, part.querySelector("h2").textContent)));
  const notes = run.latents?.notes || [];
  return el("div", { class: "page" }, hero(run), notes.length > 0 && el("ul", { class: "missing" }, notes.map((text) => el("li", {}, text))), contents, parts);
}

function show() {
  const { run, latent, at } = route();
  const key = run ? run.index : -1;
  if (shownView !== null && !main.querySelector("article.latent")) scrolls.set(shownView, window.scrollY);
  document.body.classList.toggle("on-latent", latent !== null);
  for (const link of document.querySelectorAll(".runs a")) link.toggleAttribute("aria-current", Number(link.dataset.run) === key);
  field.hidden = !(run && run.latents);
  if (latent !== null) {
    main.replaceChildren(latentPage(run, latent, walk(run, latent)));
    document.title = `Latent ${latent} \u2013 ${run.facts.name}`;
    window.scrollTo(0, 0);
    main.querySelector("h1").focus({ preventScroll: true });
    shownView = key;
    return;
  }
  const back = shownView === key && Boolean(main.querySelector("article.latent"));
  if (!views.has(key)) views.set(key, overview(run));
  main.replaceChildren(views.get(key));
  document.title = FACTS.title;
  applySearch(run);
  shownView = key;
  const target = at && document.getElementById(at);
  if (target) target.scrollIntoView();
  else if (back || scrolls.has(key)) window.scrollTo(0, scrolls.get(key) || 0);
  else window.scrollTo(0, 0);
}

// The latents before and after, in the order of the list that the reader came from.
function walk(run, latent) {
  let list = run.list || [], sort = run.state.sort;
  let at = list.indexOf(latent);
  if (at < 0) { list = sortedLatents(run, sort); at = list.indexOf(latent); }
  const n = list.length;
  return {
    previous: list[(at + n - 1) % n], next: list[(at + 1) % n],
    text: `${whole(at + 1)} of ${whole(n)} by ${SORTS[sort][0]}`,
    rankOf: (name, i) => {
      const usable = usableSorts(run.latents);
      const by = usable.includes(name) && known(run.latents[name][i]) ? name : "attribution";
      return usable.includes(by) ? sortedLatents(run, by).indexOf(i) + 1 : 0;
    },
  };
}

// --- search ----------------------------------------------------------------------------------------------------------

const box = el("input", { type: "search", id: "search", placeholder: "latent, token or concept", "aria-label": "search latents by number, token or concept; press / to come here", autocomplete: "off", spellcheck: "false", enterkeyhint: "search" });
const field = el("form", { class: "search", role: "search" }, box, el("kbd", { "aria-hidden": "true" }, "/"));

function applySearch(run) {
  document.body.classList.toggle("searching", Boolean(run && run.state.query));
  if (run && box.value !== run.state.query) box.value = run.state.query;
}

box.addEventListener("input", () => {
  const { run, latent } = route();
  if (!run || !run.latents) return;
  run.state.query = box.value.trim();
  run.state.shown = SHOWN;
  if (latent !== null) location.hash = run.home;
  if (!views.has(run.index)) views.set(run.index, overview(run));
  run.redrawList();
  applySearch(run);
  if (run.state.query) window.scrollTo(0, 0);
});
field.addEventListener("submit", (event) => {
  event.preventDefault();
  const { run } = route();
  if (!run || !run.state.query) return;
  const { exact } = search(run, run.state.query);
  const first = exact !== null ? exact : run.list[0];
  if (first === undefined) return;
  if (exact !== null) clearSearch(run);
  box.blur();
  run.open(first);
});

function clearSearch(run) {
  box.value = "";
  if (!run || !run.state.query) return;
  run.state.query = "";
  if (run.redrawList) run.redrawList();
  applySearch(run);
}

// --- keys and theme --------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { run, latent } = route();
  const typing = event.target.matches?.("input, select, textarea");
  if (event.key === "Escape") {
    if (event.target === box) { clearSearch(run); box.blur(); return; }
    if (latent !== null) location.hash = run.home;
    else clearSearch(run);
    return;
  }
  if (typing) return;
  if (event.key === "/" && !field.hidden) { event.preventDefault(); box.focus(); box.select(); return; }
  if (latent === null) return;
  const step = { j: "next", ArrowRight: "next", k: "previous", ArrowLeft: "previous" }[event.key];
  if (step) { event.preventDefault(); run.open(walk(run, latent)[step]); }
});

const media = window.matchMedia("(prefers-color-scheme: dark)");
const themeButton = el("button", { type: "button", class: "theme", onclick: () => setTheme(isDark() ? "light" : "dark") });
function isDark() { return (document.documentElement.dataset.theme || (media.matches ? "dark" : "light")) === "dark"; }
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  try { if (theme) localStorage.setItem("mechint-theme", theme); } catch (error) { /* a file: page may keep nothing */ }
  themeButton.textContent = isDark() ? "light" : "dark";
  themeButton.setAttribute("aria-label", `switch to ${themeButton.textContent} colours`);
}
try { const kept = localStorage.getItem("mechint-theme"); if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept; } catch (error) { /* as above */ }
media.addEventListener?.("change", () => setTheme(null));

// --- start -----------------------------------------------------------------------------------------------------------

async function start() {
  history.scrollRestoration = "manual"; // `show` knows where the reader was
  setTheme(null);
  document.getElementById("app").append(
    el("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, "to the content"),
    el("div", { class: "top" }, el("a", { class: "brand", href: "#" }, "mechint"),
      SEVERAL && el("nav", { class: "runs", "aria-label": "runs" }, el("a", { href: "#", "data-run": "-1" }, "side by side"), RUNS.map((run) => el("a", { href: run.home, "data-run": String(run.index) }, run.facts.name))),
      el("span", { class: "spacer" }), field, themeButton),
    main,
    el("footer", {}, el("p", {}, `Made by mechint ${FACTS.made.version} (${FACTS.made.commit}) on ${FACTS.made.date}. One file, no network.`),
      el("p", { class: "keys" }, el("kbd", {}, "/"), " search ", el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next and previous latent ", el("kbd", {}, "Esc"), " back")));
  main.append(el("p", { class: "loading" }, "Reading the latents\u2026"));
  const found = await Promise.all(RUNS.map((run) => readLatents(run.index)));
  found.forEach((latents, i) => {
    RUNS[i].latents = latents;
    if (latents) RUNS[i].state.sort = usableSorts(latents)[0];
  });
  window.addEventListener("hashchange", show);
  show();
  document.documentElement.dataset.ready = "yes";
}
start().catch((error) => { main.replaceChildren(el("p", { class: "caution" }, `This page could not be drawn: ${error.message}`)); throw error; });
