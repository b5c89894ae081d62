"""Matching latents: against a dense reference, ties, zero rows, the CSV and the refusals."""

import csv
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.cli.compare import main
from mechint.compare import (
    COLUMNS,
    cosine_by_chance,
    match_both_ways,
    match_directions,
    shared_latents,
    splitting_tree,
)
from mechint.config import CompareConfig
from mechint.errors import MechintError
from mechint.sae import StandardSAE, save_checkpoint


def save_decoder(path: Path, rows: torch.Tensor) -> Path:
    sae = StandardSAE(rows.shape[1], len(rows))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    save_checkpoint(sae, path)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@settings(max_examples=40, deadline=None)
@given(
    n_left=st.integers(1, 40), n_right=st.integers(1, 40), block_size=st.integers(1, 17), seed=st.integers(0, 10_000)
)
def test_blocks_give_the_dense_answer(n_left: int, n_right: int, block_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct rows, so that ties and duplicates are the rule.
    pool = torch.randn(7, 5, generator=generator)
    pool[0] = 0
    left = pool[torch.randint(0, 7, (n_left,), generator=generator)]
    right = pool[torch.randint(0, 7, (n_right,), generator=generator)] * 3.0
    matches = match_directions(left, right, block_size=block_size)

    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in (left, right)]
    dense = (unit[0] @ unit[1].T).float()
    for i in range(n_left):
        best = max(range(n_right), key=lambda j: (float(dense[i, j]), -j))
        assert int(matches.right_feature[i]) == best
        assert float(matches.cosine[i]) == pytest.approx(float(dense[i, best]), abs=1e-6)
        back = max(range(n_left), key=lambda k: (float(dense[k, best]), -k))
        nonzero = bool(left[i].any()) and bool(right[best].any())
        assert bool(matches.mutual_nearest[i]) == (back == i and nonzero)

    back = match_directions(right, left, block_size=block_size)
    forth = match_both_ways(left, right, block_size=block_size)
    for one, other in zip(forth, (matches, back), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_equal_directions_tie_to_the_lowest_index_across_blocks() -> None:
    direction = torch.tensor([0.3, -0.7, 0.2])
    other = torch.tensor([1.0, 0.0, 0.0])
    right = torch.stack([other, *[direction * scale for scale in (1.0, 5.0, 0.1, 2.0)]])
    matches = match_directions(direction[None], right, block_size=2)
    assert int(matches.right_feature[0]) == 1 and bool(matches.mutual_nearest[0])


def test_csv_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eye = torch.eye(4)
    left = save_decoder(tmp_path / "a.pt", eye[[0, 1, 2]])
    right = save_decoder(tmp_path / "b.pt", torch.stack([eye[2], eye[0], eye[0] + eye[1], eye[3]]))
    output = tmp_path / "runs" / "comparisons" / "a_vs_b.csv"
    checkpoints = [str(left), str(right), str(left)]
    assert main(["--checkpoints", *checkpoints, "--activation-dim", "4", "--output", str(output)]) == 0
    rows = read(output)
    assert output.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [(int(r["left_feature"]), int(r["right_feature"]), r["mutual_nearest"]) for r in rows[:3]] == [
        (0, 1, "true"),
        (1, 2, "false"),  # b[2] is as near to a[0], which has the lower index
        (2, 0, "true"),
    ]
    assert float(rows[1]["cosine_similarity"]) == pytest.approx(0.5**0.5, abs=1e-7)
    # b[3] has cosine 0 with all: it goes to index 0
    back = [(r["left_checkpoint"], int(r["right_feature"]), r["mutual_nearest"]) for r in rows[3:]]
    assert back == [
        (str(right), 2, "true"),
        (str(right), 0, "true"),
        (str(right), 0, "false"),
        (str(right), 0, "false"),
    ]
    out = capsys.readouterr().out
    assert f"comparison_output: {output}" in out
    assert "66.7% mutual" in out and "50.0% mutual" in out and "median cosine 1.000" in out


@pytest.mark.parametrize(
    ("names", "extra", "expected"),
    [
        (["a"], [], "two or more"),
        (["a", "narrow"], [], "d_in 4.*narrow.pt has d_in 3"),
        (["a", "a"], ["--activation-dim", "512"], "a.pt has d_in 4, but --activation-dim 512"),
        (["a", "missing"], [], "missing.pt"),
    ],
)
def test_refusals_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], extra: list[str], expected: str
) -> None:
    save_decoder(tmp_path / "a.pt", torch.eye(4))
    save_decoder(tmp_path / "narrow.pt", torch.eye(3))
    output = tmp_path / "out.csv"
    paths = [str(tmp_path / f"{name}.pt") for name in names]
    assert main(["--checkpoints", *paths, "--output", str(output), *extra]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error.splitlines()[-1]), error
    assert not list(tmp_path.glob("*out.csv*"))


