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
RUN = None  # a run directory such as "runs/tales-8x"; None: the newest finished one, one with ablation.csv first
TEXTS = None  # a list of texts; None: the texts that the run was ranked on, else a few of its own
LATENTS = None  # such as [12, 345]; None: the first of the ranking
N_TEXTS = 4  # texts for a new ranking, where the run has none

# %%
# %matplotlib inline
import torch
from IPython.display import HTML, display

from mechint.ablation import compute_text_kl, rank_features_by_ablation, single_feature_ablation_hook
from mechint.analysis import highlight_html
from mechint.data import iter_texts_from_path, open_activations
from mechint.eval import texts_from_rows
from mechint.models import load_model
from mechint.report import figures, tables
from mechint.runs import Run, latest_run
from mechint.sae import load_sae

run = latest_run() if RUN is None else Run(RUN)
sae = load_sae(run.checkpoint_path)
hook_name = run.config.hook_name
model = load_model(run.config.model_name, processing=sae.metadata["processing"], hook_name=hook_name)
decode = model.tokenizer.decode
if TEXTS is None and (run.path / "eval_texts.txt").is_file():
    TEXTS = iter_texts_from_path(run.path / "eval_texts.txt")
elif TEXTS is None:
    stored = texts_from_rows(open_activations(run.activations_path()), max_texts=N_TEXTS)
    TEXTS = [decode(text.tokens, skip_special_tokens=True) for text in stored]
print(run, f"{hook_name} of {model.name}", f"{sae.d_sae:,} latents, {len(TEXTS)} texts", sep="\n")

# %% [markdown]
# ## Every latent, ranked
#
# Mean KL over all positions of all texts. A latent that never fires on these texts has exactly no effect. Usually few
# latents carry most of the sum: the straighter the line, the more evenly the work is shared. Beside the first ones
# stands the token after which the prediction changed most.

# %%
saved = run.path / "ablation.csv"
ranked = figures.read_table(saved) if saved.is_file() else rank_features_by_ablation(sae, model, hook_name, TEXTS)
if LATENTS is None:
    LATENTS = [int(row["feature_idx"]) for row in ranked[:3]]
figures.ranking(ranked, names={int(row["feature_idx"]): row["max_kl_token"] for row in ranked})

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


by_latent = {int(row["feature_idx"]): row for row in ranked}
effects = {}
for latent in LATENTS:
    text = by_latent[latent]["max_kl_prompt"] or TEXTS[0]
    effect = compute_text_kl(sae, model, hook_name, text, latent)
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
# ## Together and one by one
#
# If removing several latents at once does more than the sum of the single effects, they stand in for one another, and
# ranking them one by one understates each.

# %%
rows = []
for text in TEXTS[:N_TEXTS]:
    single = [compute_text_kl(sae, model, hook_name, text, latent)["mean_kl"] for latent in LATENTS]
    together = compute_text_kl(sae, model, hook_name, text, LATENTS)["mean_kl"]
    rows.append({"text": text[:60], "sum of single effects": f"{sum(single):.4f}", "together": f"{together:.4f}"})
display(HTML(tables.table_html(rows)))
