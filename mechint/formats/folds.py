"""The same SAE in other tensors: what a setting says moves into the weights, or out of them.

A fold changes the tensors and a setting together so that `feature_acts` and reconstructions stay what they were, up to
one rounding to float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.base import Loaded, checked, decoder_norms, times
from mechint.sae.base import ARCHITECTURES, SAE
from mechint.sae.io import sae_from_tensors


def fold_scale(loaded: Loaded) -> Loaded:
    """`scale` 1: `W_enc *= s`, `W_dec /= s`, `b_dec /= s`. No change where the input is normalised anyway."""
    s = loaded.scale
    if s == 1.0:
        return loaded
    if loaded.normalize != "none" or loaded.transcoder:
        raise MechintError("a constant input scale under a normalisation or in a transcoder is not folded")
    t = loaded.tensors
    b_dec = _rounded(t["b_dec"].double() / s)
    tensors = {**t, "W_enc": _rounded(t["W_enc"].double() * s), "W_dec": _rounded(t["W_dec"].double() / s)}
    return replace(loaded, tensors={**tensors, "b_dec": b_dec}, scale=1.0)


def fold_norms(loaded: Loaded) -> Loaded:
    """Without `rescale_acts_by_decoder_norm`: decoder rows of unit norm, their norms in the encoder."""
    if not loaded.rescale_acts_by_decoder_norm:
        return loaded
    norms, t = decoder_norms(loaded), loaded.tensors
    folded = {
        "W_enc": _rounded(t["W_enc"].double() * norms),
        "b_enc": _rounded(t["b_enc"].double() * norms),
        "W_dec": _rounded(t["W_dec"].double() / norms[:, None]),
    }
    return replace(loaded, tensors={**t, **folded}, rescale_acts_by_decoder_norm=False)


def fold_b_dec(loaded: Loaded, *, apply_b_dec_to_input: bool) -> Loaded:
    """With the setting as asked for: `b_dec @ W_enc` moves into the encoder's biases, or out of them."""
    if loaded.apply_b_dec_to_input == apply_b_dec_to_input or loaded.transcoder:
        return loaded
    t = loaded.tensors
    moved = times(t["b_dec"].double()[None], t["W_enc"])[0] * (1 if apply_b_dec_to_input else -1)
    if loaded.architecture == "gated":
        by_mag = moved * t["r_mag"].double().exp()
        biases = {"b_gate": t["b_gate"].double() + moved, "b_mag": t["b_mag"].double() + by_mag}
    else:
        biases = {"b_enc": t["b_enc"].double() + moved}
    tensors = {**t, **{name: _rounded(bias) for name, bias in biases.items()}}
    return replace(loaded, tensors=tensors, apply_b_dec_to_input=apply_b_dec_to_input)


def fold_threshold(loaded: Loaded) -> Loaded:
    """Thresholds below 0 as 0: what lies between them and 0 is dropped by the ReLU anyway."""
    if loaded.architecture != "jumprelu" or bool((loaded.tensors["threshold"] >= 0).all()):
        return loaded
    return replace(loaded, tensors={**loaded.tensors, "threshold": loaded.tensors["threshold"].clamp_min(0.0)})


def as_standard(loaded: Loaded) -> Loaded:
    """A jumprelu SAE whose thresholds are all 0 as what it is: ReLU."""
    loaded = fold_threshold(loaded)
    if loaded.architecture != "jumprelu" or bool(loaded.tensors["threshold"].any()):
        return loaded
    tensors = {name: tensor for name, tensor in loaded.tensors.items() if name != "threshold"}
    return replace(loaded, architecture="standard", tensors=tensors)


def as_jumprelu(loaded: Loaded) -> Loaded:
    """A standard SAE as jumprelu with thresholds 0, for formats that have no other."""
    if loaded.architecture != "standard":
        return loaded
    tensors = {**loaded.tensors, "threshold": torch.zeros(loaded.d_sae)}
    return replace(loaded, architecture="jumprelu", tensors=tensors)


def silent_latents(loaded: Loaded) -> int:
    """How many latents have the pre-activation 0 for every input."""
    columns, offsets = loaded.tensors["W_enc"], loaded.tensors.get("b_enc")
    return 0 if offsets is None else int((~columns.any(dim=0) & (offsets == 0)).sum())


