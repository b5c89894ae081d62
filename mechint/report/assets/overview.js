// The sections of one run: what it is, how good it is, how it got there. `run` is {index, facts, latents, url}.

function hero(run) {
  const { facts } = run;
  return el("header", { class: "hero", id: "summary" },
    el("p", { class: "overline" }, facts.name),
    el("h1", {}, facts.story.title),
    el("p", { class: "story" }, facts.story.text),
    el("div", { class: "tiles" }, facts.story.tiles.map((tile) => el("div", { class: "tile" },
      el("span", { class: "value" }, tile.value), el("span", { class: "what" }, tile.label), el("span", { class: "why" }, tile.meaning)))),
    facts.story.caution && el("p", { class: "caution" }, facts.story.caution));
}

function examples(run) {
  if (!run.latents || !run.facts.examples?.length) return null;
  return section("examples", "Some of what it found",
    "Chosen by rule, not by hand; the rule stands on each card. The marked word is where the latent fires most strongly.",
    el("div", { class: "cards" }, run.facts.examples.map(({ latent, why }) => el("a", { class: "card", href: run.url(latent) },
      el("span", { class: "cardhead" }, el("b", {}, `Latent ${latent}`), labelTokens(run, latent, 2)),
      variedContexts(run, latent, 3).map((context) => contextLine(run, latent, context, { narrow: 5 })),
      el("span", { class: "cardwhy" }, why)))));
}

function training(run) {
  const { curves, d_sae: dSae } = run.facts;
  const x = curves.step || Array.from(curves.loss || [], (_, i) => i);
  if (x.length < 2) return null;
  const axis = { label: "training step", domain: [0, Math.max(...x, run.facts.steps)] };
  const last = (values) => values.filter(known).at(-1);
  const chart = (name, title, label, { log = true, cls = "c1" } = {}) => {
    const y = curves[name];
    if (!y || !y.some(known)) return null;
    const usable = log && y.some((value) => value > 0);
    const text = title(last(y));
    return plot({
      title: text, height: 190, x: axis, alt: `${text}. From ${short(y.find(known))} at the start to ${short(last(y))} at the end, ${y.length} points.`,
      y: { label: usable ? `${label} (log)` : label, log: usable, domain: usable ? domainOf(y, { log: true }) : [0, Math.max(4, ...y.filter(known)) * 1.08] },
      marks: [{ kind: "line", x, y, cls }],
    });
  };
  return section("training", "How it trained", `${whole(run.facts.steps)} steps of ${whole(run.facts.batch_size)} activations. Each point is one training batch before the step's update.`,
    el("div", { class: "grid2" },
      chart("fvu", (v) => `${percent(v)} of the variance left unexplained`, "FVU of the batch"),
      chart("l0_count", (v) => `${short(v)} latents active a token`, "L0"),
      chart("loss", (v) => `Loss ends at ${short(v)}`, "loss a dimension"),
      chart("dead", (v) => `${whole(v)} of ${whole(dSae)} latents silent lately`, "silent latents", { log: false, cls: "c3" })));
}

const QUALITY = [
  // key, name, digits or percent, key under zero ablation, under mean ablation (or a number), meaning
  ["l0", "L0", short, null, null, "active latents a token"],
  ["fvu", "FVU", percent, null, 1, "share of the activations\u2019 variance that the reconstruction misses"],
  ["mse_per_dim", "squared error", short, null, null, "a dimension, in squared units of the activations"],
  ["cosine", "cosine", short, null, null, "between activation and reconstruction"],
  ["l2_ratio", "norm ratio", short, null, null, "length of the reconstruction over that of the activation; below 1 is shrinkage"],
  ["explained_variance_legacy", "EV, legacy", percent4, null, null, "explained variance as older tools average it, over tokens"],
  ["relative_reconstruction_bias", "relative bias", short, null, null, "1 is unbiased"],
  ["ce_clean", "CE, untouched", short4, null, null, "cross-entropy of the model alone, nats a token"],
  ["ce_sae", "CE, spliced", short4, "ce_zero", "ce_mean", "the model reading the reconstruction instead, nats a token"],
  ["ce_recovered_mean", "CE recovered (mean)", percent4, null, 0, "of what mean ablation costs; 100 % is no cost"],
  ["ce_recovered_zero", "CE recovered (zero)", percent4, 0, null, "of what zero ablation costs; 100 % is no cost"],
  ["kl_clean_sae", "KL(clean \u2016 spliced)", short, "kl_clean_zero", "kl_clean_mean", "change of the predictions, nats a token"],
  ["kl_score_mean", "KL score (mean)", percent4, null, 0, "share of mean ablation\u2019s KL avoided"],
  ["kl_score_zero", "KL score (zero)", percent4, 0, null, "share of zero ablation\u2019s KL avoided"],
];
function short4(value) { return short(value, 4); }
function percent4(value) { return known(value) ? `${minus(String(+(100 * value).toPrecision(4)))} %` : "\u2013"; }

