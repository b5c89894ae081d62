"""Check that the repository is laid out as its scripts, notebooks and documents expect; status 1 if it is not.

Errors: a file that commands or the old entry points need. Warnings: a folder that is made on demand, and leftovers.
"""

import json
import sys
from pathlib import Path

REQUIRED_FILES = (
    "train.py",
    "sae.py",
    "README.md",
    "Makefile",
    "constraints.txt",
    "scripts/collect_activations.py",
    "scripts/train_sae.py",
    "scripts/eval_sae.py",
    "scripts/batch_ablate.py",
    "scripts/compare_expansions.py",
    "scripts/rank_features.py",
    "scripts/score_concepts.py",
    "scripts/extract_steering.py",
    "scripts/steer.py",
    "scripts/make_report.py",
    "scripts/export_sae.py",
    "scripts/push_run.py",
    "scripts/push_dinov3.py",
    "scripts/train_builtin.py",
    "mechint/config/__init__.py",
    "mechint/sae/__init__.py",
    "mechint/data/__init__.py",
    "mechint/eval/__init__.py",
    "mechint/ablation/__init__.py",
    "mechint/analysis/__init__.py",
    "mechint/formats/__init__.py",
    "mechint/saelens/__init__.py",
    "mechint/hub/__init__.py",
    "mechint/server/__init__.py",
    "mechint/builtin/pythia-tiny/model.safetensors",
    "notebooks/inspect-features.ipynb",
    "notebooks/ablation.ipynb",
    "notebooks/concepts.ipynb",
    "notebooks/tour.ipynb",
    "notebooks/archive/README.md",
    "examples/saelens_api.py",
    "examples/demo_hub.py",
    "examples/dinov3.json",
)
EXPECTED_DIRS = ("activations", "runs", "saved_models", "scripts", "mechint", "tests", "docs", "benchmarks")
DEFAULT_ACTIVATIONS = "activations/activations_50000.pt"
LEFTOVERS = ("train_wandb.py", "colab-training.ipynb", "training_metrics/training_metrics_3016.csv")
MAX_RUN_CONFIGS = 3


def check(root: Path) -> tuple[list[str], list[str], list[str]]:
    """`(found, warnings, errors)` for the checkout at `root`."""
    found, warnings, errors = [], [], []
    for name in REQUIRED_FILES:
        if (root / name).is_file():
            found.append(name)
        else:
            errors.append(f"missing file: {name}")
    for name in EXPECTED_DIRS:
        if not (root / name).is_dir():
            warnings.append(f"missing folder: {name}/ (made when needed)")
    if not (root / DEFAULT_ACTIVATIONS).exists():
        warnings.append(f"no {DEFAULT_ACTIVATIONS} yet: scripts/collect_activations.py makes it")
    warnings += [f"leftover of an older version: {name}" for name in LEFTOVERS if (root / name).exists()]
    for path in sorted(root.glob("runs/*/config.json"))[:MAX_RUN_CONFIGS]:
        try:
            json.loads(path.read_text(encoding="utf-8"))
            found.append(str(path.relative_to(root)))
        except (OSError, ValueError) as error:
            errors.append(f"{path.relative_to(root)} is not JSON: {error}")
    return found, warnings, errors


def main() -> int:
    found, warnings, errors = check(Path(__file__).resolve().parent)
    for name in found:
        print(f"Found {name}")
    for text in warnings:
        print(f"Warning: {text}")
    for text in errors:
        print(f"Error: {text}", file=sys.stderr)
    if not errors:
        print("Default research pipeline layout looks good.")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
