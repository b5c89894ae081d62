"""What a file of any format says: its tensors under our names, and the settings that change what they compute.

`reference_encode` and `reference_decode` are the definition that everything else is held to, in float64:

    u     = normalised(scale * x)                  (normalize: none, sqrt_d, layer_norm)
    pre   = (u - b_dec) @ W_enc + b_enc            (without b_dec where apply_b_dec_to_input is off)
    f     = standard   ReLU(pre)
            jumprelu   ReLU(pre) where pre > threshold
            topk       ReLU of the k largest entries of pre (topk_relu off: of those, negative ones stay too)
            gated      ReLU(v * exp(r_mag) + b_mag) where v + b_gate > 0, v = (u - b_dec) @ W_enc
    x_hat = undone(f @ W_dec + b_dec) / scale      (a transcoder undoes nothing; with W_skip it adds x @ W_skip^T)

With rescale_acts_by_decoder_norm (SAELens) topk multiplies pre by n = |W_dec row| before it chooses; f / n is decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import MIN_DECODER_NORM

Normalize = Literal["none", "sqrt_d", "layer_norm"]
NORMALIZE: tuple[Normalize, ...] = ("none", "sqrt_d", "layer_norm")
# SAELens and OpenAI's sparse_autoencoder: what is added to the standard deviation.
LAYER_NORM_EPS = 1e-5
# Columns of a weight matrix that are turned into float64 at once: an SAE of 5 GB should not need 15.
BLOCK = 8192

_OFFSETS = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


@dataclass(frozen=True)
class Loaded:
    """An SAE as a file defines it. Tensors are float32 on the CPU: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`,
    `b_dec [d_out]` and, `[d_sae]` each, what the architecture has: `b_enc`; `threshold`; `b_gate b_mag r_mag`.

    Attributes:
        architecture: standard, topk, jumprelu or gated: the form in which trained SAEs are applied.
        options: `k` of topk.
        apply_b_dec_to_input: whether `b_dec` is subtracted before encoding.
        normalize: what is done to each input vector: nothing, to norm sqrt(d_in), or layer norm without weights.
        scale: a constant that inputs are multiplied by, and reconstructions divided by.
        topk_relu: whether topk drops negative entries.
        rescale_acts_by_decoder_norm: topk only, as SAELens defines it.
        transcoder: whether it reconstructs another activation than its input; may hold `W_skip [d_out, d_in]`.
        metadata: what the file says of its origin: hook_name, model_name, processing, prepend_bos, ...
        notes: in words, what was assumed while reading.
        extras: what lies beside the SAE and changes nothing that it computes: `sparsity [d_sae]`, the logarithm (base
            10) of how often each latent fired in training.
    """

    architecture: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    apply_b_dec_to_input: bool = True
    normalize: Normalize = "none"
    scale: float = 1.0
    topk_relu: bool = True
    rescale_acts_by_decoder_norm: bool = False
    transcoder: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return self.tensors["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        return self.tensors["W_enc"].shape[1]

    @property
    def d_out(self) -> int:
        return self.tensors["W_dec"].shape[1]


@dataclass(frozen=True)
class Format:
    """One way of laying out an SAE in files.

    Attributes:
        name: what `--to` and `--from` call it.
        title: whose format it is, in words.
        marks: what its files look like, in words.
        sniff: whether a path looks like it, from names, first bytes and JSON keys alone; never raises for odd files.
        read: the SAE in the files at a path.
        write: an SAE into a new folder or file; raises `MechintError` for what it cannot hold.
        holds: None if the format can hold exactly this SAE, else why not, in a phrase.
        file_name: the usual name of its one file; empty where it is a folder.
        suffixes: of a destination that is meant as a file, beside that of `file_name`.
    """

    name: str
    title: str
    marks: str
    sniff: Callable[[Path], bool]
    read: Callable[[Path], Loaded] | None
    write: Callable[[Loaded, Path], None] | None
    holds: Callable[[Loaded], str | None]
    file_name: str = ""
    suffixes: tuple[str, ...] = ()

    def is_file(self, path: Path) -> bool:
        """Whether a destination is meant as the one file of this format, not as a folder."""
        return path.suffix in (*self.suffixes, *([Path(self.file_name).suffix] if self.file_name else []))


# name -> format; filled by mechint.formats, from every module of the package that defines FORMAT
FORMATS: dict[str, Format] = {}


def checked(loaded: Loaded, source: str | Path) -> Loaded:
    """`loaded` with its tensors as contiguous float32, if they and the settings fit each other; every reader ends here.

    Raises:
        MechintError: a tensor that is missing, one too many, of the wrong shape or not finite; an unusable `k`.
    """
    given = loaded.tensors
    if odd := [name for name, value in given.items() if not isinstance(value, Tensor)]:
        raise MechintError(f"{source}: {odd[0]} is no tensor")
    names = expected_shapes(loaded, source)
    missing, extra = names.keys() - given.keys(), given.keys() - names.keys()
    if missing or extra:
        parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        parts += [f"has {', '.join(sorted(extra)[:8])} too"] if extra else []
        raise MechintError(f"{source}: {loaded.architecture} holds {', '.join(names)}; this one {' and '.join(parts)}")
    tensors = {}
    for name, shape in names.items():
        tensor = given[name]
        if tuple(tensor.shape) != shape:
            raise MechintError(f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise MechintError(f"{source}: {name} holds values that are not finite floating-point numbers")
        tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    if loaded.architecture == "topk":
        k = loaded.options.get("k")
        if (
            isinstance(k, bool)
            or not isinstance(k, (int, float))
            or not float(k).is_integer()
            or not 1 <= k <= loaded.d_sae
        ):
            raise MechintError(f"{source}: topk needs k, a whole number from 1 to d_sae = {loaded.d_sae}; found {k!r}")
        loaded = replace(loaded, options={**loaded.options, "k": int(k)})
    if not (loaded.scale > 0 and loaded.scale < float("inf")):
        raise MechintError(f"{source}: inputs are scaled by {loaded.scale!r}, expected a number above 0")
    if loaded.transcoder and (loaded.apply_b_dec_to_input or loaded.normalize != "none" or loaded.scale != 1.0):
        raise MechintError(f"{source}: a transcoder whose input is changed before encoding has no definition here")
    if loaded.normalize not in NORMALIZE:
        raise MechintError(f"{source}: unknown input normalisation {loaded.normalize!r}")
    return replace(loaded, tensors=tensors)


def expected_shapes(loaded: Loaded, source: str | Path = "the SAE") -> dict[str, tuple[int, ...]]:
    """Tensor names of this SAE's architecture and their shapes, from those of its weights."""
    for name in ("W_enc", "W_dec"):
        if name not in loaded.tensors or loaded.tensors[name].ndim != 2:
            found = ", ".join(f"{key} {list(value.shape)}" for key, value in list(loaded.tensors.items())[:8])
            raise MechintError(f"{source} is not an SAE: {name} should be a matrix; found {found or 'nothing'}")
    d_in, d_sae = loaded.tensors["W_enc"].shape
    d_out = loaded.tensors["W_dec"].shape[1] if loaded.transcoder else d_in
    if min(d_in, d_sae, d_out) < 1:
        raise MechintError(f"{source}: an SAE needs d_in and d_sae of at least 1, found {d_in} and {d_sae}")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(_OFFSETS.get(loaded.architecture, ("b_enc",)), (d_sae,))
    if loaded.transcoder and "W_skip" in loaded.tensors:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


# --- the definition ---------------------------------------------------------------------------------------------------


def reference_encode(loaded: Loaded, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """`feature_acts` in float64, as the SAE's origin defines them."""
    return activate(loaded, reference_pre(loaded, x))


def reference_pre(loaded: Loaded, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """What the activation function is applied to, in float64; of a gated SAE the gate's."""
    u = _normalised(loaded, x.double() * loaded.scale)[0]
    if loaded.apply_b_dec_to_input:
        u = u - loaded.tensors["b_dec"].double()
    pre = times(u, loaded.tensors["W_enc"])
    pre = pre + loaded.tensors["b_gate" if loaded.architecture == "gated" else "b_enc"].double()
    return pre * decoder_norms(loaded) if loaded.rescale_acts_by_decoder_norm else pre


def activate(loaded: Loaded, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
    """`feature_acts` from `reference_pre`."""
    if loaded.architecture == "standard":
        return pre.relu()
    if loaded.architecture == "jumprelu":
        return pre.relu() * (pre > loaded.tensors["threshold"].double())
    if loaded.architecture == "topk":
        top = pre.topk(loaded.options["k"], dim=1)
        kept = top.values.relu() if loaded.topk_relu else top.values
        return torch.zeros_like(pre).scatter_(1, top.indices, kept)
    if loaded.architecture == "gated":
        b_gate, b_mag, r_mag = (loaded.tensors[name].double() for name in ("b_gate", "b_mag", "r_mag"))
        return (pre > 0) * ((pre - b_gate) * r_mag.exp() + b_mag).relu()
    raise AssertionError(f"no definition of {loaded.architecture}")


def reference_decode(
    loaded: Loaded, feature_acts: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch d_out"]:
    """Reconstruction in float64. `x` is the input: what was done to it is undone, and a skip connection reads it."""
    f = feature_acts.double()
    if loaded.rescale_acts_by_decoder_norm:
        f = f / decoder_norms(loaded)
    out = loaded.tensors["b_dec"].double().expand(len(f), -1)
    W_dec = loaded.tensors["W_dec"]
    for start in range(0, len(W_dec), BLOCK):
        out = out + f[:, start : start + BLOCK] @ W_dec[start : start + BLOCK].double()
    if loaded.transcoder:
        return out + x.double() @ loaded.tensors["W_skip"].double().T if "W_skip" in loaded.tensors else out
    _, factor, shift = _normalised(loaded, x.double() * loaded.scale)
    return (out * factor + shift) / loaded.scale


def _normalised(loaded: Loaded, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, factor, shift)`: the input as encoded, and what maps a reconstruction of u back."""
    one, zero = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(len(x), 1, dtype=x.dtype)
    if loaded.normalize == "sqrt_d":
        factor = x.norm(dim=1, keepdim=True).clamp_min(1e-12) / loaded.d_in**0.5
        return x / factor, factor, zero
    if loaded.normalize == "layer_norm":
        mean = x.mean(dim=1, keepdim=True)
        std = (x - mean).std(dim=1, keepdim=True)
        return (x - mean) / (std + LAYER_NORM_EPS), std, mean
    return x, one, zero


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` in float64, a block of columns at a time."""
    return torch.cat([x @ block.double() for block in matrix.split(BLOCK, dim=1)], dim=1)


def decoder_norms(loaded: Loaded) -> Float[Tensor, " d_sae"]:
    return loaded.tensors["W_dec"].double().norm(dim=1).clamp_min(MIN_DECODER_NORM)
