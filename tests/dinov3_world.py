"""The repositories of examples/dinov3.json at tiny sizes: sweep files, random checkpoints in saev's format, metrics.

For each layer of a repository:

    8 runs, every second one commented out in the sweep file; 7 of them are on the frontier, `<...>d` is dominated
    layer 23 of the two repositories of ViT-L: also a vanilla run, better than all, in the same sweep file
    the first layer of each: one run without eval/normalized_mse, better than all in L0
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from other_formats import make

from mechint.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "push_dinov3.py"
SIZES = {384: 6, 768: 8, 1024: 10}  # d_model of the real ones -> here
D_SAE = 24
L0 = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
NMSE = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0125)


@dataclass(frozen=True)
class World:
    """`repos`: the file for --repos; `metrics`: the file for --metrics; `records`: what is in it."""

    root: Path
    repos: Path
    sweeps: Path
    runs: Path
    metrics: Path
    described: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @property
    def flags(self) -> list[str]:
        return ["--repos", str(self.repos), "--sweeps-root", str(self.sweeps), "--runs-root", str(self.runs)]


def run_id(repo: int, layer: int, which: str) -> str:
    """8 characters of [a-z0-9], as W&B's."""
    return f"{'sblt'[repo]}{layer:02d}run0{which}"[:8]


def make_world(root: Path) -> World:
    described = json.loads((ROOT / "examples" / "dinov3.json").read_text())
    described["runs_root"] = "no/such/folder"  # --runs-root wins
    records: dict[str, dict[str, Any]] = {}
    for index, spec in enumerate(described["repos"]):
        spec["d_model"], spec["d_sae"] = SIZES[spec["d_model"]], D_SAE
        tables: dict[str, list[str]] = {"vanilla_run_ids": [], "in1k_run_ids": [], "ade20k_run_ids": []}
        for layer in spec["layers"]:
            for which, (l0, nmse) in enumerate(zip((*L0, 20.0), (*NMSE, 0.35), strict=True)):
                name = run_id(index, layer, "d" if which == 7 else str(which))
                _run(root, records, name, spec, layer, l0 + layer / 100, nmse, which)
                tables["in1k_run_ids"].append(name)
        first = spec["layers"][0]
        name = run_id(index, first, "x")
        _run(root, records, name, spec, first, 2.0, None, 8)
        tables["in1k_run_ids"].append(name)
        if "ViT-L" in spec["repo"]:
            name = run_id(index, 23, "v")
            _run(root, records, name, spec, 23, 3.0, 0.001, 9, n_prefixes=None)
            tables["vanilla_run_ids"].append(name)
        if spec.get("tables"):  # another data set, whose runs look the same: only the table's name tells
            name = run_id(index, first, "a")
            _run(root, records, name, spec, first, 2.5, 0.002, 10)
            tables["ade20k_run_ids"].append(name)
        path = root / "sweeps" / spec["sweep_file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sweep_source(tables))
    (root / "repos.json").write_text(json.dumps(described))
    (root / "metrics.json").write_text(json.dumps(records))
    places = (root / "repos.json", root / "sweeps", root / "saev" / "runs", root / "metrics.json")
    return World(root, *places, described, records)


def sweep_source(tables: dict[str, list[str]]) -> str:
    """A sweep file that would end the process if it were executed."""
    lines = ['"""Inference on the runs of a sweep."""', "import sys", 'sys.exit("this file was executed")', ""]
    for name, ids in tables.items():
        lines.append(f"{name} = [")
        lines += [f'    # "{run}",  # done' if i % 2 else f'    "{run}",' for i, run in enumerate(ids)]
        lines.append("]")
    return "\n".join([*lines, "", "def make_cfgs():", "    return [dict(run=run_id) for run_id in in1k_run_ids]", ""])


def _run(
    root: Path, records: dict, name: str, spec: dict, layer: int, l0: float, nmse: float | None, seed: int,
    n_prefixes: int | None = 10,
) -> None:  # fmt: skip
    topk = spec["activation"] == "top-k"
    loaded = make("topk" if topk else "standard", spec["d_model"], D_SAE, seed, apply_b_dec_to_input=False)
    path = root / "saev" / "runs" / name / "checkpoint" / "sae.pt"
    path.parent.mkdir(parents=True)
    write = FORMATS["saev"].write
    assert write is not None
    write(loaded.variant(relu=False) if topk else loaded, path)
    key = {"key": "top-k", "top_k": loaded.k} if topk else {"key": "relu", "sparsity": {"coeff": 4e-4}}
    config = {
        "objective": {"n_prefixes": n_prefixes} if n_prefixes else {},
        "sae": {"d_model": spec["d_model"], "d_sae": D_SAE, "activation": key},
        "val_data": {"layer": layer},
    }
    (path.parent / "config.json").write_text(json.dumps(config))
    summary: dict[str, Any] = {"eval/l0": l0, "eval/mse": 1.0 / l0}
    if nmse is not None:
        summary["eval/normalized_mse"] = nmse
    records[name] = {"config": config, "summary": summary, "created_at": f"2025-11-{1 + seed:02d}T00:00:00"}


def chosen_ids(index: int, layer: int) -> list[str]:
    """Both ends, and of the five between them the four nearest to equal steps of log L0: not 32, the middle one."""
    return [run_id(index, layer, str(which)) for which in (0, 1, 2, 4, 5, 6)]


def run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def push(world: World, env: dict[str, str], cwd: Path, *more: str, metrics: bool = True):
    source = ["--metrics", str(world.metrics)] if metrics else []
    return run([str(SCRIPT), *world.flags, *source, *more], env, cwd)


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)