def test_an_existing_file_needs_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(save_decoder(tmp_path / "a.pt", torch.eye(4)))
    output = tmp_path / "out.csv"
    output.write_text("mine")
    flags = ["--checkpoints", checkpoint, checkpoint, "--output", str(output)]
    assert main(flags) == 2
    assert "--overwrite" in capsys.readouterr().err and output.read_text() == "mine"
    assert main([*flags, "--overwrite"]) == 0
    assert [row["mutual_nearest"] for row in read(output)] == ["true"] * 4
    before = Path(checkpoint).read_bytes()
    assert main(["--checkpoints", checkpoint, checkpoint, "--output", checkpoint, "--overwrite"]) == 2
    assert "one of the checkpoints" in capsys.readouterr().err and Path(checkpoint).read_bytes() == before


def test_peak_memory_stays_at_blocks(tmp_path: Path) -> None:
    """The tensors made while matching are far smaller than the left x right matrix."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    left, right = torch.randn(600, 8), torch.randn(900, 8)
    with Watch():
        match_directions(left, right, block_size=64)
    assert largest <= max(64 * 64, left.numel(), right.numel()) < left.shape[0] * right.shape[0] / 50


def test_config_default_is_safe() -> None:
    assert CompareConfig(checkpoints=(), output=Path("x")).overwrite is False


# --- what splits, and what is shared ----------------------------------------------------------------------------------


def near(direction: torch.Tensor, other: torch.Tensor, cosine: float) -> torch.Tensor:
    """A unit vector in the plane of two orthogonal unit vectors."""
    return cosine * direction + (1 - cosine**2) ** 0.5 * other


def three_sizes() -> list[torch.Tensor]:
    """Latents that are kept, split, lost and new, by construction. In 16 dimensions, e0, e1, ... the unit vectors."""
    e = torch.eye(16)
    small = torch.stack([e[0], e[1], e[2]])
    middle = torch.stack([near(e[1], e[8], 0.9), e[0] * 3, near(e[1], e[9], 0.8), e[5], near(e[2], e[10], 0.6)])
    large = torch.stack([e[5], near(e[5], e[11], 0.95), near(e[5], e[12], 0.75), e[0], middle[2], e[15]])
    return [small, middle, large]


def test_the_tree_says_what_splits() -> None:
    tree = splitting_tree(three_sizes(), threshold=0.7, block_size=2)
    assert [level.parent.tolist() for level in tree.levels] == [[-1] * 3, [1, 0, 1, -1, -1], [3, 3, 3, 1, 2, -1]]
    assert [level.n_children.tolist() for level in tree.levels] == [[1, 2, 0], [0, 1, 1, 3, 0], [0] * 6]
    assert tree.levels[1].nearest[4] == 2 and float(tree.levels[1].cosine[4]) == pytest.approx(0.6)
    assert tree.step(0) == (1, 1, 1, 2, 2)  # lost e2, kept e0, split e1; e5 and the one at 0.6 are new
    assert tree.step(1) == (2, 2, 1, 3, 1)
    assert tree.children(0, 1) == [0, 2] and tree.children(1, 3) == [0, 1, 2] and tree.children(2, 0) == []
    assert tree.ancestors(2, 4) == [2, 1] and tree.ancestors(2, 5) == [] and tree.ancestors(0, 1) == []
    assert tree.family(0, 1) == [[1], [0, 2], [4]] and tree.family(0, 2) == [[2]]
    assert tree.largest_families(5) == [[[1], [0, 2], [4]], [[0], [1], [3]]]
    assert splitting_tree(three_sizes(), threshold=0.5).step(0).lost == 0  # at 0.6 it is a child too
    with pytest.raises(MechintError, match="latent 3 .*level 0: 0 to 2"):
        tree.family(0, 3)
    with pytest.raises(MechintError, match="level 3"):
        tree.ancestors(3, 0)


def test_families_are_ordered_by_all_descendants() -> None:
    e = torch.eye(16)
    middle = torch.stack([e[0], near(e[1], e[8], 0.9), near(e[1], e[9], 0.9)])
    large = torch.stack([near(e[0], e[10 + i], 0.9) for i in range(4)])
    tree = splitting_tree([e[[1, 0]], middle, large])
    assert tree.largest_families() == [[[1], [0], [0, 1, 2, 3]], [[0], [1, 2]]]  # one child, then four; two children
    assert tree.largest_families(1) == [[[1], [0], [0, 1, 2, 3]]]


def test_what_dictionaries_share() -> None:
    e = torch.eye(16)
    one = torch.stack([e[0], e[1], e[2], near(e[0], e[9], 0.8)])
    two = torch.stack([near(e[1], e[7], 0.9), e[0], e[4]])
    three = torch.stack([e[0], e[5]])
    first, second, third = shared_latents([one, two, three], threshold=0.7)
    assert first.n_with.tolist() == [2, 1, 0, 2] and first.n_mutual.tolist() == [2, 1, 0, 0]
    assert first.shared.tolist() == [True, False, False, True] and first.unique.tolist() == [False, False, True, False]
    assert second.n_with.tolist() == [1, 2, 0] and third.n_with.tolist() == [2, 0]
    assert (int(first.best_other[1]), int(first.best_latent[1])) == (1, 0)
    assert float(first.best_cosine[1]) == pytest.approx(0.9)


@pytest.mark.parametrize("what", [splitting_tree, shared_latents])
def test_what_cannot_be_compared(what) -> None:  # noqa: ANN001
    with pytest.raises(MechintError, match="two or more"):
        what([torch.eye(4)])
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(MechintError, match="--threshold"):
            what([torch.eye(4), torch.eye(4)], threshold=threshold)
    with pytest.raises(MechintError, match="d_in 3 and 4"):
        splitting_tree([torch.eye(4), torch.eye(3)])


def test_chance_is_what_random_directions_reach() -> None:
    generator = torch.Generator().manual_seed(3)
    right = torch.randn(300, 64, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator), dim=1)
    expected = (directions @ torch.nn.functional.normalize(right, dim=1).T).amax(dim=1).median()
    assert cosine_by_chance(right) == pytest.approx(float(expected), abs=0.02)
    assert cosine_by_chance(right) < cosine_by_chance(torch.randn(300, 8, generator=generator))


def test_tidy_files_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(save_decoder(tmp_path / f"{name}.pt", rows)) for name, rows in zip("abc", three_sizes(), strict=True)]
    output = tmp_path / "out" / "cmp.csv"
    assert main(["--checkpoints", *paths, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["cmp.csv", "cmp.latents.csv", "cmp.pairs.csv"]
    latents = read(output.with_suffix(".latents.csv"))
    assert [row["checkpoint"] for row in latents] == [paths[0]] * 3 + [paths[1]] * 5 + [paths[2]] * 6
    assert [row["parent"] for row in latents[3:8]] == ["1", "0", "1", "", ""]
    assert [row["n_children"] for row in latents] == [*"120", *"01130", *[""] * 6]
    assert all(row["parent_cosine"] == row["parent"] == "" for row in latents[:3])
    assert float(latents[7]["parent_cosine"]) == pytest.approx(0.6)
    assert (latents[0]["n_with"], latents[0]["best_checkpoint"], latents[0]["best_latent"]) == ("2", paths[1], "1")
    pairs = {(row["left_checkpoint"], row["right_checkpoint"]): row for row in read(output.with_suffix(".pairs.csv"))}
    assert len(pairs) == 6
    step = pairs[paths[0], paths[1]]
    assert [step[name] for name in ("lost", "kept", "split", "new")] == ["1", "1", "1", "2"]
    assert float(step["share_found"]) == pytest.approx(2 / 3) and pairs[paths[1], paths[0]]["lost"] == ""
    assert pairs[paths[0], paths[2]]["new"] == "" and float(pairs[paths[0], paths[2]]["mean_cosine"]) > 0
    out = capsys.readouterr().out
    assert "1 have one child, 1 split (at most 2), 1 have none; 2 of the 5 are new" in out
    assert f"{paths[0]}: 2 of 3 latents are in all 2 others, 1 in none" in out


@pytest.mark.parametrize("beside", ["cmp.latents.csv", "cmp.pairs.csv"])
def test_files_beside_are_not_replaced_either(tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: str) -> None:
    checkpoint = str(save_decoder(tmp_path / "a.pt", torch.eye(4)))
    (tmp_path / beside).write_text("mine")
    flags = ["--checkpoints", checkpoint, checkpoint, "--output", str(tmp_path / "cmp.csv")]
    assert main(flags) == 2 and beside in capsys.readouterr().err
    assert (tmp_path / beside).read_text() == "mine" and not (tmp_path / "cmp.csv").exists()
    assert main([*flags, "--threshold", "2"]) == 2 and "--threshold" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0 and (tmp_path / beside).read_text() != "mine"
