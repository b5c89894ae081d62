"""Matching the latents of two dictionaries by the cosine of their decoder directions, in blocks."""

import csv
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.config import CompareConfig
from mechint.errors import MechintError
from mechint.provenance import atomic_path, check_output_path
from mechint.sae import SAE, load_sae

COLUMNS = (
    "left_checkpoint",
    "right_checkpoint",
    "left_feature",
    "right_feature",
    "cosine_similarity",
    "mutual_nearest",
)


class Matches(NamedTuple):
    """For each left row its best right row."""

    right_feature: Int[Tensor, " left"]
    cosine: Float[Tensor, " left"]
    mutual_nearest: Bool[Tensor, " left"]


def match_directions(
    left: Float[Tensor, "left d_in"], right: Float[Tensor, "right d_in"], *, block_size: int = 1024
) -> Matches:
    """For every row of `left` the row of `right` with the highest cosine, and whether each is the other's best.

    Equal cosines go to the lowest index. A zero row has cosine 0 with everything and is nobody's mutual nearest. Memory
    is a few blocks of `block_size` x `block_size`; the whole `left x right` matrix never exists.

    Blocks are multiplied in float64 and rounded to float32: equal rows then tie exactly, where in float32 the same dot
    product can come out different in another column of the block.
    """
    best = torch.full((len(left),), -torch.inf)
    best_index = torch.zeros(len(left), dtype=torch.int64)
    back = torch.full((len(right),), -torch.inf)
    back_index = torch.zeros(len(right), dtype=torch.int64)
    for left_start in range(0, len(left), block_size):
        rows = slice(left_start, left_start + block_size)
        left_block = _unit_rows(left[rows])
        for right_start in range(0, len(right), block_size):
            columns = slice(right_start, right_start + block_size)
            cosine = (left_block @ _unit_rows(right[columns]).T).float()
            _raise_best(best[rows], best_index[rows], *cosine.max(dim=1), offset=right_start)
            _raise_best(back[columns], back_index[columns], *cosine.max(dim=0), offset=left_start)
    nonzero = (left != 0).any(dim=1) & (right != 0).any(dim=1)[best_index]
    mutual = (back_index[best_index] == torch.arange(len(left))) & nonzero
    return Matches(best_index, best.clamp(-1.0, 1.0), mutual)


def _unit_rows(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-30)


def _raise_best(
    best: Float[Tensor, " n"],
    best_index: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    index: Int[Tensor, " n"],
    *,
    offset: int,
) -> None:
    """Write `value` and `index + offset` where `value` is higher, in place; `max` and `>` keep the lowest index."""
    higher = value > best
    best[higher] = value[higher]
    best_index[higher] = index[higher] + offset


class PairSummary(NamedTuple):
    """What one comparison of two checkpoints says in one line."""

    left: str
    right: str
    n_left: int
    n_right: int
    share_mutual: float
    median_cosine: float
    histogram: tuple[int, ...]  # left latents by best cosine: below 0.1, 0.1 to 0.2, ..., 0.9 to 1

    def text(self) -> str:
        """For people: two lines."""
        counts = " ".join(map(str, self.histogram))
        return (
            f"{self.left} ({self.n_left} latents) -> {self.right} ({self.n_right}): {self.share_mutual:.1%} mutual"
            f" nearest, median cosine {self.median_cosine:.3f}\n"
            f"  latents by best cosine, <0.1 to 1.0 in tenths: {counts}"
        )


def compare_checkpoints(config: CompareConfig) -> list[PairSummary]:
    """Write the matches of each consecutive pair of checkpoints to `config.output`; one summary a pair.

    Raises:
        MechintError: fewer than two checkpoints, widths that differ, an unreadable checkpoint, an existing output.
    """
    checkpoints = config.checkpoints
    if len(checkpoints) < 2:
        raise MechintError(f"--checkpoints needs two or more files to compare, got {len(checkpoints)}")
    if config.block_size < 1:
        raise MechintError(f"--block-size must be at least 1, got {config.block_size}")
    if config.output.exists() and not config.overwrite:
        raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
    check_output_path(config.output)
    if config.output.exists() and any(config.output.samefile(path) for path in checkpoints if path.exists()):
        raise MechintError(f"--output {config.output} is one of the checkpoints: give another name")
    _check_widths(checkpoints, config.activation_dim)
    summaries = []
    with (
        atomic_path(config.output, overwrite=config.overwrite) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (left_path, left), (right_path, right) in _pairs(checkpoints):
            matches = match_directions(left, right, block_size=config.block_size)
            writer.writerows(_rows(left_path, right_path, matches))
            summaries.append(_summary(left_path, right_path, len(left), len(right), matches))
    return summaries


def _load(path: Path) -> SAE:
    with warnings.catch_warnings():
        # How the activations of an old checkpoint were processed does not matter here, so its warning is left out.
        warnings.simplefilter("ignore", UserWarning)
        return load_sae(path)


def _check_widths(checkpoints: Sequence[Path], activation_dim: int | None) -> None:
    """Open every file once before any work, so that the last one being wrong does not cost the first comparison."""
    widths = [_load(path).d_in for path in checkpoints]
    for path, d_in in zip(checkpoints, widths, strict=True):
        if activation_dim is not None and d_in != activation_dim:
            raise MechintError(f"{path} has d_in {d_in}, but --activation-dim {activation_dim} was given")
        if d_in != widths[0]:
            raise MechintError(
                f"latents of different widths cannot be compared: {checkpoints[0]} has d_in {widths[0]}, {path} has"
                f" d_in {d_in}"
            )


Decoder = tuple[str, Tensor]


def _pairs(checkpoints: Sequence[Path]) -> Iterator[tuple[Decoder, Decoder]]:
    """Consecutive decoders, two held at a time."""
    left = (str(checkpoints[0]), _load(checkpoints[0]).W_dec.detach())
    for path in checkpoints[1:]:
        right = (str(path), _load(path).W_dec.detach())
        yield left, right
        left = right


def _rows(left: str, right: str, matches: Matches) -> Iterator[tuple[str, str, int, int, str, str]]:
    columns = (matches.right_feature.tolist(), matches.cosine.tolist(), matches.mutual_nearest.tolist())
    for feature, (best, cosine, mutual) in enumerate(zip(*columns, strict=True)):
        yield left, right, feature, best, f"{cosine:.9g}", "true" if mutual else "false"


def _summary(left: str, right: str, n_left: int, n_right: int, matches: Matches) -> PairSummary:
    tenths = (matches.cosine * 10).floor().clamp(0, 9).long()
    return PairSummary(
        left=left,
        right=right,
        n_left=n_left,
        n_right=n_right,
        share_mutual=float(matches.mutual_nearest.float().mean()),
        median_cosine=float(matches.cosine.median()),
        histogram=tuple(torch.bincount(tenths, minlength=10).tolist()),
    )
