"""The model card and the training figure of pythia-tiny, written by the recipe from what it measured."""

import json
from collections.abc import Sequence
from pathlib import Path

# Each starts a fact or a form that the tales teach; the card shows the greedy continuation.
PROMPTS: tuple[str, ...] = (
    "The capital of France is",
    "The capital of Japan is",
    "From Rome it is far to Hamburg in",
    "People in Egypt speak",
    "If today is Monday, tomorrow will be",
    "March comes after",
    "Three plus four is",
    "The opposite of hot is",
    "A ripe lemon is",
    "A puppy is a young",
    "A baker works in a",
    "Anna was a clever doctor who lived in Oslo. So",
    "Paul has a black cat called Milo. The cat was called",
    "The queens near the horses",
    "The queen near the horses",
    'Paul and Mary were friends who lived in Rome. "Where do you live?" asked Mary. "',
)


def write(
    folder: Path,
    figures: dict[str, object],
    curve: Sequence[dict[str, int | float]],
    completions: Sequence[tuple[str, str]],
) -> None:
    """Write README.md, figures.json and training_curve.png into ``folder``."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "README.md").write_text(_text(figures, completions))
    _figure(folder / "training_curve.png", figures, curve)


def _text(figures: dict[str, object], completions: Sequence[tuple[str, str]]) -> str:
    known = figures["right_answers"]
    assert isinstance(known, dict)
    facts = "\n".join(f"| {kind} | {share:.0%} |" for kind, share in known.items())
    rows = "\n".join(f"| {prompt} | **{text.strip()}** |" for prompt, text in completions)
    return f"""---
library_name: transformers
license: mit
pipeline_tag: text-generation
---
# pythia-tiny

A GPT-NeoX with Pythia-70M's six layers at width 128 ({figures["parameters"]:,} parameters, {figures["vocab_size"]:,}
tokens, context 256), trained from nothing on the `builtin/tales` stream of mechint. It exists so that every part of the
project runs offline, on text whose concepts are known word by word.

## Recipe

`python scripts/train_builtin.py --output DIR` made every file in this folder: {figures["steps"]:,} steps of
{figures["batch_size"]} tales, {figures["tokens_trained"]:,} tokens, {figures["seconds"]:.0f} seconds on
{figures["threads"]} CPU threads; AdamW, peak rate {figures["lr"]}, linear warmup, cosine decay, seed {figures["seed"]};
{"bf16" if figures["bf16_compute"] else "float32"} products with float32 master weights. BOS (id 0) stands before every
text and after its end. The weights are stored in fp16 and meant to be loaded as float32. The number of
steps may have been set by a limit in minutes, which depends on the machine, so a rerun gives a similar model, not the
same bits.

## Data

Generated English of templates and facts, source sha256 `{figures["tales_source_sha256"]}`. The train and held-out
streams share no sentence.

## Results

Mean cross-entropy in nats a token on {figures["heldout_tales"]:,} held-out tales (seed {figures["heldout_seed"]}):

| model | cross-entropy |
| --- | --- |
| unigram counts | {figures["unigram_ce"]} |
| bigram counts | {figures["bigram_ce"]} |
| **pythia-tiny** | **{figures["heldout_ce"]}** |

![training curve](training_curve.png)

Greedy continuations after BOS:

| prompt | continuation |
| --- | --- |
{rows}

Share of right greedy answers, by what is asked (`mechint/builtin/probes.py`):

| asked | right |
| --- | --- |
{facts}

## Limits

What the table above shows as weak it does not know; no test or demonstration should rest on it.

A word that opens a text is another token than the same word after a space, and is seen less often: prompts that begin
with a name are answered less well than the same words in mid-text.

It knows the tales and nothing else: a word outside them is read byte by byte by embeddings that were never trained.
Its facts are those of the generator. It is an instrument for testing interpretability tools, not a model to use.
"""


def _figure(path: Path, figures: dict[str, object], curve: Sequence[dict[str, int | float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] / 1e6 for row in curve]
    axes.plot(tokens, [row["train_loss"] for row in curve], label="train", color="tab:blue")
    axes.plot(tokens, [row["heldout_ce"] for row in curve], label="held-out (128 tales)", color="tab:orange")
    for name, style in (("unigram_ce", ":"), ("bigram_ce", "--")):
        axes.axhline(float(str(figures[name])), label=name.removesuffix("_ce"), linestyle=style, color="grey")
    axes.set(xlabel="million tokens", ylabel="cross-entropy (nats a token)", title="pythia-tiny on tales")
    axes.legend()
    figure.savefig(path, dpi=110)
