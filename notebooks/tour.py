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
# # From text to a steered model
#
# A guided tour in a few minutes on one core, without a network: read texts, keep what a language model thinks while it
# reads them, split that into parts with a sparse autoencoder (SAE), ask what the parts mean and whether the model uses
# them, and push one of them to change what the model says.
#
# Everything happens in the world that ships with the package: a tiny language model that was trained on generated tales
# of a small vocabulary. Each step names the function and the command that does the same for a real model.

# %%
FOLDER = None  # where activations and the run go; None: a new temporary folder
N_TALES = 600  # texts to read
STEPS = 800  # training steps of the SAE

# %%
# %matplotlib inline
import contextlib
import html
import io
import tempfile
from pathlib import Path

import torch
from IPython.display import HTML, display

from mechint.ablation import rank_run
from mechint.analysis import contexts, load_or_gather, logit_effects, token_consistency, token_texts
from mechint.builtin import world
from mechint.builtin.tales import tale
from mechint.config import CollectConfig, EvalConfig, RankConfig, SAETrainConfig
from mechint.data import open_activations
from mechint.data.collect import collect
from mechint.eval import evaluate_checkpoint, read_metrics_csv
from mechint.inside import open_inside
from mechint.models import generate, load_model
from mechint.report import figures, tables
from mechint.runs import Run
from mechint.steering import (
    ablate_latent,
    add_direction,
    beside,
    direction_from_prompts,
    next_log_probs,
    prompt_activations,
    steer,
)
from mechint.train import train

folder = Path(tempfile.mkdtemp(prefix="mechint-tour-")) if FOLDER is None else Path(FOLDER)
print("everything is written into", folder)

# %% [markdown]
# ## 1. Text
#
# A tale, and what the generator knows of its first words. These labels are what no web text has: with them one can
# *measure* later whether a part of the model stands for "city" (`concepts.ipynb`). The SAE never sees them.

# %%
first = tale(0)
print(first.text, "\n")
words: dict[tuple[int, int], list[str]] = {}
for span in first.spans:
    words.setdefault((span.start, span.end), []).append(span.concept)
rows = [
    {"word": first.text[start:end], "labels": ", ".join(labels)}
    for (start, end), labels in sorted(words.items())
    if end - start < 20
]
display(HTML(tables.table_html(rows[:8])))

# %% [markdown]
# ## 2. A model that has read such texts
#
# `builtin/pythia-tiny` has the shape of Pythia-70M (six layers) at a quarter of its width. It predicts the next word,
# so it can go on with a text; `generate` takes the likeliest word each time.

# %%
model = load_model("builtin/pythia-tiny", device="cpu")
for prompt in ("The capital of France is", "Omar was a clever baker who lived in Oslo. So"):
    (tokens,) = model.tokenize([prompt], prepend_bos=True)
    new = generate(model, tokens, max_new_tokens=14)[0]
    print(f"{prompt} ...{model.tokenizer.decode(new)}")

# %% [markdown]
# ## 3. What the model holds while it reads
#
# Between its layers the model holds one vector a word, the *residual stream*; the next layers read nothing else. We
# store it at the hook `blocks.3.hook_resid_post`, behind the fourth of six layers: 128 numbers a word. (A rare word
# may be several *tokens*; then each has its own.) Command: `mechint collect`.

# %%
HOOK = "blocks.3.hook_resid_post"
store = folder / "activations" / "tales"
collect(
    CollectConfig(model=model.name, hook=HOOK, dataset="builtin/tales", num_texts=N_TALES, output=store),
    progress=False,
)
activations = open_activations(store)
print(activations)

# %% [markdown]
# ## 4. Split into parts
#
# Single numbers of these vectors mean little by themselves: the model has more things to say than dimensions, and is
# thought to write each as a direction. An SAE looks for such directions. It writes each vector as a sum of a few out of
# 1,024 (*latents*): its encoder says which of them are on and how strongly, its decoder row is the direction that each
# one writes. Training weighs two wishes against each other: the sum should equal the vector, and few latents should be
# on. (Here they are called *latents* rather than features: a feature is what one hopes that a latent stands for.)
# Command: `mechint train`.

