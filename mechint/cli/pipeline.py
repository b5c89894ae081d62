"""`mechint pipeline` (`make pipeline`): every command once, on the model and the texts that ship with the package.

Each stage is the command that a user would type, printed before it runs; nothing here computes anything itself.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from mechint.cli.flags import command, parse
from mechint.config import Config, require
from mechint.errors import MechintError

MODEL = "builtin/pythia-tiny"
DATASET = "builtin/tales"


@dataclass(frozen=True)
class PipelineConfig(Config):
    """Collect, train, evaluate, ablate, rank, compare and report on the built-in model, without a network."""

    num_texts: int = 2600
    """Tales to collect activations from."""
    steps: Annotated[int, arg(aliases=["--epochs"])] = 1500
    """Training steps of the 8x SAE; the 4x one, which is only compared with, gets half."""
    lam: float = 0.6
    """Weight of the sparsity penalty: L0 comes out at about 30 with the built-in model."""
    batch_size: int = 1024
    """Activation vectors a step."""
    ablation_texts: int = 20
    """Held-out tales on which latents are ranked."""
    root: Path = Path(".")
    """Folder that activations/ and runs/ are written in."""

    def __post_init__(self) -> None:
        for name in ("num_texts", "steps", "batch_size", "ablation_texts"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be at least 1")


@command
def main(argv: Sequence[str]) -> int:
    config = parse(PipelineConfig, argv, prog="mechint pipeline")
    from mechint.cli import ablate, collect, compare, concepts, evaluate, rank, report, train

    started = time.perf_counter()
    activations = config.root / "activations" / f"tales_{config.num_texts}.pt"
    runs_root = config.root / "runs"
    small, large = (next_run_dir(runs_root, f"tales-{expansion}x") for expansion in (4, 8))
    texts, ranking, figure = large / "eval_texts.txt", large / "ablation.csv", large / "overview.png"
    comparison = runs_root / "comparisons" / f"{small.name}_vs_{large.name}.csv"

    stage(
        "1/9  activations of blocks.3.hook_resid_post",
        collect.main,
        "scripts/collect_activations.py",
        ["--model", MODEL, "--dataset", DATASET, "--num-texts", config.num_texts, "--output", activations],
    )

    def train_flags(run: Path, expansion: int, steps: int) -> list[object]:
        return [
            *("--activations-path", activations, "--preset", "mechint", "--expansion", expansion, "--lam", config.lam),
            *("--steps", steps, "--batch-size", config.batch_size, "--runs-root", runs_root, "--run-name", run.name),
        ]

    title = "2/9  an SAE with 8 latents per dimension"
    stage(title, train.main, "scripts/train_sae.py", train_flags(large, 8, config.steps))
    stage(
        "3/9  what it reconstructs, and what splicing it in costs the model",
        evaluate.main,
        "scripts/eval_sae.py",
        ["--run-dir", large, "--output", large / "eval.json"],
    )
    write_eval_texts(texts, config.ablation_texts)
    stage(
        "4/9  every latent by the effect of removing it",
        ablate.main,
        "scripts/batch_ablate.py",
        [
            *("--checkpoint", large / "checkpoint.pt", "--config", large / "config.json"),
            *("--eval-texts-path", texts, "--output", ranking),
        ],
    )
    stage(
        "5/9  the same for all held-out texts, estimated and checked",
        rank.main,
        "scripts/rank_features.py",
        ["--run-dir", large],
    )
    stage(
        "6/9  which known concepts latents stand for",
        concepts.main,
        "scripts/score_concepts.py",
        ["--run-dir", large],
    )
    title = "7/9  a second SAE, with 4 latents per dimension"
    stage(title, train.main, "scripts/train_sae.py", train_flags(small, 4, max(config.steps // 2, 1)))
    stage(
        "8/9  which latents the two share",
        compare.main,
        "scripts/compare_expansions.py",
        ["--checkpoints", small / "checkpoint.pt", large / "checkpoint.pt", "--output", comparison],
    )

    stage("9/9  one page about it all", report.main, "scripts/make_report.py", [large])

    from mechint.report.figures import overview, save_figure
    from mechint.runs import Run

    save_figure(overview(Run(large)), figure)
    results = {
        "activations": activations,
        "SAE, 8x": large,
        "evaluation": large / "eval.json",
        "latents ranked": ranking,
        "concepts": large / "concepts.csv",
        "SAE, 4x": small,
        "comparison": comparison,
        "figures": figure,
        "report": large / "report.html",
    }
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The results lie in")
    for name, path in results.items():
        print(f"  {name:<15} {path}")
    print("Next: open notebooks/inspect-features.ipynb, or check the hashes with " + f"`mechint verify {large}`.")
    return 0


def stage(title: str, run: Callable[[list[str]], int], script: str, flags: Sequence[object]) -> None:
    """Print a command and run it in this process (torch is imported once). Raises `MechintError` if it fails."""
    words = [str(flag) for flag in flags]
    print(f"\n== {title}\n$ python {script} {shlex.join(words)}", flush=True)
    status = run(words)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise MechintError(f"{script} failed (see above); what was finished before is kept")


def next_run_dir(runs_root: Path, name: str) -> Path:
    """The directory that a new run called `name` will get: that, or the first free one of `name-1`, `name-2`, ..."""
    path, number = runs_root / name, 0
    while path.exists():
        number += 1
        path = runs_root / f"{name}-{number}"
    return path


def write_eval_texts(path: Path, count: int) -> None:
    """Held-out tales, one a line, as `batch_ablate.py` reads them."""
    from mechint.builtin.tales import tale
    from mechint.provenance import write_text

    write_text(path, "".join(" ".join(tale(i, "heldout", 0).text.split()) + "\n" for i in range(count)))
