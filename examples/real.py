"""The whole pipeline on a real language model and real texts: SmolLM2-135M, news and more, layers 9 and 14.

    make real                       # fetches model and texts once, then runs; results lie in build/real
    make real ROWS=50000            # a smaller one

Every step is a command that can be typed as it is shown. What it measures is printed as a table at the end, and written
to build/real/results.md; docs/real.md has those of one machine.
"""

import argparse
import json
import platform
import shlex
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
site.addsitedir(str(ROOT / "tests"))  # what is fetched is pinned there, for the tests that use it too

HOOKS = ("blocks.9.hook_resid_post", "blocks.14.hook_resid_post")
TRAINED = HOOKS[1]
ARCHITECTURES = {"topk": ["--k", "32"], "standard": ["--lam", "1"]}
TOKENS_A_TEXT = 100  # of this set, cut to 512 characters: a little below what it has, so that there are enough texts


class Steps:
    """Runs commands, shows them, and keeps how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, *words: object) -> None:
        typed = ["mechint", *map(str, words)]
        print(f"\n$ {shlex.join(typed)}", flush=True)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mechint", *typed[1:]], cwd=ROOT)
        self.seconds[name] = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{name} ended with status {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=300_000, help="activation vectors to collect at each hook")
    parser.add_argument("--steps", type=int, default=800, help="training steps of 2,048 vectors")
    parser.add_argument("--expansion", type=int, default=8, help="latents per input dimension")
    given = parser.parse_args()

    from real_material import FOLDER, LICENCES, fetch

    real = fetch()
    for name, licence in LICENCES.items():
        print(f"{name}: {licence}")
    out = (FOLDER / "run").relative_to(ROOT)
    for name in ARCHITECTURES:  # activations stay: collecting goes on where it stopped
        shutil.rmtree(ROOT / out / name, ignore_errors=True)
    run = Steps()
    texts = real.texts.relative_to(ROOT) / "161_agnews_0.csv.zst"
    run(
        *("collect", "collect", "--model", real.smollm2.relative_to(ROOT), "--hook", *HOOKS),
        *("--dataset", texts, "--text-field", "prompt", "--num-texts", given.rows // TOKENS_A_TEXT),
        *("--dtype", "bfloat16", "--output", out / "activations"),
    )
    activations = out / "activations" / TRAINED
    for name, options in ARCHITECTURES.items():
        run(
            *(f"train {name}", "train", "--preset", "mechint", "--architecture", name, *options),
            *("--expansion", given.expansion, "--steps", given.steps, "--batch-size", 2048),
            *("--activations-path", activations, "--runs-root", out, "--run-name", name),
        )
        run(f"eval {name}", "eval", out / name, "--max-eval-texts", 100)
    few = ("--num-texts", 40, "--exact-texts", 4, "--top", 30, "--control", 30)  # removing one costs half a second here
    run("rank topk", "rank", out / "topk", *few)
    run("report", "report", out / "topk", out / "standard", "--output", out / "report.html", "--overwrite")
    table = results(ROOT / out, run.seconds)
    (ROOT / out / "results.md").write_text(table)
    print(f"\n{table}\nreport: {out / 'report.html'}")


def results(out: Path, seconds: dict[str, float]) -> str:
    """What was measured, as Markdown."""
    store = json.loads((out / "activations" / TRAINED / "store.json").read_text())
    norms = store["norms"]
    lines = [
        f"{store['n_texts']:,} texts, {store['n_rows']:,} rows of width {store['d_in']} at each of {len(HOOKS)} hooks;"
        f" norms at {TRAINED}: median {norms['median']:.4g}, max {norms['max']:.4g}, {norms['n_outliers']} rows above"
        f" {norms['outlier_multiple']:g} times the median. {platform.machine()}, {total(seconds) / 60:.0f} minutes.",
        "",
        "| | " + " | ".join(ARCHITECTURES) + " |",
        "| --- |" + " --- |" * len(ARCHITECTURES),
    ]
    evals = [json.loads((out / name / "eval.json").read_text()) for name in ARCHITECTURES]
    summaries = [json.loads((out / name / "summary.json").read_text()) for name in ARCHITECTURES]
    for key in ("l0", "fvu", "ce_clean", "ce_sae", "ce_mean", "ce_recovered_mean"):
        lines.append(f"| {key} | " + " | ".join(f"{found[key]:.4g}" for found in evals) + " |")
    lines.append("| fvu without outliers | " + " | ".join(without(found) for found in evals) + " |")
    for key in ("dead_features", "num_features"):
        lines.append(f"| {key} | " + " | ".join(f"{found[key]:,}" for found in summaries) + " |")
    lines.append("| rows left out | " + " | ".join(f"{found['left_out']['n_rows']}" for found in summaries) + " |")
    lines += ["", "| step | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {taken:.0f} |" for name, taken in seconds.items()]
    return "\n".join(lines) + "\n"


def without(found: dict[str, Any]) -> str:
    typical = found.get("without_outliers")
    return "as above" if typical is None else f"{typical['fvu']:.4g}"


def total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


if __name__ == "__main__":
    main()
