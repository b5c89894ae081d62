"""Matching latents: against a dense reference, ties, zero rows, the CSV and the refusals."""

import csv
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.cli.compare import main
from mechint.compare import COLUMNS, match_directions
from mechint.config import CompareConfig
from mechint.sae import SparseAutoEncoder, save_checkpoint


def save_decoder(path: Path, rows: torch.Tensor) -> Path:
    sae = SparseAutoEncoder(rows.shape[1], d_sae=len(rows))
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
