"""How much of a difference in speed is mere library settings: the same step of each under other environment variables.

    default        as installed
    huge pages     THP_MEM_ALLOC_ENABLE=1: torch asks for transparent huge pages
    malloc         MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_: glibc keeps freed memory, so temporaries stop
                   faulting in new pages
    malloc, avx512 the same, and on AMD processors MKL made to take its AVX512 path, by a preloaded library of one line
                   that says the processor is Intel's (for diagnosis: it needs a C compiler, and is no advice)

Environment variables are read when a process starts, so every turn is a process of its own: rounds are interleaved, but
a burst can hit one turn and not the next. The steps are those of benchmarks/train.py, standard, one L0.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
STEPS = 3


def environments(folder: Path) -> dict[str, dict[str, str]]:
    found = {"default": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}, "malloc": MALLOC}
    library = avx512_shim(folder)
    if library is not None:
        found["malloc, avx512"] = MALLOC | {"LD_PRELOAD": str(library)}
    return found


def avx512_shim(folder: Path) -> Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or "AuthenticAMD" not in Path("/proc/cpuinfo").read_text()[:2000]:
        return None
    source, library = folder / "intel.c", folder / "intel.so"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True)
    return library if done.returncode == 0 else None


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from train_rows import FOLDER, L0S, machine, make_rows

    make_rows(FOLDER / f"rows-{args.rows}-{args.d_in}.pt", args.rows, args.d_in)
    shape = {name: getattr(args, name) for name in ("d_in", "d_sae", "batch_size", "rows", "threads")}
    shape["l0"] = L0S["standard"][0]
    settings, shuffle = environments(FOLDER), random.Random(args.seed)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    for number in range(args.rounds):
        for name in shuffle.sample(list(settings), len(settings)):
            words = [sys.executable, __file__, json.dumps(shape)]
            done = subprocess.run(words, env=os.environ | settings[name], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"the turn with {name} failed")
            for contender, value in json.loads(done.stdout.splitlines()[-1]).items():
                seconds[name].setdefault(contender, []).append(value)
        print(f"round {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    return {"machine": machine(), "shape": shape, "seconds": seconds}, table(seconds)


def table(seconds: dict[str, dict[str, list[float]]]) -> str:
    """Milliseconds a step, min / median, and the median of the default's over each setting's."""
    names = list(seconds["default"])
    lines = ["| ms a step: min / median (default's median over this one's) | " + " | ".join(names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for setting, values in seconds.items():
        cells = []
        for name in names:
            middle = statistics.median(values[name])
            gain = statistics.median(seconds["default"][name]) / middle
            cells.append(f"{1e3 * min(values[name]):.0f} / {1e3 * middle:.0f} ({gain:.2f}x)")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def turn(shape: dict[str, Any]) -> dict[str, float]:
    """Seconds a step of each, in this process: the best of STEPS after one that is not timed."""
    import torch
    from train_rows import FOLDER, make_rows, original, ours, peer, plant

    if shape["threads"]:
        torch.set_num_threads(shape["threads"])
    path = FOLDER / f"rows-{shape['rows']}-{shape['d_in']}.pt"
    rows, directions = make_rows(path, shape["rows"], shape["d_in"])
    l0 = shape["l0"]
    weights = plant(rows, directions, shape["d_sae"], (l0,))
    common = (rows, weights, shape["batch_size"], l0)
    contenders = [original(*common), *(peer(name, "standard", *common) for name in ("saelens", "dictionary_learning"))]
    contenders.append(ours("standard", "auto", *common))
    found = {}
    for contender in contenders:
        contender.step(0)
        best = float("inf")
        for number in range(STEPS):
            started = time.perf_counter()
            contender.step(1 + number)
            best = min(best, time.perf_counter() - started)
        found[contender.name] = best
    return found


if __name__ == "__main__":
    print(json.dumps(turn(json.loads(sys.argv[1]))))
