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
# Training curves, how often latents fire, the texts they fire on, and which of them are nearly the same.
# With `RUN = None` this reads the newest finished run; `make pipeline` makes one on the built-in world in minutes.

# %%
RUN = None  # a run directory such as "runs/tales-8x"; None: the newest finished one
LATENTS = None  # such as [12, 345]; None: chosen below
N_ROWS = 100_000  # tokens to look at
TOP_K = 8  # contexts shown for each latent

# %%
# %matplotlib inline
import torch
from IPython.display import HTML, display

from mechint.analysis import (
    collect_top_activations,
    feature_consistency_score,
    search_token,
    token_strings,
    top_decoder_pairs,
)
from mechint.data import open_activations
from mechint.eval import measure_activity, read_metrics_csv
from mechint.models import load_model
from mechint.report import figures, tables
from mechint.runs import Run, latest_run
from mechint.sae import load_sae

run = latest_run() if RUN is None else Run(RUN)
sae = load_sae(run.checkpoint_path)
activations = open_activations(run.activations_path())
decode = load_model(run.config.model_name).tokenizer.decode
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

# %%
n_rows = min(N_ROWS, activations.n_rows)
x = activations.rows(torch.arange(n_rows))
fire_counts = measure_activity(sae, x).fire_counts
figures.activation_density_histogram(fire_counts, n_rows)

# %% [markdown]
# ## What they fire on
#
# For each latent, the tokens where it is strongest. `consistency` is the share of the commonest token among them: at 1
# the latent detects one token, lower values are words of a kind, or a role in the sentence that no single word has.

# %%
values, rows = collect_top_activations(sae, x, k=max(TOP_K, 20))
top_tokens = {
    latent: token_strings(decode, activations.tokens[rows[latent][values[latent] > 0]].tolist())
    for latent in range(sae.d_sae)
}
if LATENTS is None:
    # Those that fire on different tokens, strongest first: a kind of word says more than a word.
    kinds = [i for i, tokens in top_tokens.items() if len(tokens) >= 20 and feature_consistency_score(tokens) <= 0.5]
    LATENTS = sorted(kinds or range(sae.d_sae), key=lambda i: -float(values[i, 0]))[:6]

table = [
    {
        "latent": i,
        "fires on": f"{100 * int(fire_counts[i]) / n_rows:.2f} %",
        "strongest": f"{float(values[i, 0]):.2f}",
        "consistency": f"{feature_consistency_score(top_tokens[i]):.2f}",
        "top tokens": " ".join(repr(token) for token in dict.fromkeys(top_tokens[i])),
    }
    for i in LATENTS
]
display(HTML(tables.table_html(table)))

# %% [markdown]
# Each line is a text around one of the strongest tokens (bold); the ground is as strong as the latent is there. Read
# down the column: what do the bold tokens, and what stands before them, have in common? The histogram shows the rest of
# the range. If only the strongest contexts fit your description, the description is too narrow.

# %%
for latent in LATENTS:
    display(HTML(tables.contexts_html(sae, activations, latent, rows[latent][:TOP_K], decode)))
    with torch.inference_mode():
        display(figures.activation_histogram(sae.encode(x)[:, latent], latent=latent))

# %% [markdown]
# ## From a token to its latents
#
# The other direction: which latents have a given token among their strongest?

# %%
TOKEN = top_tokens[LATENTS[0]][0] if top_tokens[LATENTS[0]] else " the"
found = search_token(top_tokens, TOKEN)
print(f"{len(found)} latents have {TOKEN!r} among their strongest tokens: {found[:20]}")

# %% [markdown]
# ## Which latents are nearly the same
#
# The direction that a latent writes is its decoder row. Directions closer than random ones are neighbours in meaning,
# or one meaning split over several latents; over 0.9 they are nearly copies. On the right, those of the most alike
# pairs.

# %%
figures.decoder_similarity(sae)

# %%
for i, j, cosine in top_decoder_pairs(sae, top_k=3):
    display(HTML(f"<b>{i} and {j}, cosine {cosine:.2f}</b>"))
    for latent in (i, j):
        display(HTML(tables.contexts_html(sae, activations, latent, rows[latent][:3], decode)))

# %% [markdown]
# ## What to conclude
#
# A description that comes from strong contexts is a guess. Whether the model *uses* a latent is another question:
# `ablation.ipynb` removes latents and looks at the predictions.