function quality(run) {
  const { quality: q, evaluated } = run.facts;
  const ci = q.ci95 || {};
  const rows = QUALITY.filter(([key]) => known(q[key])).map(([key, name, write, zero, mean, meaning]) => {
    const base = (side) => (typeof side === "number" ? write(side) : side && known(q[side]) ? write(q[side]) : "");
    const [low, high] = ci[key] || [];
    const without = (kind) => {
      const value = q[kind]?.[key];
      return known(value) && write(value) !== write(q[key]) ? write(value) : "";
    };
    return [name, write(q[key]), known(low) ? `${write(low)} to ${write(high)}` : "", without("without_special"), without("without_outliers"), base(zero), base(mean), meaning];
  });
  const columns = [{ name: "metric" }, { name: "this SAE", num: true }, { name: "95 % interval", num: true }, { name: "no special tokens", num: true, title: "the same without the rows and predictions of BOS, EOS and padding" },
    { name: "no outliers", num: true, title: "the same without rows whose norm is many times the median" },
    { name: "zero ablation", num: true }, { name: "mean ablation", num: true }, { name: "what it says" }];
  const used = columns.map((column, i) => i === 0 || rows.some((row) => row[i] !== ""));
  const keep = (row) => row.filter((_, i) => used[i]);
  const n = [known(q.n_val) && `${whole(q.n_val)} held-out activations`, known(q.n_texts_ce) && `${whole(q.n_texts_ce)} held-out texts (${whole(q.n_predicted)} predictions)`].filter(Boolean);
  return section("quality", "Reconstruction, and what it costs the model",
    `Measured on ${n.join(" and ") || "held-out activations"}. Zero and mean ablation replace the activation by 0, or by its mean over the training set: what an SAE must beat.`,
    table(keep(columns), rows.map(keep)),
    !evaluated && el("p", { class: "note" }, "Only what training itself measured is here."));
}

