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
# # What did the SAE learn?
#
# Training curves, how often latents fire, the texts they fire on and the words they promote, and which of them belong
# together. With `RUN = None` this reads the newest finished run; `make pipeline` makes one on the built-in world in
# minutes. (`mechint report RUN` puts the same, for every latent, on a page to search in.)

# %%
RUN = None  # a run directory such as "runs/tales-8x"; None: the newest finished one
LATENTS = None  # such as [12, 345]; None: chosen below
TOP_K = 5  # strongest contexts shown for each latent
TEXT = None  # a sentence to look at; None: a piece of a stored text

# %%
# %matplotlib inline
import html

import torch
from IPython.display import HTML, display

from mechint.analysis import (
    contexts,
    decoder_map,
    fires_on,
    highlight_html,
    latent_values,
    latents_on_token,
    load_or_gather,
    logit_effects,
    nearest_latents,
    token_consistency,
    token_strings,
    token_texts,
    top_decoder_pairs,
)
from mechint.data import open_activations
from mechint.eval import read_metrics_csv
from mechint.inside import open_inside
from mechint.report import figures, tables
from mechint.report.files import map_figure
from mechint.runs import Run, latest_run

run = latest_run() if RUN is None else Run(RUN)
subject = open_inside(run.path, device="cpu")  # what is left to compute here is little
sae, decode = subject.sae, subject.model.tokenizer.decode
activations = open_activations(run.activations_path())
print(run, activations, f"{sae.d_sae:,} latents", sep="\n")

# %% [markdown]
# ## Training
#
# The loss is a squared error plus a price on activity, so its two terms pull against each other. What to look for: the
# curves are flat at the end (else train longer); L0, the number of latents active on a token, is tens rather than
# hundreds (else raise `--lam`); few latents are dead (else lower it).

# %%
figures.training_curves(read_metrics_csv(run.metrics_path), d_sae=sae.d_sae)

# %% [markdown]
# ## How often latents fire
#
# Each latent is on or off at each token. A good dictionary has most latents at a small share of tokens: those are the
# ones that can stand for something. A latent that is on nearly everywhere says little, one that is never on is wasted.
# `load_or_gather` goes over all stored activations once and keeps its tables in the run.

# %%
gathered = load_or_gather(run, sae=sae, activations=activations)
figures.activation_density_histogram(gathered.counts, gathered.n_rows)

# %% [markdown]
# ## What they read and what they write
#
# For each latent, the tokens where it is strongest. `consistency` is the share of the commonest token among them: at 1
# the latent detects one token, lower values are words of a kind, or a role in the sentence that no single word has.
# `promotes` are the tokens whose logit its decoder row raises most when it reaches the output directly, past the later
# layers: what the latent *writes*. Where what it reads and what it writes fit together, one begins to believe in it.

# %%
consistency = token_consistency(gathered, activations)
effects = logit_effects(sae, subject.model, k=5)
if LATENTS is None:
    # Those that fire on different tokens (a kind of word says more than a word) and raise a few far above the others.
    of_a_kind = (consistency <= 0.5) & (gathered.counts >= 20) & (gathered.density < 0.1)
    LATENTS = torch.where(of_a_kind, effects.kurtosis, 0.0).argsort(descending=True)[:6].tolist()


def strongest_tokens(latent: int) -> list[str]:
    rows = gathered.top_rows[latent]
    return token_texts(decode, activations.tokens[rows[rows >= 0]].tolist())


def line(latent: int) -> dict[str, str]:
    return {
        "latent": latent,
        "fires on": f"{100 * float(gathered.density[latent]):.2f} %",
        "strongest": f"{float(gathered.max[latent]):.2f}",
        "consistency": f"{float(consistency[latent]):.2f}",
        "strongest tokens": " ".join(repr(token) for token in list(dict.fromkeys(strongest_tokens(latent)))[:6]),
        "promotes": " ".join(map(repr, token_texts(decode, effects.promoted[latent].tolist()))),
    }


display(HTML(tables.table_html([line(latent) for latent in LATENTS])))