# %%
settings = {
    "activations_path": str(store),
    "activation_dim": activations.d_in,
    "preset": "mechint",
    "expansion": 8,
    "epochs": STEPS,
    "batch_size": 1024,
    "runs_root": str(folder / "runs"),
    "run_name": "tour",
}
with contextlib.redirect_stdout(io.StringIO()):  # a line every few steps; the curves below show the same
    run = Run(train(SAETrainConfig.from_dict(settings), progress=False).root)
figures.training_curves(read_metrics_csv(run.metrics_path), d_sae=8 * activations.d_in)

# %% [markdown]
# ## 5. Is it any good?
#
# Three questions, on texts that training has not seen. How many latents are on (`l0`)? How much of the vectors'
# variance do they carry? And the one that counts: if the model goes on with the SAE's vectors in place of its own, how
# much worse does it predict (cross-entropy, nats a word)? Deleting the vector is the other end of the scale.
# Command: `mechint eval`.

# %%
result = evaluate_checkpoint(EvalConfig(run_dir=run.path, max_eval_texts=50))
rows = [
    {"question": "latents on, of 1,024", "answer": f"{result['l0']:.1f}"},
    {"question": "share of the variance", "answer": f"{100 * result['explained_variance']:.1f} %"},
    {"question": "cross-entropy of the model", "answer": f"{result['ce_clean']:.3f}"},
    {"question": "... with the SAE's vectors", "answer": f"{result['ce_sae']:.3f}"},
    {"question": "... with no vector", "answer": f"{result['ce_zero']:.3f}"},
    {"question": "recovered", "answer": f"{100 * result['ce_recovered_zero']:.1f} %"},
]
display(HTML(tables.table_html(rows)))

# %% [markdown]
# ## 6. What do the latents stand for?
#
# `load_or_gather` goes once over the stored vectors and keeps, for each latent, how often it is on and where it is
# strongest. Two ways to look at one: the texts on which it is on (what it *reads*), and the words whose probability its
# direction raises (what it *writes*). Here are three that are on for one word in a hundred or so, on words of a kind
# rather than on one word, and that raise a few words far above the others (a high kurtosis).

# %%
subject = open_inside(run.path, device="cpu")
sae = subject.sae
gathered = load_or_gather(run)
decode = model.tokenizer.decode
effects = logit_effects(sae, subject.model, k=6)


def look_at(latent: int, n: int = 6) -> None:
    promoted = " ".join(map(repr, token_texts(decode, effects.promoted[latent].tolist())))
    share = 100 * float(gathered.density[latent])
    display(HTML(f"<b>Latent {latent}</b>, on for {share:.1f} % of the words, raises {html.escape(promoted)}"))
    display(HTML(tables.contexts_html(sae, activations, latent, gathered.top_rows[latent][:n], decode)))


rare = (gathered.density > 0.003) & (gathered.density < 0.03)
of_a_kind = rare & (token_consistency(gathered, activations) <= 0.4)
for latent in torch.where(of_a_kind, effects.kurtosis, 0.0).argsort(descending=True)[:3].tolist():
    look_at(latent)

# %% [markdown]
# ## 7. Which of them does the model use?
#
# That a latent is on where we expect it does not show that the model needs it. So take its part out and see how far the
# predictions move: KL(as it was || without), in nats. Doing this for every latent on every text is slow; `rank_run`
# estimates it for all from a few backward passes, then really removes the first ones and a random sample, and tells how
# well the estimate orders those. Command: `mechint rank`.

# %%
ranking = rank_run(RankConfig(run_dir=run.path, top=20, control=30, exact_texts=10), progress=False)
rows = []
for row in ranking.rows[:8]:
    (where,) = contexts(activations, gathered.top_rows[row["feature_idx"]][:1], 3)
    rows.append(
        {
            "rank": row["rank"],
            "latent": row["feature_idx"],
            "estimated KL": f"{row['attribution']:.4f}",
            "measured KL": f"{row['exact_kl']:.4f}",
            "strongest after": "..." + decode(where.tokens[: where.center + 1]),
        }
    )
display(HTML(tables.table_html(rows)))
agreement = ranking.summary["spearman"]["control"]
print(f"rank correlation of estimate and measurement, over random latents: {agreement['value']:.2f}")

