"""Evaluating an SAE on stored activations: one pass over the training rows, one over the held-out rows."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.data.batches import iter_activation_batches
from mechint.data.norms import OUTLIER_MULTIPLE, outliers
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.eval.histograms import activity_metrics
from mechint.eval.sums import ReconstructionSums, count_active
from mechint.provenance import get_git_commit
from mechint.sae import SAE

# Largest [rows, d_sae] block of feature_acts made at once: 128 MB in float32, whatever the size of the dictionary.
MAX_BLOCK_ELEMENTS = 2**25


class Activity(NamedTuple):
    """What a pass over some rows saw."""

    fire_counts: Int[Tensor, " d_sae"]  # rows on which each latent is above 0
    mean: Float[Tensor, " d_in"]  # float64 mean of the rows
    n_rows: int


def row_batches(
    activations: Float[Tensor, "n d_in"] | Activations,
    indices: Int[Tensor, " rows"] | None,
    batch_size: int,
    *,
    what: str = "",
    progress: bool = False,
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """The rows named by `indices` (all if None) in ascending order, in float32 batches, the last one short.

    Sums do not depend on the order, and ascending is the order that disks like. `what` titles the progress bar.

    Raises:
        MechintError: a row holds NaN or Inf.
    """
    if indices is not None:
        indices = indices.sort().values
    n_rows = (len(activations) if isinstance(activations, Tensor) else activations.n_rows) if indices is None else None
    n_rows = len(indices) if indices is not None else n_rows
    if isinstance(activations, Activations):
        batches = activations.batches(batch_size, indices=indices)
    else:
        batches = iter_activation_batches(activations, indices, batch_size, activations.device)
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, total=-(-(n_rows or 0) // batch_size), desc=what, unit="batch", leave=False)
    start = 0
    for batch in batches:
        batch = batch.float()
        if not bool(torch.isfinite(batch).all()):
            bad = start + int((~torch.isfinite(batch).all(dim=1)).nonzero()[0])
            row = bad if indices is None else int(indices[bad])
            where = activations.path if isinstance(activations, Activations) else "the activations"
            raise MechintError(f"row {row} of {where} holds NaN or Inf: collect these activations again")
        start += len(batch)
        yield batch


def measure_activity(
    sae: SAE,
    activations: Float[Tensor, "n d_in"] | Activations,
    indices: Int[Tensor, " rows"] | None = None,
    *,
    batch_size: int = 8192,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Activity:
    """Firing counts of all latents and the mean activation over the rows `indices` (all if None)."""
    sae, batch_size = _prepared(sae, activations, batch_size, device)
    counts = torch.zeros(sae.d_sae, dtype=torch.int64)
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    n_rows = 0
    with torch.inference_mode():
        for x in row_batches(activations, indices, batch_size, what="training rows", progress=progress):
            counts += count_active(sae.encode(x.to(sae.W_enc.device)))
            total += x.double().sum(dim=0)
            n_rows += len(x)
    return Activity(counts, total / max(n_rows, 1), n_rows)


def evaluate_rows(
    sae: SAE,
    activations: Float[Tensor, "n d_in"] | Activations,
    val_indices: Int[Tensor, " n_val"] | None = None,
    train_indices: Int[Tensor, " n_train"] | None = None,
    *,
    batch_size: int = 8192,
    device: str | torch.device | None = None,
    activity: Activity | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Reconstruction and sparsity on the held-out rows, dead latents on the training rows (docs/metrics.md).

    Args:
        val_indices: rows that the metrics are measured on; all if None.
        train_indices: rows that decide which latents are dead; all if None.
        activity: the result of `measure_activity` on the training rows, if it has been run already.

    Returns:
        val_mse, val_l0 (a fraction), dead_features and dead_fraction under their old names, and the newer metrics.

    Raises:
        MechintError: no rows to measure on, the wrong width, NaN or Inf in the activations.
    """
    if activity is None:
        activity = measure_activity(
            sae, activations, train_indices, batch_size=batch_size, device=device, progress=progress
        )
    sums = measure_rows(sae, activations, val_indices, batch_size=batch_size, device=device, progress=progress)
    return {**sums.metrics(), **activity_metrics(activity.fire_counts, activity.n_rows), "n_train": activity.n_rows}


def collect_feature_activity(
    model: SAE,
    activations: Float[Tensor, "n d_in"] | Activations,
    device: str | torch.device | None,
    eval_batch_size: int = 8192,
    indices: Int[Tensor, " rows"] | None = None,
) -> Bool[Tensor, " d_sae"]:
    """Which latents are above 0 on at least one of the rows `indices` (all if None); on the CPU."""
    return measure_activity(model, activations, indices, batch_size=eval_batch_size, device=device).fire_counts > 0