# %% [markdown]
# Each line is a text around one token (bold); the ground is as strong as the latent is there. The first lines of a
# latent are its strongest tokens: what do they, and what stands before them, have in common? The last ones, from each
# fifth of the range where it fires at all, are the test: if only the strongest contexts fit your description, the
# description is too narrow. The histogram shows how much of the range that is.

# %%
sample = torch.linspace(0, activations.n_rows - 1, min(20_000, activations.n_rows)).long()
for latent in LATENTS:
    display(HTML(tables.contexts_html(sae, activations, latent, gathered.top_rows[latent][:TOP_K], decode)))
    by_strength = gathered.stratum_rows[latent, :, 0].flip(0)  # one from each fifth, the strongest first
    display(HTML(tables.contexts_html(sae, activations, latent, by_strength, decode)))
    values = latent_values(sae, activations, torch.full_like(sample, latent), sample)
    display(figures.activation_histogram(values, latent=latent))

# %% [markdown]
# ## From a token, or a text, to latents
#
# The other direction: which latents have a given token among their strongest? And which fire on a given sentence, here
# relative to the most that each ever does?

# %%
TOKEN = strongest_tokens(LATENTS[0])[0] if strongest_tokens(LATENTS[0]) else " the"
hits = latents_on_token(gathered, activations, subject.model.tokenizer(TOKEN).input_ids)
print(f"{len(hits)} latents have {TOKEN!r} among their strongest tokens: {[hit.latent for hit in hits[:20]]}")

if TEXT is None:
    (piece,) = contexts(activations, [activations.n_rows // 2], 8)
    TEXT = decode(piece.tokens)
firing = fires_on(subject, TEXT, k=6, relative_to=gathered)
words = token_strings(decode, firing.tokens)
for latent, position in zip(firing.latents, firing.position, strict=True):
    marked = highlight_html(words, firing.feature_acts[:, latent].tolist(), position)
    elsewhere = " ".join(repr(token) for token in list(dict.fromkeys(strongest_tokens(latent)))[:4])
    display(HTML(f"<b>{latent}</b> {marked} (strongest at {html.escape(elsewhere)})"))

# %% [markdown]
# ## Which latents belong together
#
# The direction that a latent writes is its decoder row. Directions closer than random ones are neighbours in meaning,
# or one meaning split over several latents; over 0.9 they are nearly copies. On the right, those of the most alike
# pairs. Neighbours by direction and those that fire together are two different things: a latent for names and one for
# the verb that follows have nothing in common but the text.

# %%
figures.decoder_similarity(sae)

# %%
nearest = nearest_latents(sae, k=3)
rows = []
for latent in LATENTS:
    near = zip(nearest.latent[latent].tolist(), nearest.cosine[latent].tolist(), strict=True)
    partners = zip(gathered.partners.latent[latent].tolist(), gathered.partners.jaccard[latent].tolist(), strict=True)
    rows.append(
        {
            "latent": latent,
            "nearest directions": ", ".join(f"{other} ({cosine:.2f})" for other, cosine in near),
            "fire together (share of tokens with either)": ", ".join(
                f"{other} ({100 * share:.0f} %)" for other, share in list(partners)[:3] if other >= 0
            ),
        }
    )
display(HTML(tables.table_html(rows)))

# %%
for i, j, cosine in top_decoder_pairs(sae, top_k=3):
    display(HTML(f"<b>{i} and {j}, cosine {cosine:.2f}</b>"))
    for latent in (i, j):
        display(HTML(tables.contexts_html(sae, activations, latent, gathered.top_rows[latent][:3], decode)))

# %% [markdown]
# All directions at once, near ones near each other as far as a plane allows. Groups are worth a look; distances between
# groups mean nothing.

# %%
map_figure(decoder_map(sae).numpy(), gathered.density.numpy())

# %% [markdown]
# ## What to conclude
#
# A description that comes from strong contexts is a guess. Whether the model *uses* a latent is another question:
# `ablation.ipynb` removes latents and looks at the predictions. Where the concepts behind the text are known,
# `concepts.ipynb` puts a number on the guess.
