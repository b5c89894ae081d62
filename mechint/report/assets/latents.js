// Latents: their labels, contexts and pages, the search, the table and the map. A run's arrays are `run.latents` (L).

const NONE = 0xffffffff;
const word = (L, id) => L.vocab[id] ?? "\ufffd";

function labelTokens(run, latent, most = 3) {
  const L = run.latents, width = L.label_width;
  if (!L.fires[latent]) return el("span", { class: "faint" }, "never fires");
  const ids = Array.from(L.label.subarray(latent * width, latent * width + Math.min(most, width))).filter((id) => id !== NONE);
  if (!ids.length) return el("span", { class: "faint" }, "");
  return el("span", { class: "tokens" }, ids.map((id) => tokenNode(word(L, id))));
}

const WEAK = 0.2; // an F1 below this says that a latent matches no known concept

function conceptText(run, latent) {
  const L = run.latents, index = L.concept[latent];
  if (index < 0) return "";
  return el("span", { class: L.concept_f1[latent] < WEAK ? "faint" : "" }, visible(L.concepts[index]), el("span", { class: "faint" }, ` ${L.concept_f1[latent].toFixed(2)}`));
}

// --- contexts --------------------------------------------------------------------------------------------------------

function contextsOf(run, latent) {
  const L = run.latents, found = [];
  for (let c = L.ctx_first[latent]; c < L.ctx_first[latent + 1]; c++) found.push(c);
  return found;
}
const topContexts = (run, latent) => contextsOf(run, latent).filter((c) => run.latents.ctx_stratum[c] === 0);

// One context: its tokens, each on a ground as strong as the latent is there. `narrow` keeps that many tokens on each side.
function contextLine(run, latent, c, { narrow = 0 } = {}) {
  const L = run.latents, center = L.ctx_center[c], length = L.ctx_len[c];
  const from = narrow ? Math.max(0, center - narrow) : 0, to = narrow ? Math.min(length, center + narrow + 1) : length;
  const tokens = [];
  for (let i = from; i < to; i++) {
    const text = word(L, L.stream[L.ctx_start[c] + i]), level = L.ctx_levels[L.ctx_level_at[c] + i] / 255;
    const value = level * L.max[latent];
    const shown = visible(text) || (level > 0 ? "\u00b7" : ""), spaced = shown.startsWith(" "); // a leading blank stays outside of the coloured ground
    const node = el("span", { class: `${level > 0 ? "on" : ""}${level > 0.75 ? " strong" : ""}${i === center ? " here" : ""}`, title: level > 0 ? `${shown}: ${short(value)}` : null }, spaced ? shown.slice(1) : shown);
    if (level > 0) node.style.setProperty("--a", (0.12 + 0.73 * level).toFixed(2));
    if (spaced && i > from) tokens.push(" ");
    tokens.push(node);
  }
  const cutLeft = from > 0 || Boolean(L.ctx_cut[c] & 1), cutRight = to < length || Boolean(L.ctx_cut[c] & 2);
  return el("span", { class: "context", dir: "ltr" }, cutLeft && el("span", { class: "cut" }, "\u2026"), tokens, cutRight && el("span", { class: "cut" }, "\u2026"));
}

// The strongest contexts, one for each firing token first: for a card that has room for few.
function variedContexts(run, latent, most) {
  const L = run.latents, top = topContexts(run, latent), seen = new Set();
  const fresh = top.filter((c) => { const id = L.stream[L.ctx_start[c] + L.ctx_center[c]]; return seen.has(id) ? false : seen.add(id); });
  return [...new Set([...fresh, ...top])].slice(0, most);
}

function contextList(run, latent, list) {
  const L = run.latents;
  return el("ol", { class: "contexts" }, list.map((c) => el("li", {},
    el("span", { class: "act", title: `token ${L.ctx_position[c]} of text ${L.ctx_text[c]}` }, short(L.ctx_value[c])), contextLine(run, latent, c))));
}

// --- a latent's page -------------------------------------------------------------------------------------------------