def as_other_topk(loaded: Loaded) -> Loaded:
    """A topk with ReLU as one without it, or back, where that is the same.

    With k latents that are always 0, no negative entry is ever among the k largest.
    """
    if loaded.architecture != "topk" or silent_latents(loaded) < loaded.options["k"]:
        return loaded
    return replace(loaded, topk_relu=not loaded.topk_relu)


def pad_topk(loaded: Loaded) -> Loaded:
    """A topk with ReLU and k more latents, of zeros, at the end: formats whose top-k has no ReLU can hold it then.

    Raises:
        MechintError: for an SAE whose function that would change, or that is no topk.
    """
    if loaded.architecture != "topk" or not loaded.topk_relu:
        kind = "topk without ReLU" if loaded.architecture == "topk" else loaded.architecture
        raise MechintError(f"--pad-topk is for a topk with ReLU, whose format of destination has none; this is {kind}")
    k, t = loaded.options["k"], loaded.tensors
    tensors = {
        "W_enc": torch.cat([t["W_enc"], torch.zeros(loaded.d_in, k)], dim=1),
        "b_enc": torch.cat([t["b_enc"], torch.zeros(k)]),
        "W_dec": torch.cat([t["W_dec"], torch.zeros(k, loaded.d_out)]),
    }
    return replace(loaded, tensors={**t, **tensors}, extras={})


def variants(loaded: Loaded) -> Iterator[tuple[Loaded, tuple[str, ...]]]:
    """`(SAE, names of the folds)`: the same function in other tensors, least changed first."""
    steps: list[tuple[str, Callable[[Loaded], Loaded]]] = [
        ("input scale", fold_scale if loaded.normalize == "none" and not loaded.transcoder else lambda given: given),
        ("decoder norms", fold_norms),
        ("thresholds below 0", fold_threshold),
    ]
    bare: list[tuple[Loaded, tuple[str, ...]]] = [(loaded, ())]
    for name, fold in steps:
        done = fold(bare[-1][0])
        if done is not bare[-1][0]:
            bare.append((done, (*bare[-1][1], name)))
    for other in (False, True):
        for found, folds in bare:
            if other:
                found = fold_b_dec(found, apply_b_dec_to_input=not found.apply_b_dec_to_input)
                folds = (*folds, "b_dec")
            yield found, folds
            for kind in (as_standard(found), as_jumprelu(found), as_other_topk(found)):
                if kind is not found and (kind.architecture, kind.topk_relu) != (found.architecture, found.topk_relu):
                    yield kind, folds


def canonical(loaded: Loaded) -> Loaded:
    """The same function in the form that `mechint.sae` holds: `b_dec` subtracted, nothing else done to the input.

    Raises:
        MechintError: for what no weights can express there; the message says what.
    """
    if (reason := not_ours(loaded)) is not None:
        raise MechintError(f"mechint holds no SAE with {reason}: what it computes would change")
    return fold_b_dec(fold_threshold(fold_norms(fold_scale(loaded))), apply_b_dec_to_input=True)


def not_ours(loaded: Loaded) -> str | None:
    """What of it `mechint.sae` cannot express even after folding, in a phrase; None if it can."""
    if loaded.transcoder:
        return "another output than its input (a transcoder)"
    if loaded.normalize != "none":
        return f"inputs normalised one by one ({loaded.normalize})"
    if loaded.architecture not in ARCHITECTURES:
        return f"the architecture {loaded.architecture}"
    return None


def to_sae(loaded: Loaded) -> SAE:
    """An SAE to use, from what a file said. Raises `MechintError` as `canonical` does."""
    ours = canonical(loaded)
    options = {name: torch.tensor(value) for name, value in ours.options.items()}
    if ours.architecture == "topk" and not ours.topk_relu:
        options["relu"] = torch.tensor(False)
    sae = sae_from_tensors({**ours.tensors, **options}, source=str(ours.metadata.get("source", "the SAE")))
    sae.metadata = dict(ours.metadata)
    return sae


def from_sae(sae: SAE) -> Loaded:
    """What would be saved of an SAE: its saved form, as a value."""
    saved = sae.saved_form()
    settings = {*saved.options, *saved.departures}
    tensors = {name: value for name, value in saved.tensors().items() if name not in settings}
    options = {name: getattr(saved, name) for name in saved.saved_tensors if name in saved.options}
    relu = saved.departing().get("relu", True)
    return checked(
        Loaded(saved.architecture, tensors, options, topk_relu=relu, metadata=dict(saved.metadata)), "the SAE"
    )


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
