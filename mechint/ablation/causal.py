"""A ranking of all latents that says how far it can be trusted.

Every latent gets the fast estimates of `mechint.ablation.attribution`. The first of them, and a random control of the
others, are removed for real, one by one, on some of the texts; the rank correlation of estimate and exact effect says
what the order is worth among the first, and (on the control) all the way down.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechint.ablation.attribution import Attribution, attribute
from mechint.ablation.correlation import spearman
from mechint.ablation.rank import Totals, ablate_texts
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.models import LanguageModel
from mechint.provenance import atomic_path, sha256_json
from mechint.sae import SAE

RANKING_COLUMNS: tuple[str, ...] = (
    "feature_idx",
    "rank",
    "attribution",
    "attribution_signed",
    "attribution_ce",
    "attribution_kl",
    "attribution_kl_se",
    "estimated_ce_change",
    "n_active",
    "n_active_texts",
    "exact_kl",
    "exact_kl_se",
    "exact_ce_change",
    "sample",
)


@dataclass(frozen=True)
class Partial:
    """Where a stopped ranking keeps what it has, and what must be the same for it to go on from there."""

    path: Path
    fingerprint: str

    @property
    def attribution(self) -> Path:
        return self.path.with_name(self.path.name + ".attribution.partial")

    @property
    def exact(self) -> Path:
        return self.path.with_name(self.path.name + ".exact.partial")

    def remove(self) -> None:
        """Once the result is safe."""
        self.attribution.unlink(missing_ok=True)
        self.exact.unlink(missing_ok=True)


def rank_latents(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    texts: Sequence[Text],
    *,
    by: Literal["kl", "ce"] = "kl",
    draws: int = 4,
    top: int = 100,
    control: int = 100,
    latents: Sequence[int] = (),
    exact_texts: int = 20,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
    partial: Partial | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a latent, the largest estimate first (ties: the smaller index), and what the ranking is worth.

    Columns (effects are of removing the latent wherever the SAE may touch; nats; None where not measured):

    - `attribution`: what is ranked by: `attribution_kl` or `attribution_ce`;
    - `attribution_kl`: estimated mean over texts of the mean over positions of KL(clean || removed), with `_se`, its
      standard error over texts (0 without draws);
    - `attribution_ce`, `attribution_signed`: mean over texts of the size, and of the value, of the first-order change
      of the text's mean cross-entropy; above 0 means that the text becomes less likely;
    - `estimated_ce_change`: `attribution_signed` + `attribution_kl`. The Hessian of a cross-entropy by the logits is
      diag(p) - p p' whatever the token, so the KL is its second order too, up to the curvature of the model itself;
    - `n_active`, `n_active_texts`: positions and texts where it fires;
    - `exact_kl` (with `exact_kl_se`), `exact_ce_change`: the same two by real removal, on the texts drawn for it;
    - `sample`: "top", "control", "named" (`latents` that are neither), or "".

    The second result holds counts, seconds, and for "control" and "top", over those that fire in the exact texts,
    rank correlations {value, low, high, n}: `spearman` of `attribution` (all texts) with `exact_kl`;
    `spearman_same_texts` of the estimate on the exact texts alone with it; `spearman_ce` of `estimated_ce_change` there
    with `exact_ce_change`. Also `estimate_over_exact`, the median ratio of KLs on the same texts, and `of_top_median`,
    how many of the control have a larger exact KL than the median of the top.

    Raises:
        MechintError: what `attribute` raises, and settings out of range.
    """
    if by == "kl" and draws < 1:
        raise MechintError("ranking by KL needs --draws 1 at least, or --by ce")
    if min(top, control) < 0 or exact_texts < 1:
        raise MechintError("--top and --control must not be negative, --exact-texts at least 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator)
    chosen = sorted(order[:exact_texts].tolist())
    rest = sorted(order[exact_texts:].tolist())

    started = time.perf_counter()
    parts = _read_attribution(partial, sae.d_sae)
    if parts is None:
        settings = {"draws": draws, "seed": seed, "progress": progress}
        some = attribute(sae, model, hook_name, [texts[i] for i in chosen], **settings)
        others = attribute(sae, model, hook_name, [texts[i] for i in rest], **settings) if rest else None
        parts = (some, others or Attribution.zeros(sae.d_sae))
        _write_attribution(partial, parts)
    some, whole = parts[0], parts[0] + parts[1]
    seconds = {"attribution": time.perf_counter() - started}

    score = _score(whole, by)
    ranking = sorted(range(sae.d_sae), key=lambda latent: (-float(score[latent]), latent))
    sample = choose_sample(ranking, whole, some, top, control, latents, generator)
    started = time.perf_counter()
    measured = list(sample)
    totals = None
    if measured:
        totals = ablate_texts(
            sae, model, hook_name, [texts[i] for i in chosen], measured, batch_size=batch_size, progress=progress,
            partial_path=None if partial is None else partial.exact,
            fingerprint="" if partial is None else sha256_json([partial.fingerprint, chosen, measured]),
        )  # fmt: skip
    seconds["exact"] = time.perf_counter() - started

    exact = {} if totals is None else _exact(totals, measured, len(chosen))
    rows = _rows(ranking, whole, by, exact, sample)
    fires = some.n_active_texts > 0
    groups = {
        name: [latent for latent in measured if sample[latent] == name and fires[latent]] for name in ("control", "top")
    }
    n_pairs = int(some.n_active_texts[measured].sum()) if measured else 0
    summary: dict[str, Any] = {
        "n_latents": sae.d_sae,
        "n_silent": int((whole.n_active == 0).sum()),
        "n_texts": whole.n_texts,
        "n_tokens": whole.n_tokens,
        "n_exact_texts": len(chosen),
        "n_exact_latents": len(measured),
        "n_exact_pairs": n_pairs,
        "seconds": seconds,
        **_agreement(groups, score.numpy(), some, by, exact, seed),
    }
    return rows, summary


def choose_sample(
    ranking: Sequence[int],
    whole: Attribution,
    some: Attribution,
    top: int,
    control: int,
    named: Sequence[int],
    generator: torch.Generator,
) -> dict[int, str]:
    """Which latents to remove for real, and as what: the first `top` that fire at all, a control drawn evenly from the
    others that fire in the exact texts, and those that were named."""
    first = [latent for latent in ranking[:top] if whole.n_active[latent] > 0]
    sample = dict.fromkeys(first, "top")
    others = [latent for latent in sorted(ranking) if latent not in sample and some.n_active_texts[latent] > 0]
    drawn = torch.randperm(len(others), generator=generator)[:control].tolist()
    sample |= {others[place]: "control" for place in sorted(drawn)}
    return sample | {latent: "named" for latent in named if latent not in sample}


def _score(sums: Attribution, by: str) -> Float[Tensor, " d_sae"]:
    return (sums.kl if by == "kl" else sums.absolute) / max(sums.n_texts, 1)


def _standard_error(total: Tensor, squares: Tensor, n: int) -> Tensor:
    """Of the mean over n texts, from the sum and the sum of squares."""
    if n < 2:
        return torch.full_like(total, float("nan"))
    return ((squares - total.square() / n).clamp(min=0) / (n - 1) / n).sqrt()


def _exact(totals: Totals, measured: list[int], n: int) -> dict[int, tuple[float, float | None, float]]:
    """exact_kl, its standard error over texts (None for one text), exact_ce_change."""
    errors = _standard_error(totals.mean_kl, totals.kl_squares, n).tolist()
    values = zip((totals.mean_kl / n).tolist(), errors, (totals.mean_ce_change / n).tolist(), strict=True)
    return {
        latent: (kl, error if n > 1 else None, change)
        for latent, (kl, error, change) in zip(measured, values, strict=True)
    }


def _rows(
    ranking: Sequence[int],
    whole: Attribution,
    by: str,
    exact: dict[int, tuple[float, float | None, float]],
    sample: dict[int, str],
) -> list[dict[str, Any]]:
    n = whole.n_texts
    kl, ce, signed = ((part / n).tolist() for part in (whole.kl, whole.absolute, whole.signed))
    errors = _standard_error(whole.kl, whole.kl_squares, n).tolist()
    rows = []
    for place, latent in enumerate(ranking):
        values = (
            latent,
            place + 1,
            kl[latent] if by == "kl" else ce[latent],
            signed[latent],
            ce[latent],
            kl[latent],
            errors[latent] if n > 1 else None,
            signed[latent] + kl[latent],
            int(whole.n_active[latent]),
            int(whole.n_active_texts[latent]),
            *exact.get(latent, (None, None, None)),
            sample.get(latent, ""),
        )
        rows.append(dict(zip(RANKING_COLUMNS, values, strict=True)))
    return rows


def _agreement(
    groups: dict[str, list[int]],
    score: Float[np.ndarray, " d_sae"],
    some: Attribution,
    by: str,
    exact: dict[int, tuple[float, float | None, float]],
    seed: int,
) -> dict[str, Any]:
    same, change = _score(some, by).numpy(), ((some.signed + some.kl) / max(some.n_texts, 1)).numpy()
    found: dict[str, Any] = {"spearman": {}, "spearman_same_texts": {}, "spearman_ce": {}, "estimate_over_exact": {}}
    kls = {name: np.array([exact[latent][0] for latent in group]) for name, group in groups.items()}
    for name, group in groups.items():
        changes = np.array([exact[latent][2] for latent in group])
        found["spearman"][name] = spearman(score[group], kls[name], seed=seed)
        found["spearman_same_texts"][name] = spearman(same[group], kls[name], seed=seed)
        found["spearman_ce"][name] = spearman(change[group], changes, seed=seed)
        above = kls[name] > 0
        ratio = np.median(same[group][above] / kls[name][above]) if by == "kl" and above.any() else None
        found["estimate_over_exact"][name] = None if ratio is None else float(ratio)
    both = len(kls["top"]) and len(kls["control"])
    larger = int((kls["control"] > np.median(kls["top"])).sum()) if both else None
    found["of_top_median"] = {"n_control_above": larger, "n_control": len(kls["control"])}
    return found


def _read_attribution(partial: Partial | None, d_sae: int) -> tuple[Attribution, Attribution] | None:
    """What a stopped run with the same inputs left of the first part, if it was finished."""
    if partial is None:
        return None
    try:
        with safe_open(partial.attribution, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != partial.fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = []
        for number in range(2):
            values: dict[str, Any] = {field.name: tensors[f"{number}.{field.name}"] for field in fields(Attribution)}
            values |= {name: int(values[name]) for name in ("n_texts", "n_tokens")}
            found.append(Attribution(**values))
    except (FileNotFoundError, SafetensorError, TypeError, ValueError, KeyError):
        return None
    return (found[0], found[1]) if found[0].signed.shape == (d_sae,) else None


def _write_attribution(partial: Partial | None, parts: tuple[Attribution, Attribution]) -> None:
    if partial is None:
        return
    tensors: dict[str, Float[Tensor, " d_sae"] | Int[Tensor, "*d_sae"]] = {
        f"{number}.{field.name}": torch.as_tensor(getattr(part, field.name))
        for number, part in enumerate(parts)
        for field in fields(Attribution)
    }
    with atomic_path(partial.attribution) as temporary:
        save_file(tensors, temporary, metadata={"fingerprint": partial.fingerprint})