function latentPage(run, latent, walk) {
  const L = run.latents, { facts } = run;
  const density = L.fires[latent] / L.n_rows;
  const nav = el("nav", { class: "latentnav", "aria-label": "latents" },
    el("a", { href: run.home, class: "quiet" }, "\u2190 overview"),
    el("span", { class: "spacer" }),
    el("a", { class: "quiet", rel: "prev", href: run.url(walk.previous), title: "k or left arrow" }, "previous"),
    el("span", { class: "faint nowrap" }, walk.text),
    el("a", { class: "quiet", rel: "next", href: run.url(walk.next), title: "j or right arrow" }, "next"));
  const rank = walk.rankOf("effect", latent);
  const stats = [
    ["fires on", L.fires[latent] ? percent(density) : "nothing", `${whole(L.fires[latent])} of ${whole(L.n_rows)} tokens`],
    ["strongest", short(L.max[latent]), `mean where active ${short(L.mean[latent])}`],
    known(L.effect[latent]) ? ["effect", `${short(L.effect[latent])} nats`, `mean KL when removed${rank ? `; rank ${whole(rank)}` : ""}`]
      : known(L.attribution[latent]) ? ["estimated effect", short(L.attribution[latent]), `rank ${whole(rank)}; not removed itself`] : null,
    L.concept[latent] >= 0 ? ["concept", L.concept_f1[latent] < WEAK ? "none of those known" : visible(L.concepts[L.concept[latent]]), `${L.concept_f1[latent] < WEAK ? `best: ${visible(L.concepts[L.concept[latent]])}, ` : ""}F1 ${L.concept_f1[latent].toFixed(2)}`] : null,
    L.has_tokens && L.fires[latent] ? ["consistency", percent(L.consistency[latent] / 255), "of its strongest contexts fire on the same token"] : null,
  ].filter(Boolean);
  const contexts = contextsOf(run, latent), top = contexts.filter((c) => L.ctx_stratum[c] === 0);
  const strata = L.strata.map((name, i) => [name, contexts.filter((c) => L.ctx_stratum[c] === i + 1)]).filter(([, list]) => list.length);
  const page = el("article", { class: "latent", "aria-labelledby": "latent-title" }, nav,
    el("h1", { id: "latent-title", tabindex: "-1" }, `Latent ${latent}`, el("small", {}, labelTokens(run, latent, 4))),
    FACTS.runs.length > 1 && el("p", { class: "note" }, `of ${facts.name}`),
    el("dl", { class: "stats" }, stats.map(([label, value, more]) => el("div", {}, el("dt", {}, label), el("dd", {}, value, el("span", {}, more))))),
    el("div", { class: "columns" },
      el("div", { class: "maincol" },
        el("h2", {}, "Where it fires most strongly"),
        top.length ? contextList(run, latent, top) : el("p", { class: "note" }, L.fires[latent] ? (L.contexts_note || "Its contexts are not in this file.") : `It fires on none of ${whole(L.n_rows)} tokens: a dead latent.`),
        strata.length > 0 && [el("h2", {}, "Across its range"), el("p", { class: "note" }, L.strata_note)],
        strata.map(([name, list]) => [el("h3", {}, name), contextList(run, latent, list)])),
      el("div", { class: "sidecol" }, activationHistogram(run, latent), logitEffects(run, latent),
        relatives(run, latent, "neighbours", "neighbour_cos", "Nearest decoder directions", "cosine of the decoder rows"),
        relatives(run, latent, "partners", "partner_score", "Fires together with", L.partner_name || "correlation of firing"),
        twins(run, latent))));
  return page;
}

function activationHistogram(run, latent) {
  const L = run.latents, bins = L.hist_bins;
  if (!bins || !L.fires[latent]) return null;
  const counts = L.hist.subarray(latent * bins, (latent + 1) * bins);
  const edges = L.hist_edges;
  let first = 0, last = bins - 1;
  while (first < last && !counts[first]) first++;
  while (last > first && !counts[last]) last--;
  return plot({
    title: "How strongly it fires", height: 170, cls: "small", alt: `Histogram of the activations of latent ${latent} where it fires, up to ${short(L.max[latent])}`,
    x: { label: "activation, where above 0 (log)", log: true, domain: [edges[first], edges[last + 1]] },
    y: { label: "tokens (log)", log: true, domain: [0.7, Math.max(2, ...counts) * 1.3] },
    marks: [{ kind: "bars", counts, edges, cls: "c4", tell: (i) => `${whole(counts[i])} tokens from ${short(edges[i])} to ${short(edges[i + 1])}` }],
  });
}

