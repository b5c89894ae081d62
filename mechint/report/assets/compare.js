// Several runs side by side.

const runClass = (index) => `c${(index % 6) + 1}`;
const runKey = () => RUNS.map((run) => ({ cls: runClass(run.index), text: run.facts.name }));

// A few rows of extreme norm can make up all of an FVU: where a run has such rows, that without them is shown first.
const typicalFvu = (quality) => (quality.without_outliers || quality).fvu;
const anyOutliers = () => RUNS.some((run) => run.facts.quality.without_outliers);

const SIDE_ROWS = [
  ["l0", "L0", (v) => short(v), "latents active a token"],
  ["typical", "variance left unexplained", (v) => percent(v), "without outlier rows, less is better"],
  ["fvu", "variance left unexplained", (v) => percent(v), "less is better"],
  ["ce_recovered_mean", "cross-entropy recovered, against the mean", percent4, "more is better"],
  ["kl_clean_sae", "KL to the untouched model, nats", (v) => short(v), "less is better"],
  ["cosine", "cosine with the activation", (v) => short(v), "more is better"],
  ["l2_ratio", "norm ratio", (v) => short(v), "1 is no shrinkage"],
];

function sideBySide() {
  const compare = FACTS.compare;
  // made anew for each table: an element can stand in one place only
  const head = (first) => [{ name: first }, ...RUNS.map((run) => ({ name: el("a", { href: run.home }, run.facts.name), num: true }))];
  const value = (run, key) => (key === "typical" ? anyOutliers() ? typicalFvu(run.facts.quality) : null : run.facts.quality[key]);
  const measured = SIDE_ROWS.filter(([key]) => RUNS.some((run) => known(value(run, key)))).map(([key, name, write, hint]) =>
    [el("span", {}, name, el("span", { class: "faint" }, ` ${hint}`)), ...RUNS.map((run) => write(value(run, key)))]);
  const dead = ["dead latents", ...RUNS.map((run) => (run.latents ? whole(run.latents.fires.filter((n) => n === 0).length) : whole(run.facts.quality.dead_features)))];
  const coverage = RUNS.some((run) => known(run.facts.concepts?.summary?.coverage))
    ? [["concept coverage", ...RUNS.map((run) => (known(run.facts.concepts?.summary?.coverage) ? run.facts.concepts.summary.coverage.toFixed(2) : "\u2013"))]] : [];
  const sizes = ["latents", ...RUNS.map((run) => whole(run.facts.d_sae))];
  return el("div", { class: "page" },
    el("header", { class: "hero" }, el("p", { class: "overline" }, "side by side"), el("h1", {}, compare.title), el("p", { class: "story" }, compare.text)),
    section("measured", "What each reaches", "On each run\u2019s own held-out data.", table(head(""), [sizes, ...measured, dead, ...coverage])),
    frontier(), overlaidCurves(), settingsTable(head), matches(), conceptsSideBySide());
}

function frontier() {
  const point = (run, key) => {
    const quality = run.facts.quality;
    const y = key === "fvu" ? typicalFvu(quality) : quality[key];
    return { x: quality.l0, y, cls: runClass(run.index), r: 5, title: `${run.facts.name}: L0 ${short(quality.l0)}, ${short(y)}`, label: RUNS.length <= 6 ? run.facts.name : null };
  };
  const chart = (key, title, label, format) => {
    const items = RUNS.map((run) => point(run, key)).filter((p) => known(p.x) && known(p.y));
    if (items.length < 2) return null;
    return plot({ title, height: 240, legend: runKey(), alt: `${title}: ${items.map((p) => p.title).join("; ")}`,
      x: { label: "L0, active latents a token", domain: domainOf(items.map((p) => p.x), { air: 0.35 }).map((v) => Math.max(v, 0)) },
      y: { label, format, domain: domainOf(items.map((p) => p.y), { air: 0.3 }) }, marks: [{ kind: "points", items }] });
  };
  const charts = [chart("fvu", "Sparsity against reconstruction", `variance left unexplained${anyOutliers() ? ", without outlier rows" : ""} (down is better)`, (v) => `${(100 * v).toFixed(2)} %`),
    chart("ce_recovered_mean", "Sparsity against the model\u2019s loss", "cross-entropy recovered (up is better)", (v) => `${(100 * v).toFixed(3)} %`)].filter(Boolean);
  return charts.length ? section("frontier", "What sparsity costs", null, el("div", { class: "grid2" }, charts)) : null;
}

