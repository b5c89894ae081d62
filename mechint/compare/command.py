"""`compare_checkpoints`: the matches of checkpoints as CSV files, and what they say in a few lines.

X.csv           for each latent of a checkpoint its nearest in the next one, as this command always wrote it
X.latents.csv   one row a latent of every checkpoint: its parent, its children, and which others have it
X.pairs.csv     one row an ordered pair of checkpoints: shares and numbers of latents
"""

import csv
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechint.compare.match import Matches, cosine_by_chance, match_both_ways
from mechint.compare.tree import Sharing, Tree, check_threshold, sharing, tree_of_matches
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
LATENT_COLUMNS = (
    "checkpoint",
    "latent",
    "parent",  # latent of the checkpoint before, empty where none is near enough (and in the first one)
    "parent_cosine",  # with the nearest latent of the checkpoint before, near enough or not
    "n_children",  # in the next checkpoint, empty in the last
    "n_with",  # other checkpoints that have a latent like it
    "n_mutual",  # of these, those where each is the other's nearest
    "best_cosine",  # over all other checkpoints
    "best_checkpoint",
    "best_latent",
)
PAIR_COLUMNS = (
    "left_checkpoint",
    "right_checkpoint",
    "n_left",
    "n_right",
    "threshold",
    "share_mutual",  # of left latents
    "mean_cosine",  # of left latents with their nearest
    "median_cosine",
    "chance_cosine",  # the median for random directions in place of the left latents
    "share_found",  # of left latents with a right one at or above the threshold
    "lost",  # the next three count left latents by children, where right is the next checkpoint; else empty
    "kept",
    "split",
    "new",  # right latents without a parent
)


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


class Comparison(NamedTuple):
    """What `compare_all` found."""

    pairs: list[PairSummary]  # consecutive checkpoints
    tree: Tree
    sharing: list[Sharing]  # one a checkpoint
    files: list[Path]

    def text(self) -> str:
        """For people: the pairs, what splits, and what is shared."""
        lines = []
        for level, pair in enumerate(self.pairs):
            step = self.tree.step(level)
            lines.append(pair.text())
            lines.append(
                f"  at cosine {self.tree.threshold:g}: {step.kept} have one child, {step.split} split (at most"
                f" {step.most_children}), {step.lost} have none; {step.new} of the {pair.n_right} are new"
            )
        names = [self.pairs[0].left, *(pair.right for pair in self.pairs)]
        for name, found in zip(names, self.sharing, strict=True):
            n, others = len(found.n_with), "the other" if found.n_others == 1 else f"all {found.n_others} others"
            lines.append(
                f"{name}: {int(found.shared.sum())} of {n} latents are in {others}, {int(found.unique.sum())} in none"
            )
        return "\n".join(lines)


def compare_checkpoints(config: CompareConfig) -> list[PairSummary]:
    """`compare_all`, of which only one summary a pair of consecutive checkpoints is returned."""
    return compare_all(config).pairs


def compare_all(config: CompareConfig) -> Comparison:
    """Match all pairs of checkpoints and write the three files (see the module).

    Raises:
        MechintError: fewer than two checkpoints, widths that differ, an unreadable checkpoint, an existing output.
    """
    checkpoints = config.checkpoints
    if len(checkpoints) < 2:
        raise MechintError(f"--checkpoints needs two or more files to compare, got {len(checkpoints)}")
    if config.block_size < 1:
        raise MechintError(f"--block-size must be at least 1, got {config.block_size}")
    check_threshold(config.threshold)
    files = [config.output, *(config.output.with_suffix(f".{name}.csv") for name in ("latents", "pairs"))]
    for path in files:
        if path.exists() and not config.overwrite:
            raise MechintError(f"{path} exists: give another --output, or --overwrite to replace it")
        check_output_path(path)
        if path.exists() and any(path.samefile(other) for other in checkpoints if other.exists()):
            raise MechintError(f"--output {path} is one of the checkpoints: give another name")
    _check_widths(checkpoints, config.activation_dim)
    matches, sizes, chance = _match_all(checkpoints, config.block_size)
    names = [str(path) for path in checkpoints]
    consecutive = range(len(names) - 1)
    pairs = [_summary(names[i], names[i + 1], sizes[i], sizes[i + 1], matches[i, i + 1]) for i in consecutive]
    tree = tree_of_matches(sizes, [matches[i + 1, i] for i in consecutive], threshold=config.threshold)
    found = Comparison(pairs, tree, sharing(sizes, matches, config.threshold), files)
    tables: list[tuple[Sequence[str], Iterator[Sequence[Any]]]] = [
        (COLUMNS, (row for i in consecutive for row in _rows(names[i], names[i + 1], matches[i, i + 1]))),
        (LATENT_COLUMNS, _latent_rows(names, found)),
        (PAIR_COLUMNS, _pair_rows(names, sizes, matches, chance, tree)),
    ]
    with ExitStack() as stack:  # all are whole before the first gets its name
        temporaries = [stack.enter_context(atomic_path(path, overwrite=config.overwrite)) for path in files]
        for temporary, (columns, rows) in zip(temporaries, tables, strict=True):
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(rows)
    return found


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


def _match_all(
    checkpoints: Sequence[Path], block_size: int
) -> tuple[dict[tuple[int, int], Matches], list[int], list[float]]:
    """Matches of every ordered pair, numbers of latents, and the cosine by chance of each; two decoders held at a
    time."""
    matches: dict[tuple[int, int], Matches] = {}
    sizes, chance = [0] * len(checkpoints), [0.0] * len(checkpoints)
    for i, path in enumerate(checkpoints):
        left = _decoder(path)
        sizes[i], chance[i] = len(left), cosine_by_chance(left)
        for j in range(i + 1, len(checkpoints)):
            matches[i, j], matches[j, i] = match_both_ways(left, _decoder(checkpoints[j]), block_size=block_size)
    return matches, sizes, chance


def _decoder(path: Path) -> Tensor:
    return _load(path).W_dec.detach()


def _latent_rows(names: Sequence[str], found: Comparison) -> Iterator[Sequence[Any]]:
    last = len(names) - 1
    for number, (name, level, own) in enumerate(zip(names, found.tree.levels, found.sharing, strict=True)):
        columns = [level.parent, level.cosine, level.n_children, own.n_with, own.n_mutual]
        columns += [own.best_cosine, own.best_other, own.best_latent]
        for latent, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            parent, cosine, children, n_with, n_mutual, best, other, best_latent = row
            yield (
                name,
                latent,
                parent if parent >= 0 else "",
                f"{cosine:.9g}" if number else "",
                children if number < last else "",
                n_with,
                n_mutual,
                f"{best:.9g}",
                names[other],
                best_latent,
            )


def _pair_rows(
    names: Sequence[str],
    sizes: Sequence[int],
    matches: dict[tuple[int, int], Matches],
    chance: Sequence[float],
    tree: Tree,
) -> Iterator[Sequence[Any]]:
    for i, j in sorted(matches):
        match = matches[i, j]
        shares = (
            match.mutual_nearest.double().mean(),
            match.cosine.double().mean(),
            match.cosine.median(),
            torch.tensor(chance[j]),
            (match.cosine >= tree.threshold).double().mean(),
        )
        step = tree.step(i) if j == i + 1 else None
        fates = (step.lost, step.kept, step.split, step.new) if step else ("",) * 4
        yield (names[i], names[j], sizes[i], sizes[j], tree.threshold, *(f"{float(x):.9g}" for x in shares), *fates)


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
