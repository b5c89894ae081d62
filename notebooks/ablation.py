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
# # What does the model lose without a latent?
#
# A latent is removed by taking its part out of the residual stream, `x - f_i(x) * W_dec[i]`, and letting the model run
# on. The effect is KL(clean || removed) between the predictions of the next token, in nats: 0 is no effect, 0.1 is
# visible, 1 is another prediction.

# %%
RUN = None  # a run directory such as "runs/tales-8x"; None: the newest finished one, one with ranking.csv first
TEXTS = None  # a list of texts; None: some of those that the run held out
LATENTS = None  # such as [12, 345]; None: the first of the ranking
N_TEXTS = 10  # texts to look at closely

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML, display

from mechint.ablation import latent_text_kl, rank_run, single_feature_ablation_hook
from mechint.ablation.interventions import continuation, intervene, mean_of, remove, resample_of, scale
from mechint.analysis import highlight_html
from mechint.config import RankConfig
from mechint.data import open_activations, split_indices
from mechint.eval import texts_from_rows, texts_from_tokens
from mechint.report import figures, tables
from mechint.report.files import attribution_figure
from mechint.runs import Run, latest_run
from mechint.inside import open_inside

run = latest_run(prefer="ranking.csv") if RUN is None else Run(RUN)
subject = open_inside(run.path)
sae, model, hook_name = subject.sae, subject.model, subject.hook_name
decode = model.tokenizer.decode
if TEXTS is None:
    activations = open_activations(run.activations_path())
    config = run.config
    _, held_out = split_indices(activations, config.val_fraction, config.seed, by=config.split_by)
    texts = texts_from_rows(activations, held_out)
    texts = texts[:: max(1, len(texts) // N_TEXTS)][:N_TEXTS]
    TEXTS = [decode(text.tokens, skip_special_tokens=True) for text in texts]
else:
    keep_bos = subject.first_seen() == 0
    texts = texts_from_tokens(subject.tokenize(TEXTS[:N_TEXTS]), prepend_bos=subject.prepend_bos, keep_bos=keep_bos)
print(run, f"{hook_name} of {model.name}", f"{sae.d_sae:,} latents, {len(texts)} texts", sep="\n")

# %% [markdown]
# ## Every latent, ranked
#
# To remove every latent from every text takes as many runs of the model as there are pairs. An estimate for all of them
# comes out of a few backward passes; the first of that ranking and a random sample are then really removed. The figure
# says how far to trust the estimate: along the diagonal it orders latents well, and a cloud without direction would
# mean that only the measured values count. The largest effects lie above the diagonal: the estimate follows a small
# change, and taking a strong latent out is not one. (`mechint rank` does this and keeps the result in the run.)

# %%
saved = run.path / "ranking.csv"
if not saved.is_file():
    saved = Path(tempfile.mkdtemp(prefix="mechint-ranking-")) / "ranking.csv"
    rank_run(RankConfig(run_dir=run.path, output=saved, top=30, control=30, exact_texts=10), progress=False)
ranked = figures.read_table(saved)
measured = [row for row in ranked if row["exact_kl"] and float(row["exact_kl"]) > 0 and float(row["attribution"]) > 0]
attribution_figure(
    np.array([float(row["attribution"]) for row in measured]),
    np.array([float(row["exact_kl"]) for row in measured]),
    np.array([row["sample"] == "control" for row in measured]),
)

# %%
top = sorted(measured, key=lambda row: -float(row["exact_kl"]))[:8]
columns = {"latent": "feature_idx", "rank": "rank", "estimate": "attribution", "measured KL": "exact_kl"}
columns |= {"change of the cross-entropy": "exact_ce_change", "positions where it fires": "n_active"}
display(HTML(tables.table_html([{name: f"{float(row[key]):.4g}" for name, key in columns.items()} for row in top])))
if LATENTS is None:
    LATENTS = [int(row["feature_idx"]) for row in top[:3]]

# %% [markdown]
# ## Position by position
#
# One text for each latent, the one where it matters most. Top: where the latent fires. Middle: how far each prediction
# moves when it is removed. An effect at a token where the latent is silent reached it through attention: the latent
# wrote something there that is read later. Bottom: the log-probability of the token that really comes next, before and
# after. If it falls, the model needed the latent here; if it rises, the latent misled it.


# %%
def without(latents, tokens):
    """Logits of one text [pos, d_vocab], with the latents removed."""
    return model.logits_with(tokens[None], hook_name, single_feature_ablation_hook(sae, latents))[0]


effects = {}
for latent in LATENTS:
    found = [latent_text_kl(sae, model, hook_name, text, latent) for text in TEXTS[:N_TEXTS]]
    effect = max(found, key=lambda effect: effect["max_kl"])
    tokens = torch.tensor(effect["token_ids"])
    before, after = model.logits(tokens[None])[0], without([latent], tokens)
    effects[latent] = (effect, before, after)
    curves = tables.next_log_probs(before, tokens), tables.next_log_probs(after, tokens)
    acts = effect["feature_acts"]
    display(
        figures.kl_by_position(effect["tokens"], effect["kl"], latent=latent, activation=acts, next_log_prob=curves)
    )

# %% [markdown]
# ## What is predicted instead
#
# At the position with the largest KL: the likeliest next tokens before and after. What the latent was for is what
# loses probability; what gains is what the rest of the model says without it.

# %%
for latent, (effect, before, after) in effects.items():
    position = effect["max_kl_token_position"]
    upto = effect["tokens"][: position + 1]
    display(HTML(f"<b>Latent {latent}</b>: the next token after"))
    display(HTML(highlight_html(upto, effect["feature_acts"][: position + 1], position)))
    display(HTML(tables.predictions_html(tables.prediction_changes(before[position], after[position]), decode)))

# %% [markdown]
# ## Removed, or something else in its place?
#
# Zero is not always the neutral value: a latent that is nearly always on, taken to zero, is a state that the model has
# never seen, and part of the effect is surprise. Beside it stand the latent's mean activation, its activation at random
# other places (which keeps how often it is on but not where), and twice what it was. If the mean does much less than
# zero, the latent acts as a constant more than as a signal.

# %%
rows = []
for latent in LATENTS:
    edits = {
        "removed": remove([latent]),
        "mean": mean_of(sae, model, hook_name, texts, [latent]),
        "from elsewhere": resample_of(sae, model, hook_name, texts, [latent]),
        "doubled": scale([latent], 2.0),
    }
    row = {"mean KL, nats": f"latent {latent}"}
    for name, edit in edits.items():
        row[name] = f"{torch.cat([one.kl for one in intervene(sae, model, hook_name, texts, edit)]).mean():.4f}"
    rows.append(row)
display(HTML(tables.table_html(rows)))

# %% [markdown]
# ## How the text goes on
#
# The first half of a text, continued with the likeliest token each time: as it is, and with the latents removed all
# along.

# %%
for latent, (effect, _, _) in effects.items():
    prompt = effect["token_ids"][: max(effect["max_kl_token_position"] + 1, 2)]
    keep_bos = subject.first_seen() == 0
    (text,) = texts_from_tokens([prompt], prepend_bos=subject.prepend_bos, keep_bos=keep_bos)
    before, after = continuation(sae, model, hook_name, text, remove([latent]), max_new_tokens=12)
    print(f"latent {latent}: ...{decode(prompt[-12:])!r}")
    print(f"   as it is  {decode(before)!r}")
    print(f"   without   {decode(after)!r}")

# %% [markdown]
# ## Together and one by one
#
# If removing several latents at once does more than the sum of the single effects, they stand in for one another, and
# ranking them one by one understates each.

# %%
rows = []
each = [intervene(sae, model, hook_name, texts, remove([latent])) for latent in LATENTS]
together = intervene(sae, model, hook_name, texts, remove(LATENTS))
for i in range(len(texts)):
    rows.append(
        {
            "text": decode(texts[i].tokens, skip_special_tokens=True)[:60],
            "sum of single effects": f"{sum(float(found[i].kl.mean()) for found in each):.4f}",
            "together": f"{float(together[i].kl.mean()):.4f}",
        }
    )
display(HTML(tables.table_html(rows)))
