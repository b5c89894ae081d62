"""Rows on the device that trains are the rows of the activations."""

from pathlib import Path

import pytest
import torch

from mechint.data.store import open_activations
from mechint.train import feed


@pytest.mark.parametrize("hold", [False, True, None])
def test_rows_are_those_of_the_activations(hold: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent in blocks of which the last is not full; None decides by memory, which on a CPU is: not held."""
    torch.save(torch.randn(70, 6), tmp_path / "a.pt")
    activations = open_activations(tmp_path / "a.pt")
    monkeypatch.setattr(feed, "BLOCK", 32)
    source = feed.Feed(activations, "cpu", hold=hold)
    assert (source.held is not None) == bool(hold)
    indices = torch.tensor([3, 69, 0, 33, 33, 64])
    assert torch.equal(source.rows(indices), activations.rows(indices))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hold", [False, None])
def test_rows_on_a_gpu(hold: bool | None, tmp_path: Path) -> None:
    torch.save(torch.randn(70, 6), tmp_path / "a.pt")
    activations = open_activations(tmp_path / "a.pt")
    source = feed.Feed(activations, "cuda", hold=hold)
    indices = torch.tensor([3, 69, 0, 33])
    assert torch.equal(source.rows(indices).cpu(), activations.rows(indices))
