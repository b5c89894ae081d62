# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How well do latents match what is known?
#
# A latent that fires on city names is easy to find when one looks for nice examples. The built-in tales say of every
# token which concepts stand behind it, so here the question has a number: for each of about a hundred concepts, how
# well does the best latent tell it, and how does that compare with dictionaries that have learned nothing? The same
# works with your own labels (`mechint concepts --labels FILE.csv`; docs/concepts.md).

# %%
RUN = None  # a run directory on the built-in tales, such as "runs/tales-8x"; None: the newest finished one
CONCEPTS = None  # such as ["capital", "male_name"]; None: chosen below
MAX_TEXTS = 600  # texts to score on where the run has no concepts.csv yet

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import torch
from IPython.display import HTML, display

from mechint.analysis import load_or_gather
from mechint.concepts import score_concepts
from mechint.config import ConceptsConfig
from mechint.data import open_activations
from mechint.models import load_model
from mechint.provenance import read_json
from mechint.report import figures, tables
from mechint.report.files import concepts_figure
from mechint.runs import Run, latest_run
from mechint.sae import load_sae

run = latest_run(prefer="concepts.csv") if RUN is None else Run(RUN)
sae = load_sae(run.checkpoint_path)
activations = open_activations(run.activations_path())
decode = load_model(run.config.model_name, device="cpu").tokenizer.decode
print(run, activations, f"{sae.d_sae:,} latents", sep="\n")

# %% [markdown]
# ## Scores
#
# A latent *tells* a concept if it is on, above some threshold, at the tokens of the concept and nowhere else.
# Precision is the share of the tokens where it is on that belong to the concept, recall the share of the concept's
# tokens where it is on, and F1 is high only if both are. Latent and threshold are chosen on one half of the texts;
# what is shown is measured on the other half, or else the best of a thousand latents would look good by luck.

# %%
folder = run.path
if not (folder / "concepts.csv").is_file():
    folder = Path(tempfile.mkdtemp(prefix="mechint-concepts-"))  # `mechint concepts` writes them into the run
    n_texts = int(activations.text_ids.unique().numel())
    score_concepts(ConceptsConfig(run_dir=run.path, output_dir=folder, max_texts=min(MAX_TEXTS, n_texts)))
rows = {row["concept"]: row for row in figures.read_table(folder / "concepts.csv")}
summary = read_json(folder / "concepts.json")


def number(concept: str, column: str) -> float:
    """A cell of concepts.csv; not a number where nothing was measured."""
    return float(rows[concept][column] or "nan")


low, high = summary["ci95"]["coverage"]
baselines = summary["baselines"]
means = [
    {"dictionary": "this SAE", "mean F1": f"{summary['coverage']:.2f}", "concepts over 0.5": summary["n_found"]},
    *(
        {"dictionary": name, "mean F1": f"{each['coverage']:.2f}", "concepts over 0.5": each["n_found"]}
        for name, each in baselines.items()
    ),
    {"dictionary": "list of tokens", "mean F1": f"{summary['token_coverage']:.2f}", "concepts over 0.5": ""},
]
display(HTML(tables.table_html(means)))
print(f"{summary['n_concepts']} concepts, {summary['n_tokens']:,} tokens; 95 % interval {low:.2f} to {high:.2f}")

# %% [markdown]
# The baselines are what make the first line mean something. `random` has as many latents as the SAE, as many of them
# on, and directions drawn at random; `pca` has the principal components, each in both signs. The last line needs no
# model: a list of tokens, chosen on the first half. Where a concept is a list of words that list is hard to beat, and
# an SAE that equals it has found the words, not more.

# %%
compared = [column for column in ("f1", "random_f1", "pca_f1") if column in next(iter(rows.values()))]
concepts_figure([{"concept": concept, **{c: number(concept, c) for c in compared}} for concept in rows])

# %% [markdown]
# ## Best and worst
#
# Read the worst as carefully as the best. A concept without a latent may be missing from the model, may be spread
# over several latents, or may be a distinction that we make and the model does not need.

# %%
by_f1 = sorted(rows, key=lambda concept: -number(concept, "f1"))


def line(concept: str) -> dict[str, str]:
    row = rows[concept]
    cells = {"concept": concept, "tokens": row["n_tokens"], "latent": row["best_latent"]}
    for column in ("f1", "precision", "recall", "random_f1", "pca_f1", "token_f1"):
        if column in row:
            cells[column] = f"{number(concept, column):.2f}"
    return cells