function firing(run) {
  const { latents: L, facts } = run;
  const q = facts.quality;
  const charts = [];
  let lists = null;
  if (L) {
    const density = Array.from(L.fires, (n) => n / L.n_rows), alive = density.filter((d) => d > 0);
    if (alive.length) {
      const first = Math.floor(Math.log10(Math.min(...alive)) + 1e-9), bins = 6;
      const edges = Array.from({ length: -first * bins + 1 }, (_, i) => 10 ** (first + i / bins));
      if (edges.length < 2) edges.push(1.0001);
      edges[edges.length - 1] = 1.0001;
      const counts = histogram(alive, edges), median = [...alive].sort((a, b) => a - b)[alive.length >> 1];
      const title = `The median latent fires on ${percent(median)} of tokens`;
      charts.push(plot({
        title, note: `${whole(alive.length)} of ${whole(L.d_sae)} latents fire at all`, height: 220,
        alt: `${title}. Histogram of the share of tokens that each latent fires on, from ${percent(edges[0])} to 100 %.`,
        x: { label: `share of ${whole(L.n_rows)} tokens (log)`, log: true, domain: [edges[0], 1], format: (v) => percent(v, 2) },
        y: { label: "latents", domain: [0, Math.max(...counts) * 1.08] },
        marks: [{ kind: "bars", counts, edges, cls: "c1", tell: (i) => `${whole(counts[i])} latents fire on ${percent(edges[i])} to ${percent(edges[i + 1])} of tokens` },
          { kind: "rule", x: 0.1, text: "dense: over 10 %", cls: "soft" }, { kind: "rule", x: median, text: "median" }],
      }));
    }
    lists = [
      latentList(run, density.map((d, i) => [d, i]).filter(([d]) => d === 0).map(([, i]) => i), "Dead", `fire on none of ${whole(L.n_rows)} tokens`),
      latentList(run, density.map((d, i) => [d, i]).filter(([d]) => d > 0.1).sort((a, b) => b[0] - a[0]).map(([, i]) => i), "Dense", "fire on more than a tenth of the tokens",
        (i) => ` ${percent(density[i])}`),
    ];
  }
  const l0 = q.l0_histogram;
  if (l0?.counts?.length) {
    const { edges, counts } = l0;
    const filled = counts.reduce((found, count, i) => (count ? i : found), 0);
    charts.push(plot({
      title: known(q.l0) ? `${short(q.l0)} latents are active on the mean token` : "Active latents a token", height: 220,
      alt: "Histogram of the number of active latents a token", note: `held-out tokens, by how many latents are active on each`,
      x: { label: "active latents on a token (L0)", domain: [edges[0], edges[filled + 1]] },
      y: { label: "tokens", domain: [0, Math.max(...counts) * 1.08] },
      marks: [{ kind: "bars", counts, edges, cls: "c2", tell: (i) => `${whole(counts[i])} tokens with ${short(edges[i])} to ${short(edges[i + 1])} active latents` },
        ...(known(q.l0) ? [{ kind: "rule", x: q.l0, text: "mean" }] : [])],
    }));
  } else if (q.density_histogram && !L) {
    const { log10_edges: logs, counts } = q.density_histogram;
    const edges = logs.map((e) => 10 ** e);
    charts.push(plot({ title: "How often latents fire", height: 220, alt: "Histogram of latent densities",
      x: { label: "share of tokens (log)", log: true, domain: [edges[0], edges.at(-1)], format: (v) => percent(v, 2) },
      y: { label: "latents", domain: [0, Math.max(...counts) * 1.08] },
      marks: [{ kind: "bars", counts, edges, cls: "c1", tell: (i) => `${counts[i]} latents` }] }));
  }
  if (!charts.length) return null;
  return section("firing", "How often latents fire", null, lists ? pairOrStack(charts, charts.length === 1 ? el("div", {}, lists) : el("div", { class: "grid2" }, lists)) : el("div", { class: "grid2" }, charts));
}

function latentList(run, latents, title, rule, tell = () => "") {
  const shown = 60;
  const links = (part) => part.map((i) => el("li", {}, el("a", { href: run.url(i) }, String(i)), tell(i)));
  const list = el("ul", { class: "numbers" }, links(latents.slice(0, shown)));
  const more = latents.length > shown && el("button", { type: "button", class: "quiet", onclick: (event) => {
    list.append(...links(latents.slice(shown)));
    event.target.remove();
  } }, `show ${whole(latents.length - shown)} more`);
  return el("div", {}, el("h3", {}, `${title}: ${whole(latents.length)}`), el("p", { class: "note" }, latents.length ? `${latents.length === 1 ? "It fires" : "They fire"} ${rule.replace(/^fire /, "")}.` : `No latent: none ${rule.replace(/^fire on none/, "is silent on all").replace(/^fire /, "fires ")}.`), list, more);
}

const CONCEPT_COLUMNS = [
  // column of concepts.csv, heading, explanation
  ["precision", "precision", "of the latent's tokens, the share that carries the concept"],
  ["recall", "recall", "of the concept's tokens, the share that the latent fires on"],
  ["auroc", "AUROC", "chance that a token of the concept activates the latent more than another"],
  ["n_latents_for_concept", "latents", "latents that together raise the F1: more than one is splitting"],
  ["absorption", "absorbed", "share of the concept's tokens on which its latent is silent while a child's latent fires"],
  ["token_f1", "token list", "F1 of a list of tokens, the plainest detector; where it is near 1 the concept is in the word itself"],
  ["probe_auroc_dense", "probe", "AUROC of a logistic probe on the raw activations"],
  ["random_f1", "random", "best F1 of a random dictionary of the same size"],
  ["pca_f1", "PCA", "best F1 of a principal component"],
];