function logitEffects(run, latent) {
  const L = run.latents, width = L.logit_width;
  if (!width) return null;
  const column = (ids, values, title) => el("div", {}, el("h4", {}, title), el("ol", { class: "logits" },
    Array.from({ length: width }, (_, i) => latent * width + i).filter((at) => L[ids][at] !== NONE).map((at) => el("li", {}, tokenNode(word(L, L[ids][at])), el("span", { class: "num faint" }, short(L[values][at], 2))))));
  return el("section", { class: "box" }, el("h3", {}, "Output tokens it pushes"),
    el("p", { class: "note" }, "Direct effect of its decoder direction on the logits, past all later layers."),
    el("div", { class: "two" }, column("promoted", "promoted_value", "up"), column("suppressed", "suppressed_value", "down")));
}

function relatives(run, latent, ids, values, title, what) {
  const L = run.latents, width = L[`${ids}_width`];
  if (!width) return null;
  const rows = Array.from({ length: width }, (_, i) => latent * width + i).filter((at) => L[ids][at] !== NONE && L[values][at] > 0);
  if (!rows.length) return null;
  return el("section", { class: "box" }, el("h3", {}, title), el("p", { class: "note" }, what),
    el("ol", { class: "relatives" }, rows.map((at) => el("li", {}, el("a", { href: run.url(L[ids][at]) }, String(L[ids][at])), labelTokens(run, L[ids][at], 2),
      el("span", { class: "num faint" }, (L[values][at] / 10000).toFixed(2))))));
}

function twins(run, latent) {
  const L = run.latents;
  const rows = (L.twins || []).map((twin) => ({ other: RUNS[twin.run], at: L[`twin_${twin.run}`][latent], cosine: L[`twin_cos_${twin.run}`][latent] / 10000, mutual: L[`twin_mutual_${twin.run}`][latent] === 1 }));
  if (!rows.length) return null;
  return el("section", { class: "box" }, el("h3", {}, "In the other runs"), el("p", { class: "note" }, "closest decoder direction there"),
    el("ol", { class: "relatives" }, rows.map(({ other, at, cosine, mutual }) => el("li", {}, el("a", { href: other.url(at) }, `${other.facts.name}: ${at}`), other.latents && labelTokens(other, at, 2),
      el("span", { class: "num faint" }, `${cosine.toFixed(2)}${mutual ? ", mutual" : ""}`)))));
}

// --- search, sort, table ---------------------------------------------------------------------------------------------

const SORTS = {
  effect: ["effect", (L, i) => (known(L.effect[i]) ? L.effect[i] : -Infinity)],
  attribution: ["estimated effect", (L, i) => (known(L.attribution[i]) ? Math.abs(L.attribution[i]) : -Infinity)],
  density: ["density", (L, i) => L.fires[i]],
  max: ["max activation", (L, i) => L.max[i]],
  concept: ["concept match", (L, i) => (L.concept[i] >= 0 ? L.concept_f1[i] : -Infinity)],
  consistency: ["consistency", (L, i) => L.consistency[i]],
  number: ["number", (L, i) => -i],
};
const usableSorts = (L) => Object.keys(SORTS).filter((name) => {
  if (name === "consistency") return L.has_tokens;
  if (name === "effect" || name === "attribution") return L[name].some(known);
  return name !== "concept" || L.concept.some((c) => c >= 0);
});

function sortedLatents(run, name) {
  const cache = (run.orders ||= {});
  return (cache[name] ||= Array.from({ length: run.latents.d_sae }, (_, i) => i).sort((a, b) => SORTS[name][1](run.latents, b) - SORTS[name][1](run.latents, a) || a - b));
}

// For each latent what it can be found by: the tokens it fires on, those it promotes, its concept.
function searchIndex(run) {
  if (run.searchable) return run.searchable;
  const L = run.latents, plain = L.vocab.map((token) => token.trim().toLowerCase());
  run.searchable = Array.from({ length: L.d_sae }, (_, i) => {
    const fires = new Set(contextsOf(run, i).map((c) => plain[L.stream[L.ctx_start[c] + L.ctx_center[c]]]));
    for (const id of L.label.subarray(i * L.label_width, (i + 1) * L.label_width)) if (id !== NONE) fires.add(plain[id]);
    const pushes = new Set();
    for (let k = 0; k < L.logit_width; k++) if (L.promoted[i * L.logit_width + k] !== NONE) pushes.add(plain[L.promoted[i * L.logit_width + k]]);
    return { fires, pushes, concept: L.concept[i] >= 0 ? L.concepts[L.concept[i]].toLowerCase() : "" };
  });
  return run.searchable;
}

