"""A small real run on the built-in world: 300 tales, 512 latents, some hundred steps. Made once a session."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from mechint.config import CollectConfig, SAETrainConfig
from mechint.runs import Run


def make_small_run(root: Path) -> Run:
    """Collect and train below `root` (`activations/`, `runs/small`); two tales lie in the run as eval_texts.txt."""
    from mechint.builtin.tales import tale
    from mechint.data.collect import collect
    from mechint.train import train

    activations = root / "activations" / "small"
    collect(
        CollectConfig(model="builtin/pythia-tiny", dataset="builtin/tales", num_texts=300, output=activations),
        progress=False,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run beside each other; for matrices as small as these more threads only wait
    train(
        SAETrainConfig(
            activations_path=str(activations),
            activation_dim=128,
            expansion=4,
            epochs=300,
            batch_size=512,
            l1_lambda=8.0,
            learning_rate=4e-3,
            warmup_steps=20,
            lambda_warmup_steps=60,
            log_every=20,
            val_fraction=0.1,
            runs_root=str(root / "runs"),
            run_name="small",
            device="cpu",
        )
    )
    torch.set_num_threads(threads)
    run = Run(root / "runs" / "small")
    texts = [" ".join(tale(index, "heldout", 0).text.split()) for index in range(2)]
    (run.path / "eval_texts.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return run


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """SAEs that are made here are in float64, and so is their training.

    To compare two ways to train over many steps. In float32 one entry within 1e-7 of its bound, of the millions that
    a hundred steps compute, falls differently on one processor or another, and from there the two drift apart; that
    none is within 1e-15 holds on all of them.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rows_without_rate(metrics: Path) -> list[str]:
    """The lines of a metrics.csv without `vectors_per_second`, the one column that the clock writes."""
    lines = [line.split(",") for line in metrics.read_text(encoding="utf-8").splitlines()]
    drop = lines[0].index("vectors_per_second") if "vectors_per_second" in lines[0] else len(lines[0])
    return [",".join(cells[:drop] + cells[drop + 1 :]) for cells in lines]
