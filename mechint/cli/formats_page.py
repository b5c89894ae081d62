"""docs/formats.md, made from the registry of formats: `python -m mechint.cli.formats_page docs/formats.md`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechint.cli.flags import command
from mechint.provenance import write_text

HEAD = """# Formats

<!-- written by `python -m mechint.cli.formats_page docs/formats.md` -->

    mechint identify PATH                      what an SAE's files are
    mechint convert SRC DST --to saelens       another format, with a certificate beside the output
    python scripts/export_sae.py --run-dir runs/x --format saelens

| `--to`, `--from` | format | read | write | how its files are told |
| --- | --- | --- | --- | --- |
"""

TAIL = """
## One door

`SAE.load(PATH)` opens all of them, and every command does through it: what `mechint identify` knows, `mechint eval`,
`rank`, `ablate`, `concepts`, `steer`, `report` and `compare` take as it is; nothing has to be converted first. Beside
paths it takes names: of a registry (`mechint list-saes`), of a release and its SAE (`release:sae_id`), and of the Hub
(`user/repo`, `user/repo:folder@revision`).

- A folder with several SAEs is an error that lists them; so is one that looks like several formats (`--from` chooses).
- Keys that contradict each other (`"architecture": "batch_topk"` beside `"activation_fn_str": "topk"`, two values of
  `k`, a hook at the top and another in `metadata`) are an error that names both. None of them is believed.
- How activations were processed, where a file does not say it, is what its format's own tools did with the model: raw
  for SAELens (centred where `model_from_pretrained_kwargs` has `center_writing_weights`), sparsify,
  dictionary_learning, saev, OpenAI, miStudio and Gemma Scope; not known for the mech platform. Only checkpoints of the
  original pipeline, which recorded nothing, are taken as it collected: centred, with BOS.

## What each can hold

Yes: as it is. Folded: after an exact fold of the weights (below). No: refused. Each cell is the answer of the format
itself for a small random SAE of that kind.

{kinds}

## Folds

Formats disagree on what is done to the input before encoding. What can be said with weights is moved into them, in
float64, rounded once:

| what | fold |
| --- | --- |
| `b_dec` is not subtracted from the input | `b_enc += b_dec @ W_enc` (gated: `b_gate`, `b_mag` by `exp(r_mag)`) |
| `b_dec` is subtracted, and the target does not do that | the reverse |
| inputs are multiplied by a constant s | `W_enc *= s`, `W_dec /= s`, `b_dec /= s` |
| top-k chooses by activation times decoder norm n | `W_enc *= n`, `b_enc *= n`, `W_dec /= n` |
| thresholds below 0 | 0: the ReLU drops what lies between |
| ReLU where a format has only JumpReLU, and back | thresholds of 0 |

What no weights can say is refused, with the reason: top-k without k, top-k whose ReLU the target lacks or adds, inputs
normalised one by one where the target does not do it, transcoders where it has none, an input scale whose value is
not in the files.

## Top-k

The tools disagree about what stays where fewer than k pre-activations are positive:

| tool | its top-k | a topk of ours in it |
| --- | --- | --- |
| ours, SAELens, sparsify, dictionary_learning | ReLU after (or before) it: negative entries are dropped | as it is |
| saev, mech platform | no ReLU: negative entries stay and are decoded | `--pad-topk` |
| OpenAI | ReLU by default (`postact_fn`), on layer-normalised inputs | no: the library normalises for every TopK |
| miStudio | ReLU; k is with the training, not in the checkpoint | no: it would apply ReLU alone |
| Gemma Scope | none | no |

`--pad-topk` adds k latents of zeros at the end (d_sae grows by k, the others keep their numbers). Their pre-activation
is always 0, so no negative entry is ever among the k largest: with and without ReLU is the same function, and the
certificate compares it with the unpadded one. Without the flag the conversion is refused.

The other way, saev's and the mech platform's SAEs open here as they are (`TopKSAE(relu=False)`): codes may be negative,
and count as active. Such an SAE is applied, not trained; `checkpoint.pt` holds it, SAELens's layout cannot.

## What else differs

- miStudio's thresholds are float32 logarithms, which cannot say every float32 threshold. The nearest are written, and
  where one does not give the threshold back, the exact ones into `thresholds.safetensors`, which only this package
  reads. The certificate says how many differ in miStudio, and by how much.
- miStudio's exports for the community are read as SAELens before 6; k of a top-k is its
  `extra_metadata.top_k_sparsity`.
- Weights without `cfg.json` (`sae.safetensors` alone) are refused: whether `b_dec` is subtracted is not in them.
- saev files without `schema`, and of schema 1, subtract `b_dec`, though saev itself no longer does when it loads them.
  Written is schema 5, whose BatchTopK has one threshold for all latents.
- dictionary_learning rescales an AutoEncoder to decoder rows of unit norm when it loads it. Where ours are not of unit
  norm, AutoEncoderNew is written, which it leaves alone.