def evaluate_sae(
    model: SAE,
    val_acts: Float[Tensor, "n d_in"] | Activations,
    feature_ever_active: Bool[Tensor, " d_sae"],
    num_features: int,
    device: str | torch.device | None,
    eval_batch_size: int = 8192,
    training_seconds: float = 0.0,
    total_seconds: float = 0.0,
    run_metadata: Mapping[str, Any] | None = None,
    val_indices: Int[Tensor, " n_val"] | None = None,
) -> dict[str, Any]:
    """The original's summary of an evaluation, with the newer metrics of reconstruction beside its own.

    Unlike the original's, the means are over all rows: a short last batch does not count as a full one.

    Args:
        feature_ever_active: the latents that are not dead, as `collect_feature_activity` or a training found them.
        run_metadata: further keys of the summary, such as run_dir and checkpoint_path.
        val_indices: the rows of `val_acts` that are measured; all if None.

    Raises:
        MechintError: as `measure_rows`, or `num_features` is not the SAE's number of latents.
    """
    if not num_features == len(feature_ever_active) == model.d_sae:
        raise MechintError(
            f"the SAE has {model.d_sae} latents, but num_features is {num_features} and feature_ever_active has"
            f" {len(feature_ever_active)} entries: give those of this SAE"
        )
    n_dead = num_features - int(feature_ever_active.sum())
    return {
        **measure_rows(model, val_acts, val_indices, batch_size=eval_batch_size, device=device).metrics(),
        "dead_features": n_dead,
        "dead_fraction": n_dead / num_features,
        "training_seconds": training_seconds,
        "total_seconds": total_seconds,
        "num_features": num_features,
        "num_params": model.num_params,
        "git_commit": get_git_commit(),
        **(run_metadata or {}),
    }


def measure_rows(
    sae: SAE,
    activations: Float[Tensor, "n d_in"] | Activations,
    indices: Int[Tensor, " rows"] | None = None,
    *,
    groups: Int[Tensor, " n"] | None = None,
    n_groups: int = 1,
    batch_size: int = 8192,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> ReconstructionSums:
    """Sums over the rows `indices` (all if None), in two passes: their mean first, then their reconstruction.

    Args:
        groups: the group (text) of every row of `activations`; the sums are kept apart by group.

    Raises:
        MechintError: no rows to measure on, the wrong width, NaN or Inf in the activations.
    """
    sae, batch_size = _prepared(sae, activations, batch_size, device)
    if indices is not None:
        indices = indices.sort().values
    total, n_rows = torch.zeros(sae.d_in, dtype=torch.float64), 0
    for x in row_batches(activations, indices, batch_size):
        total += x.double().sum(dim=0)
        n_rows += len(x)
    if n_rows == 0:
        raise MechintError(
            "there are no held-out rows to evaluate on (val_fraction is 0 or rounds to no text): give other"
            " activations with --activations-path, and --rows all"
        )
    if groups is not None and indices is not None:
        groups = groups[indices]
    sums = ReconstructionSums(sae.d_in, sae.d_sae, n_groups=n_groups, centre=total / n_rows)
    start = 0
    with torch.inference_mode():
        for x in row_batches(activations, indices, batch_size, what="held-out rows", progress=progress):
            of_row = None if groups is None else groups[start : start + len(x)]
            start += len(x)
            x = x.to(sae.W_enc.device)
            x_hat, feature_acts = sae.run(x)
            sums.add(x, x_hat, feature_acts, of_row)
    return sums


def without_outliers(
    sae: SAE,
    activations: Activations,
    indices: Int[Tensor, " rows"] | None = None,
    *,
    multiple: float = OUTLIER_MULTIPLE,
    batch_size: int = 8192,
    device: str | torch.device | None = None,
) -> dict[str, Any] | None:
    """The metrics of `measure_rows` on those rows whose norm is at most `multiple` times the median of all rows of
    `activations`, with `n_outliers` left out above `norm_limit`. None where no row is above, or none is left."""
    limit, is_outlier = outliers(activations.norms, multiple)
    indices = torch.arange(activations.n_rows) if indices is None else indices
    kept = indices[~is_outlier[indices]]
    if len(kept) in (0, len(indices)):
        return None
    sums = measure_rows(sae, activations, kept, batch_size=batch_size, device=device)
    return {"n_outliers": len(indices) - len(kept), "norm_limit": limit, **sums.metrics()}


def _prepared(
    sae: SAE, activations: Float[Tensor, "n d_in"] | Activations, batch_size: int, device: str | torch.device | None
) -> tuple[SAE, int]:
    """The SAE on `device`, a copy if it is on another, and a batch size that keeps feature_acts within
    MAX_BLOCK_ELEMENTS."""
    d_in = activations.shape[1] if isinstance(activations, Tensor) else activations.d_in
    if d_in != sae.d_in:
        raise MechintError(
            f"the activations are {d_in} wide (d_in), the SAE expects {sae.d_in}: they do not belong together"
        )
    if device is not None and torch.device(device).type != sae.W_enc.device.type:
        sae = copy.deepcopy(sae).to(device)
    return sae, max(1, min(batch_size, MAX_BLOCK_ELEMENTS // sae.d_sae))