function concepts(run) {
  const found = run.facts.concepts;
  if (!found?.rows?.length) return null;
  const columns = CONCEPT_COLUMNS.filter(([key]) => found.rows.some((row) => known(row[key])));
  const count = (low, high = 2) => found.rows.filter((row) => known(row.f1) && row.f1 >= low && row.f1 < high).length;
  const body = (rows) => rows.map((row) => [
    el("span", {}, visible(String(row.concept)), row.parent && el("span", { class: "faint" }, ` in ${visible(String(row.parent))}`)),
    whole(row.n_tokens),
    known(row.best_latent) && row.best_latent >= 0 ? el("a", { href: run.url(row.best_latent) }, String(row.best_latent)) : "",
    run.latents && known(row.best_latent) && row.best_latent >= 0 ? labelTokens(run, row.best_latent, 2) : "",
    meter(row.f1),
    ...columns.map(([key]) => (key === "n_latents_for_concept" ? whole(row[key]) : known(row[key]) ? row[key].toFixed(2) : "")),
  ]);
  const head = [{ name: "concept" }, { name: "tokens", num: true }, { name: "latent", num: true }, { name: "which fires on" }, { name: "F1" },
    ...columns.map(([, name, title]) => ({ name, title, num: true }))];
  return section("concepts", "Which known concepts it has a latent for",
    `${whole(found.rows.length)} concepts whose tokens are known. For ${whole(count(0.8))} one latent alone finds them with an F1 of at least 0.8, for ${whole(count(-1, 0.5))} none reaches 0.5. Thresholds are chosen on one half of the texts, scores are from the other.`,
    expandable(20, body(found.rows), (rows) => table(head, rows, { cls: "wide" }), "concepts"));
}

function expandable(first, rows, make, what) {
  const holder = el("div", {}, make(rows.slice(0, first)));
  if (rows.length <= first) return holder;
  const button = el("button", { type: "button", class: "quiet", onclick: () => { holder.replaceChildren(make(rows)); button.remove(); } },
    `show all ${whole(rows.length)} ${what}`);
  return el("div", {}, holder, button);
}

function meter(value) {
  if (!known(value)) return "";
  const bar = el("i", {});
  bar.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
  return el("span", { class: "meter" }, el("b", {}, value.toFixed(2)), el("span", { class: "track", "aria-hidden": "true" }, bar));
}