// -> {latents: Map latent -> why, exact: a latent asked for by its number}
function search(run, query) {
  const text = query.trim().toLowerCase(), found = new Map();
  const number = /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null;
  const exact = number !== null && number < run.latents.d_sae ? number : null;
  if (exact !== null) found.set(exact, "its number");
  const concept = text.replaceAll(" ", "_");
  searchIndex(run).forEach((entry, i) => {
    if (found.has(i)) return;
    if (entry.concept && (entry.concept === text || entry.concept === concept || (text.length > 2 && entry.concept.includes(concept)))) found.set(i, `concept ${visible(entry.concept)}`);
    else if (entry.fires.has(text)) found.set(i, "fires on it");
    else if (text.length > 2 && [...entry.fires].some((token) => token.startsWith(text))) found.set(i, "fires on a longer token");
    else if (entry.pushes.has(text)) found.set(i, "promotes it");
  });
  return { latents: found, exact };
}

function browser(run, state) {
  const L = run.latents;
  if (!L) return null;
  const sorts = usableSorts(L);
  const status = el("p", { class: "note", role: "status", "aria-live": "polite" });
  const holder = el("div", {});
  const has = { effect: sorts.includes("effect"), attribution: sorts.includes("attribution"), concept: sorts.includes("concept") };
  const columns = [["number", "latent", true], [null, "fires on"], ["density", "density", true], ["max", "max", true],
    has.effect ? ["effect", "effect", true] : null, has.attribution ? ["attribution", "estimate", true] : null, has.concept ? ["concept", "concept"] : null, L.has_tokens ? ["consistency", "consistency", true] : null].filter(Boolean);
  const row = (i, why) => el("tr", {}, el("th", { scope: "row", class: "num" }, el("a", { href: run.url(i) }, String(i))),
    el("td", {}, labelTokens(run, i, 4), why && el("span", { class: "faint small" }, ` ${why}`)),
    el("td", { class: "num" }, percent(L.fires[i] / L.n_rows)), el("td", { class: "num" }, short(L.max[i])),
    has.effect && el("td", { class: "num" }, known(L.effect[i]) ? short(L.effect[i]) : "\u2013"),
    has.attribution && el("td", { class: "num" }, short(L.attribution[i])),
    has.concept && el("td", {}, conceptText(run, i)), L.has_tokens && el("td", { class: "num" }, L.fires[i] ? percent(L.consistency[i] / 255) : ""));
  const select = el("select", { id: "sort", "aria-label": "sort latents by", onchange: () => { state.sort = select.value; draw(); } },
    sorts.map((name) => el("option", { value: name }, SORTS[name][0])));
  const draw = () => {
    select.value = state.sort;
    const found = state.query ? search(run, state.query).latents : null;
    const list = sortedLatents(run, state.sort).filter((i) => !found || found.has(i));
    run.list = list;
    status.textContent = found ? `${whole(list.length)} of ${whole(L.d_sae)} latents match \u201c${state.query}\u201d` : `all ${whole(L.d_sae)} latents`;
    const body = el("tbody", {}, list.slice(0, state.shown).map((i) => row(i, found?.get(i))));
    const heads = columns.map(([sort, name, num]) => el("th", { scope: "col", class: num ? "num" : "", "aria-sort": sort && sort === state.sort ? (sort === "number" ? "ascending" : "descending") : null },
      sort ? el("button", { type: "button", onclick: () => { state.sort = sort; draw(); } }, name) : name));
    holder.replaceChildren(el("div", { class: "scroll" }, el("table", { class: "latents", id: "latent-table" }, el("thead", {}, el("tr", {}, heads)), body)));
    if (list.length > state.shown) holder.append(el("button", { type: "button", class: "quiet", onclick: () => { state.shown += 200; draw(); } }, `show ${whole(Math.min(200, list.length - state.shown))} more`));
    if (!list.length) holder.append(el("p", {}, "Nothing found. Search knows numbers, concepts, tokens that latents fire on among their shown contexts, and tokens they promote."));
  };
  run.redrawList = draw;
  draw();
  return section("latents", "All latents", "Search above by number, token or concept. Columns sort.", el("div", { class: "controls" }, el("label", { for: "sort" }, "sort by "), select, status), holder);
}

// --- the map ---------------------------------------------------------------------------------------------------------

const RAMP = 7; // classes q0..q6
const KINDS = 8; // classes k0..k7, the commonest concepts