# %% [markdown]
# ## 8. A direction for "she"
#
# After "Anna was a clever doctor who lived in Oslo. So" the model says *she*, after "Omar ..." *he*: somewhere it keeps
# which. Two ways to find the direction: the difference between the mean vectors of such sentences about women and about
# men, which needs only examples; and the SAE, which was never told about either. Does it have a latent that is on after
# the ones and off after the others? Command for the first: `mechint extract-steering`.

# %%
known = {token.lstrip("Ġ") for token in model.tokenizer.get_vocab()}
people = {}
for kind, names in (("women", world.FEMALE_NAMES), ("men", world.MALE_NAMES)):
    jobs, countries = world.JOBS, world.COUNTRIES
    people[kind] = [
        f"{name} was a clever {jobs[i % len(jobs)].name} who lived in {countries[i % len(countries)].capital}. So"
        for i, name in enumerate([name for name in names if name in known][:40])
    ]
seen = {kind: texts[:30] for kind, texts in people.items()}
unseen = {kind: texts[30:] for kind, texts in people.items()}

direction = direction_from_prompts(model, HOOK, seen["women"], seen["men"], classes=("women", "men"))
print(f"quality {direction.info['extraction_quality']:.1f}, right on {direction.info['heldout_accuracy']:.0%} of the")
print("sentences that it was made without\n")

on = {}  # share of the sentences of each kind after which each latent is on
for kind, texts in seen.items():
    with torch.inference_mode():
        on[kind] = (sae.encode(prompt_activations(model, texts, HOOK).vectors) > 0).float().mean(0)
latent = int((on["women"] - on["men"]).abs().argmax())
written = sae.W_dec[latent].detach() / sae.W_dec[latent].detach().norm()
print(f"latent {latent} is on after {on['women'][latent]:.0%} of the women's and {on['men'][latent]:.0%} of the men's")
print(f"sentences; the cosine of what it writes with the direction is {float(written @ direction.vector):.2f}")
look_at(latent)

# %% [markdown]
# ## 9. Steer
#
# Now add the direction to the residual stream at every word and let the model go on; and, beside it, what the latent
# writes. The coefficient counts in the mean length of the vectors, so 0.5 is a strong push. Over each text stands how
# unlikely it is to the model when it is left alone (nats a word): a push that is too strong breaks the language before
# it changes more of the meaning. Command: `mechint steer`.

# %%
unit = direction.info["mean_activation_norm"]
if on["women"][latent] < on["men"][latent]:
    written = -written  # so that both point to the women, whichever the latent is for
edits = {
    f"{name}, {c:+}": add_direction(vector, c * unit)
    for c in (0.5, -0.5)
    for name, vector in (("direction", direction.vector), ("latent", written))
}
for kind, c in (("men", "+0.5"), ("women", "-0.5")):
    chosen = {name: edit for name, edit in edits.items() if c in name}
    (row,) = steer(model, unseen[kind][:1], HOOK, chosen, max_new_tokens=16)
    print(beside(row, width=116), end="\n\n")

# %% [markdown]
# One text is an anecdote. Over all the sentences that the direction was not made from: the probability that the next
# word is *she* or *he*, with each edit. The last one only removes the latent where it is on.

# %%
pronouns = [model.tokenizer(word).input_ids[0] for word in (" she", " he")]
rows = []
for name, edit in {"none": None, **edits, "latent removed": ablate_latent(sae, latent)}.items():
    row = {"edit": name}
    for kind, texts in unseen.items():
        chances = torch.stack([next_log_probs(model, text, HOOK, [edit])[0, pronouns] for text in texts]).exp().mean(0)
        row |= {f"{kind}: she": f"{chances[0]:.2f}", f"{kind}: he": f"{chances[1]:.2f}"}
    rows.append(row)
display(HTML(tables.table_html(rows)))

# %% [markdown]
# ## Where to go from here
#
# - `inspect-features.ipynb` and `ablation.ipynb` look closer at the latents of a run, `concepts.ipynb` scores them
#   against the labels of section 1; `mechint report RUN` puts all of it on one page.
# - For a real model, the same calls with `model="pythia-70m"` and `dataset="openwebtext"`: see the README.
# - Nothing here shows that a latent *is* a concept. It is on in some places and it moves some predictions; each of the
#   steps above is a way to find out that a story about it is wrong.