function causal(run) {
  const { latents: L, facts } = run;
  if (!L) return null;
  const order = Array.from(L.effect.keys()).filter((i) => known(L.effect[i])).sort((a, b) => L.effect[b] - L.effect[a]);
  const positive = order.filter((i) => L.effect[i] > 0);
  const parts = [];
  if (positive.length) {
    const sum = positive.reduce((total, i) => total + L.effect[i], 0);
    const top = positive.slice(0, 10).reduce((total, i) => total + L.effect[i], 0);
    const all = order.length === L.d_sae;
    const low = Math.max(L.effect[positive.at(-1)], L.effect[positive[0]] * 1e-6);
    parts.push(plot({
      title: all ? `Ten latents carry ${percent(top / sum)} of the summed effect` : `Exact effect of ${whole(order.length)} latents`,
      note: "each point is a latent; click one to open it", height: 260,
      alt: `Mean KL of removing each latent by rank, from ${short(L.effect[positive[0]])} nats down; the largest is latent ${positive[0]}.`,
      x: { label: `rank among ${whole(order.length)} latents measured (log)`, log: true, domain: [0.8, Math.max(positive.length, 2) * 1.2] },
      y: { label: "mean KL when removed, nats a token (log)", log: true, domain: [low / 1.5, L.effect[positive[0]] * 1.5] },
      marks: [{ kind: "points", r: 2.4, open: (i) => run.open(i), items: positive.filter((i) => L.effect[i] >= low).map((i, rank) => ({
        x: rank + 1, y: L.effect[i], cls: "c1", latent: i, title: `${rank + 1}. latent ${i}: ${short(L.effect[i])} nats`, label: rank < 3 ? String(i) : null })) }],
    }));
  }
  const both = Array.from(L.exact.keys()).filter((i) => Math.abs(L.attribution[i]) > 0 && L.exact[i] > 0);
  if (both.length > 2) {
    const size = (i) => Math.abs(L.attribution[i]);
    const control = (i) => L.control[i] === 1;
    parts.push(plot({
      title: facts.ranking?.reading || "The fast estimate against the exact effect", note: facts.ranking?.correlation_text, height: 260,
      alt: `Fast estimate against exact effect of ${both.length} latents. ${facts.ranking?.correlation_text || ""}`,
      legend: [{ cls: "c1", text: "top of the fast ranking" }, { cls: "c2", text: "random control" }],
      x: { label: facts.ranking?.attribution_label || "estimate (log)", log: true, domain: domainOf(both.map(size), { log: true }) },
      y: { label: "mean KL when removed, nats a token (log)", log: true, domain: domainOf(both.map((i) => L.exact[i]), { log: true }) },
      marks: [{ kind: "points", r: 2.8, open: (i) => run.open(i), items: both.sort((a, b) => control(a) - control(b)).map((i) => ({
        x: size(i), y: L.exact[i], cls: control(i) ? "c2" : "c1", latent: i, title: `latent ${i}: estimate ${short(size(i))}, exact ${short(L.exact[i])}` })) }],
    }));
  }
  const complete = order.length === L.d_sae;
  const byAttribution = Array.from(L.attribution.keys()).filter((i) => known(L.attribution[i])).sort((a, b) => Math.abs(L.attribution[b]) - Math.abs(L.attribution[a]));
  const listed = (byAttribution.length && !complete ? byAttribution : order).slice(0, 12);
  if (!listed.length) return null;
  const has = { a: byAttribution.length > 0, e: order.length > 0, c: listed.some((i) => L.concept[i] >= 0) };
  return section("effects", "Which latents the model depends on",
    facts.ranking?.lead || "Each latent is removed from the residual stream, and the change of the model\u2019s predictions is measured.",
    pairOrStack(parts, table([{ name: "latent", num: true }, { name: "fires on" }, { name: "density", num: true }, ...(has.a ? [{ name: "estimate", num: true }] : []),
      ...(has.e ? [{ name: "exact, nats", num: true }] : []), ...(has.c ? [{ name: "concept" }] : [])],
    listed.map((i) => [el("a", { href: run.url(i) }, String(i)), labelTokens(run, i, 4), percent(L.fires[i] / L.n_rows),
      ...(has.a ? [short(L.attribution[i])] : []), ...(has.e ? [known(L.effect[i]) ? short(L.effect[i]) : "not measured"] : []), ...(has.c ? [conceptText(run, i)] : [])]))));
}

// Charts beside each other with the rest below; a single chart has the rest beside it.
function pairOrStack(charts, rest) {
  return charts.length === 1 ? el("div", { class: "grid2 high" }, charts, rest) : [el("div", { class: "grid2" }, charts), rest];
}

function provenance(run) {
  const { facts } = run;
  const changed = facts.settings.length
    ? table([{ name: "setting" }, { name: "here", num: true }, { name: "default", num: true }], facts.settings.map((s) => [el("code", {}, s.name), s.value, el("span", { class: "faint" }, s.default)]))
    : el("p", {}, "All settings are the defaults.");
  const own = facts.steps !== null;  // else an SAE of another tool
  return section("provenance", own ? "What was trained on what" : "What its files say", null,
    el("div", { class: "grid2 high" },
      el("div", {}, el("h3", {}, own ? "Settings that differ from the defaults" : "What it computes"), own ? changed : null,
        el("details", own ? {} : { open: "" }, el("summary", {}, `all ${Object.keys(facts.all_settings).length} settings`),
          table([{ name: "setting" }, { name: "value", num: true }], Object.entries(facts.all_settings).map(([name, value]) => [el("code", {}, name), value])))),
      el("div", {}, el("h3", {}, own ? "The chain of hashes" : "Where it belongs"), el("dl", { class: "chain" }, facts.provenance.map(([label, value]) => [el("dt", {}, label), el("dd", {}, value)])),
        el("p", { class: "note" }, "Checked by ", command(facts.check)))));
}

function missing(run) {
  const items = run.facts.missing;
  if (!items.length) return null;
  return section("missing", "What is not here yet", "Run these, then the report again with --overwrite.",
    el("ul", { class: "missing" }, items.map(({ what, command: text }) => el("li", {}, what, text && [". ", command(text)]))));
}