display(HTML(tables.table_html([line(concept) for concept in by_f1[:8]])))
display(HTML(tables.table_html([line(concept) for concept in by_f1[-8:]])))
beaten = sum(number(concept, "f1") > number(concept, "token_f1") for concept in rows)
print(f"the best latent beats the list of tokens for {beaten} of {len(rows)} concepts")

# %% [markdown]
# ## What the best latents fire on
#
# The best concept, one from the middle, and the worst, each with the texts where its latent is strongest. High F1
# looks as one would hope. Low F1 teaches more: the latent is on at *something* that only overlaps with our concept,
# and the texts often show what it is.

# %%
gathered = load_or_gather(run)
for concept in CONCEPTS or (by_f1[0], by_f1[len(by_f1) // 2], by_f1[-1]):
    if concept not in rows:
        print(f"{concept} was not scored; there are {', '.join(sorted(rows))}")
        continue
    latent = int(rows[concept]["best_latent"])
    display(HTML(f"<b>{concept}</b>, F1 {number(concept, 'f1'):.2f}: latent {latent}"))
    display(HTML(tables.contexts_html(sae, activations, latent, gathered.top_rows[latent][:6], decode)))

# %% [markdown]
# ## More than one latent
#
# If the best latent misses tokens of its concept, others may hold them. A probe is a logistic regression on the K
# latents that differ most; on all numbers of the activation it says how much there is to be found at all. AUROC: the
# chance that a token of the concept gets a higher score than another token; 0.5 is guessing. How fast the SAE's line
# reaches the last one tells how few latents a concept needs.

# %%
probes = [
    {
        "probe on": f"{k} latent" + "s" * (k != "1"),
        "this SAE": f"{value:.3f}",
        **{
            name: f"{each['probe_auroc'][k]:.3f}" if k in each["probe_auroc"] else ""
            for name, each in baselines.items()
        },
    }
    for k, value in sorted(summary["probe_auroc"].items(), key=lambda item: int(item[0]))
]
if summary["probe_auroc_dense"] is not None:
    probes.append({"probe on": "the whole activation", "this SAE": f"{summary['probe_auroc_dense']:.3f}"})
display(HTML(tables.table_html(probes)))

# %% [markdown]
# ## Splitting and absorption
#
# Two ways in which one concept is not one latent. *Splitting*: several latents share it, each with some of its
# tokens; the first table has the concepts with most of them. *Absorption*: the latent of a general concept stays
# silent on a special case, because the special case has a latent of its own that brings the general direction along.
# Then "the latent for places" has holes that no example of where it fires can show.

# %%
split = sorted(rows, key=lambda concept: -number(concept, "n_latents_for_concept"))[:6]
table = [
    {
        "concept": concept,
        "latents": int(number(concept, "n_latents_for_concept")),
        "F1 of the best": f"{number(concept, 'f1'):.2f}",
        "F1 of all together": f"{number(concept, 'split_f1'):.2f}",
    }
    for concept in split
]
display(HTML(tables.table_html(table)))
pairs = sorted(summary["absorption_pairs"], key=lambda pair: -pair["absorption"])[:6]
table = [
    {
        "child of parent": f"{pair['child']} of {pair['parent']}",
        "parent's latents silent": f"{pair['parent_silent']:.0%}",
        "absorbed": f"{pair['absorption']:.0%}",
        "by latents": " ".join(map(str, pair["latents"])),
    }
    for pair in pairs
]
display(HTML(tables.table_html(table)))

# %% [markdown]
# ## How many latents mean something we have a word for
#
# The other direction: each latent is given the concept that it tells best. Many latents of a good SAE have no concept
# here, and that is no fault of theirs: the list is what the generator knows, not all that the model needs.

# %%
latents = figures.read_table(folder / "latent_concepts.csv")
f1 = torch.tensor([float(row["f1"]) for row in latents if row["f1"]])
for cut in (0.8, 0.5, 0.2):
    print(f"{int((f1 >= cut).sum()):5} of {len(latents):,} latents tell a concept with F1 of {cut} or more")
mono = summary["monosemanticity"]
print(
    f"{mono['mass_share']:.0%} of a latent's activation lies in its concept, {mono['top_share']:.0%} of its top tokens"
)

# %% [markdown]
# ## What to conclude
#
# A high F1 says that a latent and a concept come together in these texts. Whether the model uses the latent *as* the
# concept is another question: `ablation.ipynb` removes latents and looks at the predictions, and `tour.ipynb` ends
# with pushing one.