function decoderMap(run) {
  const L = run.latents;
  if (!L || !L.map?.length) return null;
  const readout = el("p", { class: "note readout", "aria-hidden": "true" }, "Point at a latent to read it, click to open it.");
  const key = el("ul", { class: "legend" });
  const X = (i) => L.map[2 * i] / 32767, Y = (i) => L.map[2 * i + 1] / 32767;
  const root = svg("svg", { class: "map", viewBox: "-1.03 -1.03 2.06 2.06", role: "img", "aria-label": "Map of decoder directions; the same latents are in the table of all latents" });
  const dots = Array.from({ length: L.d_sae }, (_, i) => svg("circle", { cx: X(i).toFixed(4), cy: Y(i).toFixed(4), r: 0.011 }));
  root.append(...dots);
  const nearest = (event) => {
    const box = root.getBoundingClientRect(), size = Math.min(box.width, box.height);
    const x = ((event.clientX - box.left - box.width / 2) / size) * 2.06, y = ((event.clientY - box.top - box.height / 2) / size) * 2.06;
    let best = -1, distance = 0.05 ** 2;
    for (let i = 0; i < L.d_sae; i++) {
      const d = (X(i) - x) ** 2 + (Y(i) - y) ** 2;
      if (d < distance) { distance = d; best = i; }
    }
    return best;
  };
  let pointed = -1;
  root.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    if (i === pointed) return;
    if (pointed >= 0) dots[pointed].classList.remove("pointed");
    pointed = i;
    if (i < 0) return;
    dots[i].classList.add("pointed");
    readout.replaceChildren(`Latent ${i} `, labelTokens(run, i, 4), ` fires on ${percent(L.fires[i] / L.n_rows)}`, known(L.effect[i]) ? `, effect ${short(L.effect[i])} nats` : "",
      L.concept[i] >= 0 ? ", " : "", conceptText(run, i));
  });
  root.addEventListener("click", (event) => { const i = nearest(event); if (i >= 0) run.open(i); });
  const color = (name) => {
    key.replaceChildren();
    if (name === "concept") {
      const count = new Map();
      L.concept.forEach((c, i) => { if (c >= 0 && L.concept_f1[i] >= WEAK) count.set(c, (count.get(c) || 0) + 1); });
      const common = [...count.entries()].sort((a, b) => b[1] - a[1]).slice(0, KINDS).map(([c]) => c);
      dots.forEach((dot, i) => { const k = common.indexOf(L.concept[i]); dot.setAttribute("class", k < 0 || L.concept_f1[i] < WEAK ? "k-none" : `k${k}`); });
      key.append(...common.map((c, k) => el("li", {}, el("i", { class: `key k${k}` }), visible(L.concepts[c]))), el("li", {}, el("i", { class: "key k-none" }), "other, or F1 below 0.2"));
      return;
    }
    const value = name === "effect" ? (i) => L.effect[i] : name === "attribution" ? (i) => Math.abs(L.attribution[i]) : name === "max" ? (i) => L.max[i] : (i) => L.fires[i] / L.n_rows;
    const values = dots.map((_, i) => value(i)).filter((v) => v > 0).sort((a, b) => a - b);
    const cut = (q) => values[Math.min(values.length - 1, Math.floor(q * values.length))];
    const cuts = Array.from({ length: RAMP - 1 }, (_, i) => cut((i + 1) / RAMP));
    dots.forEach((dot, i) => { const v = value(i); dot.setAttribute("class", v > 0 ? `q${cuts.filter((c) => v >= c).length}` : "k-none"); });
    const write = name === "density" ? percent : short;
    if (values.length) key.append(el("li", {}, write(values[0])), ...Array.from({ length: RAMP }, (_, i) => el("li", { class: "tight" }, el("i", { class: `key q${i}` }))), el("li", {}, write(values.at(-1)), " (sevenths of the latents)"), el("li", {}, el("i", { class: "key k-none" }), "none"));
  };
  const options = usableSorts(L).filter((name) => ["density", "effect", "attribution", "concept", "max"].includes(name));
  const select = el("select", { id: "map-color", onchange: () => color(select.value) }, options.map((name) => el("option", { value: name }, SORTS[name][0])));
  select.value = options.includes("concept") ? "concept" : "density";
  color(select.value);
  return section("map", "A map of the dictionary", L.map_note,
    el("div", { class: "controls" }, el("label", { for: "map-color" }, "coloured by "), select), el("div", { class: "mapbox" }, root, el("div", {}, key, readout)));
}