- Gemma Scope's transcoders lie in files like those of its SAEs: the folder's name, in Scope 2 `config.json`, tells.
- SAELens's `sparsity.safetensors` goes along between SAELens's layouts. Other certificates say that it was left out.

## The certificate

`certificate.json` in the folder (or beside the file) holds the largest differences between both sides on probe
vectors. The output is read back by its own reader first, so keys, orientations and settings are tested too. Both
sides are computed in float64 from the float32 tensors. Probes are Gaussian vectors and mixtures of encoder directions
around `b_dec`, at 0.1 to 30 times the size at which the median latent begins to fire. Differences of codes are
relative to the largest code of the probe, those of reconstructions to its largest entry; allowed are 1e-6, and 1e-5
after a fold. A conversion that exceeds them is not kept. Codes whose latent rounding switches on or off (a
pre-activation within 1e-6 of its threshold) are counted instead (`at_border`). `weights_equal` says that no bit of a
shared tensor changed, `notes` what was assumed and what the output has no place for.

The certificate compares what this package takes the two formats to mean. That the other tools mean the same is tested
against the tools themselves, both ways, where a package index has them: SAELens 6.54.12 (its loaders of Gemma Scope
too), dictionary_learning 0.1.0, sparsify 1.3.3 (`tests/test_peer_formats*.py`, `make test-peers`). For the others
`tests/test_formats_*.py` has files made by hand, and what the tool computes written out.

## Untrusted files

Opened are safetensors, npz without pickle, JSON, and `.pt` with `weights_only=True`. What a path is, is found out from
names, first bytes and JSON keys; nothing is executed. Devices and pipes are not read; an archive that unpacks to a
multiple of itself, a tensor that claims more than is stored, a name that stands twice in settings are refused. Broken
files are one line of error.

## Adding a format

One file in `mechint/formats/`: [extend.md](extend.md#adding-a-format) has an example that a test runs.
"""

# What the table of kinds asks each format about.
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": 2},
    "jumprelu": {},
    "jumprelu with one threshold": {},
    "gated": {},
    "b_dec not subtracted": {"apply_b_dec_to_input": False},
    "inputs to norm sqrt(d_in)": {"normalize_activations": "constant_norm_rescale"},
    "inputs layer-normed": {"normalize_activations": "layer_norm"},
    "constant input scale": {"input_scale": 2.0},
    "topk by decoder norm": {"k": 2, "rescale_acts_by_decoder_norm": True},
    "topk without ReLU": {"k": 2, "relu": False},
    "topk, inputs layer-normed": {"k": 2, "normalize_activations": "layer_norm"},
    "topk with k latents of zeros (`--pad-topk`)": {"k": 2},
    "transcoder": {"transcoder": True},
    "jumprelu transcoder": {"transcoder": True},
    "topk transcoder": {"k": 2, "transcoder": True},
    "skip transcoder": {"transcoder": True},
    "jumprelu skip transcoder": {"transcoder": True},
    "topk skip transcoder": {"k": 2, "transcoder": True},
}


def page() -> str:
    """The whole of docs/formats.md."""
    from mechint.formats import FORMATS

    rows = []
    for name, found in sorted(FORMATS.items()):
        can = ["yes" if side else "no" for side in (found.read, found.write)]
        rows.append(f"| `{name}` | {found.title} | {can[0]} | {can[1]} | {found.marks} |\n")
    return HEAD + "".join(rows) + TAIL.format(kinds=kinds_table())


def kinds_table() -> str:
    """Which format holds which kind of SAE, as the formats answer."""
    from mechint.errors import MechintError
    from mechint.formats import FORMATS
    from mechint.formats.convert import held_variant

    targets = [found for _, found in sorted(FORMATS.items()) if found.write]
    lines = ["| | " + " | ".join(f"`{found.name}`" for found in targets) + " |", "| --- " * (len(targets) + 1) + "|"]
    for kind in KINDS:
        cells = []
        for target in targets:
            try:
                folded = held_variant(example(kind), target)[1]
                cells.append("folded" if folded else "yes")
            except MechintError:
                cells.append("no")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def example(kind: str) -> Any:
    """A small SAE of a kind of `KINDS`, with nothing zero."""
    import torch

    from mechint.formats.folds import pad_topk
    from mechint.sae import SAE

    generator = torch.Generator().manual_seed(0)
    architecture = next((name for name in ("topk", "jumprelu", "gated") if name in kind), "standard")
    names = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_dec": (4,), **dict.fromkeys(names, (8,))}
    if "skip transcoder" in kind:
        shapes["W_skip"] = (4, 4)
    tensors = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}
    if "one threshold" in kind:
        tensors["threshold"] = torch.full((8,), 0.5)
    sae = SAE.from_tensors(architecture, tensors, kind, **KINDS[kind])
    return pad_topk(sae) if "zeros" in kind else sae


@command
def main(argv: Sequence[str]) -> int:
    path = Path(argv[0] if argv else "docs/formats.md")
    write_text(path, page())
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