function overlaidCurves() {
  const chart = (key, title, label) => {
    const runs = RUNS.filter((run) => run.facts.curves[key]?.some((v) => known(v) && v > 0));
    if (!runs.length) return null;
    const steps = (run) => run.facts.curves.step || run.facts.curves[key].map((_, i) => i);
    return plot({ title, height: 230, legend: runKey(), alt: `${title} of ${runs.map((run) => run.facts.name).join(", ")}`,
      x: { label: "training step", domain: [0, Math.max(...runs.flatMap(steps))] },
      y: { label: `${label} (log)`, log: true, domain: domainOf(runs.flatMap((run) => run.facts.curves[key]), { log: true }) },
      marks: runs.map((run) => ({ kind: "line", x: steps(run), y: run.facts.curves[key], cls: runClass(run.index), name: run.facts.name })) });
  };
  return section("curves", "How they trained", null, el("div", { class: "grid2" },
    chart("fvu", "Variance left unexplained", "FVU of the batch"), chart("l0_count", "Active latents a token", "L0")));
}

function settingsTable(head) {
  const rows = FACTS.compare.settings;
  return section("settings", "Settings that differ", rows.length ? null : "None: the runs were asked for with the same settings.",
    rows.length > 0 && table(head("setting"), rows.map(({ name, values }) => [el("code", {}, name), ...values])));
}

function matches() {
  const found = FACTS.compare.matches || [];
  if (!found.length && !FACTS.compare.no_matches) return null;
  return section("matches", "Which latents they share",
    "Each latent\u2019s closest decoder direction in the other run. Mutual: each is the other\u2019s closest. By chance: what a random direction reaches. A latent\u2019s page links to its match.",
    FACTS.compare.no_matches && el("p", { class: "note" }, FACTS.compare.no_matches),
    el("div", { class: "grid2" }, found.map(({ left, right, edges, mutual, onesided, text, chance }) => {
      const most = Math.max(...edges.slice(1).map((_, i) => Math.max(mutual[i], onesided[i])));
      return plot({ title: text, height: 230, alt: `${text}. Histogram of cosines.`, note: `latents of ${RUNS[left].facts.name}, by cosine with their best match in ${RUNS[right].facts.name}`,
        legend: [{ cls: "c2", text: "one-sided" }, { cls: "c1", text: "mutual" }],
        x: { label: "cosine of the decoder rows", domain: [edges[0], 1] }, y: { label: "latents", domain: [0, most * 1.08] },
        marks: [...[["onesided", onesided, "c2"], ["mutual", mutual, "c1"]].map(([name, counts, cls]) => ({ kind: "bars", counts, edges, cls: `${cls} through`, tell: (i) => `${counts[i]} ${name}, cosine ${edges[i].toFixed(2)} to ${edges[i + 1].toFixed(2)}` })), { kind: "rule", x: chance, text: "by chance" }] });
    })));
}

function conceptsSideBySide() {
  const runs = RUNS.filter((run) => run.facts.concepts?.rows?.length);
  if (runs.length < 2) return null;
  const scores = new Map();
  for (const run of runs) for (const row of run.facts.concepts.rows) {
    if (!scores.has(row.concept)) scores.set(row.concept, new Map());
    scores.get(row.concept).set(run.index, row);
  }
  const gap = (row) => { const f = runs.map((run) => row.get(run.index)?.f1).filter(known); return f.length > 1 ? Math.max(...f) - Math.min(...f) : -1; };
  const rows = [...scores.entries()].sort((a, b) => gap(b[1]) - gap(a[1])).map(([concept, row]) => [visible(String(concept)), ...runs.flatMap((run) => {
    const found = row.get(run.index);
    return [found ? meter(found.f1) : "", found && known(found.best_latent) && found.best_latent >= 0 ? el("a", { href: run.url(found.best_latent) }, String(found.best_latent)) : ""];
  })]);
  return section("concepts", "Concepts, side by side", "F1 of the best latent; those that differ most stand first.",
    expandable(20, rows, (part) => table([{ name: "concept" }, ...runs.flatMap((run) => [{ name: run.facts.name }, { name: "latent", num: true }])], part), "concepts"));
}
