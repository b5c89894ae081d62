"""Whole trainings from initialisation: the same recipe for the original loop, SAELens and `mechint train`.

Blocks of steps are interleaved in one process, so that other work on the machine hits all of them; a training's time
is the sum of its blocks. Then all are measured on the same held-out rows: mean squared error, L0, dead latents and the
loss that the original defines, mse + lam * mean(f |decoder row|), with norms because SAELens leaves its rows free.

The recipe: Adam at a rate of 3e-4, warm-up over 5 % of the steps, sparsity warm-up over 10 %, then a cosine to 0 for
the original and for ours, and SAELens's constant rate with a linear decay over the last fifth; lam 3, which is
3 d_in / d_sae in SAELens's sums. Ours is what `mechint train` does: rows from the file, logs, the kernel it chooses.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_trainers import Recipe, saelens
from torch import Tensor
from train_rows import FOLDER, OriginalLoop, OriginalSAE, machine, make_rows

LR, LAM, BLOCK = 3e-4, 3.0, 25
SEED = 0


class Runner(NamedTuple):
    name: str
    step: Callable[[int], object]
    forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # (x_hat, feature_acts, norms of the decoder rows)


def learning_rate(step: int, steps: int) -> float:
    warmup = int(0.05 * steps)
    if step < warmup:
        return LR * step / warmup
    return LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def run_original(rows: Tensor, train: Tensor, args: argparse.Namespace) -> Runner:
    torch.manual_seed(SEED)
    sae = OriginalSAE(None, args.d_in, args.d_sae)
    loop = OriginalLoop(rows, sae, args.batch_size, among=train)

    def step(number: int) -> None:
        lam = LAM * min(1.0, number / (0.1 * args.steps))
        loop.step(learning_rate(number, args.steps), lam)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *sae(x), sae.W_dec.norm(dim=1)

    return Runner("original loop", step, forward)


def run_saelens(rows: Tensor, train: Tensor, args: argparse.Namespace) -> Runner:
    recipe = Recipe(
        "standard",
        args.d_in,
        args.d_sae,
        args.steps,
        args.batch_size,
        LR,
        LAM * args.d_in / args.d_sae,
        lr_warmup=int(0.05 * args.steps),
        sparsity_warmup=int(0.1 * args.steps),
        decay=int(0.2 * args.steps),
        seed=SEED,
    )
    trainee = saelens(recipe)
    W_dec = dict(trainee.module.named_parameters())["W_dec"]
    generator = torch.Generator().manual_seed(SEED)

    def step(number: int) -> None:
        # Its step is timed on rows in memory elsewhere; here it has to read them, as everybody does.
        picked = torch.randint(0, len(train), (args.batch_size,), generator=generator)
        trainee.step(rows[train[picked].sort().values])

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        acts = trainee.encode(x)
        return trainee.decode(acts), acts, W_dec.norm(dim=1)

    return Runner("SAELens", step, forward)


def run_ours(path: Path, args: argparse.Namespace, kernel: str) -> tuple[Runner, Tensor, Tensor]:
    """`mechint train`, step by step; also the row numbers it trains on and those it holds out."""
    from mechint.config import SAETrainConfig
    from mechint.data import open_activations
    from mechint.train.layout import make_layout
    from mechint.train.resolve import resolve, split
    from mechint.train.training import advance, prepare

    settings = {
        "activations_path": str(path),
        "activation_dim": args.d_in,
        "expansion": args.d_sae // args.d_in,
        "epochs": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": LR,
        "l1_lambda": LAM,
        "warmup_steps": 0.05,
        "lambda_warmup_steps": 0.1,
        "seed": SEED,
        "kernel": kernel,
        "runs_root": str(FOLDER / "runs"),
        "run_name": f"whole-{kernel}-{time.time_ns()}",
        "split_by": "row",
    }
    activations = open_activations(path)
    config = resolve(SAETrainConfig.from_dict(settings), activations)
    train, val = split(config, activations)
    training = prepare(config, activations, (train, val), make_layout(config), resumed=False)
    training.log.write = lambda line: None

    def step(number: int) -> None:
        assert training.state.step == number
        advance(training, activations.rows(training.batches.indices(number)))

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sae = training.state.sae
        return *sae.run(x), sae.W_dec.norm(dim=1)

    return Runner(f"ours, {training.kernel.name} kernel", step, forward), train, val


@torch.no_grad()
def measure(runner: Runner, rows: Tensor, val: Tensor) -> dict[str, float]:
    error = l1 = active = 0.0
    fired = torch.zeros(1, dtype=torch.bool)
    for part in val.split(2048):
        x = rows[part]
        x_hat, acts, norms = runner.forward(x)
        error += float((x_hat - x).square().sum())
        l1 += float((acts * norms).sum())
        active += float((acts > 0).sum())
        fired = fired | (acts > 0).any(dim=0)
    count = len(val)
    mse = error / count / rows.shape[1]
    dead = float((~fired).sum())
    return {"loss": mse + LAM * l1 / count / len(fired), "mse": mse, "l0": active / count, "dead": dead}


def whole_run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    path = FOLDER / f"rows-{args.rows}-{args.d_in}.pt"
    rows, _ = make_rows(path, args.rows, args.d_in)
    runners = []
    train = val = torch.empty(0)
    for kernel in args.kernels:
        runner, train, val = run_ours(path, args, kernel)
        runners.append(runner)
    if not args.ours_only:
        runners += [run_original(rows, train, args), run_saelens(rows, train, args)]
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    density: list[float] = []
    for start in range(0, args.steps, BLOCK):
        for runner in runners:
            began = time.perf_counter()
            for number in range(start, min(start + BLOCK, args.steps)):
                runner.step(number)
            seconds[runner.name].append(time.perf_counter() - began)
        density.append(measure(runners[0], rows, val[:2048])["l0"])
        so_far = {name: round(sum(values), 1) for name, values in seconds.items()}
        print(f"{min(start + BLOCK, args.steps)}/{args.steps} steps, L0 {density[-1]:.0f}: {so_far}", file=sys.stderr)
    found = {runner.name: measure(runner, rows, val) for runner in runners}
    report = {"machine": machine(), "block": BLOCK, "seconds": seconds, "l0_by_block": density, "held_out": found}
    for folder in (FOLDER / "runs").glob("whole-*"):
        shutil.rmtree(folder)
    return report, whole_table(report, runners[0].name)


def whole_table(report: dict[str, Any], base: str) -> str:
    total = {name: sum(values) for name, values in report["seconds"].items()}
    lines = [
        f"| {len(report['l0_by_block']) * report['block']} steps | seconds | times ours | loss | mse | L0 | dead |",
        "|---" * 7 + "|",
    ]
    for name, values in report["held_out"].items():
        cells = [f"{total[name]:.0f}", f"{total[name] / total[base]:.1f}", f"{values['loss']:.5f}"]
        cells += [f"{values['mse']:.5f}", f"{values['l0']:.1f}", f"{values['dead']:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    shown = report["l0_by_block"]
    picked = [f"{shown[round(share * (len(shown) - 1))]:.0f}" for share in (0, 0.05, 0.1, 0.25, 0.5, 1)]
    lines.append(f"\nL0 after the first block, 5 %, 10 %, 25 %, 50 % and all of the steps: {', '.join(picked)}")
    return "\n".join(lines)


def sweep(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """8 standard SAEs (two expansions, four lam) in one `mechint sweep`, and one after another with `mechint train`.

    Whole commands, start-up and final evaluation included; which goes first changes with every round."""
    path = FOLDER / f"rows-{args.rows}-{args.d_in}.pt"
    make_rows(path, args.rows, args.d_in)
    lams, base = (2.0, 3.0, 4.0, 6.0), args.d_sae // args.d_in
    expansions = (max(1, base // 2), base)
    settings = {"batch_size": args.batch_size, "warmup_steps": 0.05, "lambda_warmup_steps": 0.1, "split_by": "row"}
    common = ["--activations-path", path, "--steps", args.steps, "--lr", LR, "--runs-root", FOLDER / "runs"]
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    pairs = [f"{name}={value}" for name, value in settings.items()]

    def call(*words: object) -> None:
        command = [sys.executable, "-m", "mechint", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")

    def in_sequence() -> None:
        for expansion in expansions:
            for lam in lams:
                call("train", *common, *flags, "--expansion", expansion, "--lam", lam)

    def together() -> None:
        call("sweep", *common, "--expansion", *expansions, "--lam", *lams, "--eval-texts", 0, "--set", *pairs)

    seconds: dict[str, list[float]] = {"one after another": [], "mechint sweep": []}
    for number in range(max(1, args.rounds // 5)):
        turns = [("one after another", in_sequence), ("mechint sweep", together)]
        for name, work in turns if number % 2 == 0 else turns[::-1]:
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(FOLDER / "runs", ignore_errors=True)
            print(f"{name}: {seconds[name][-1]:.0f} s", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(seconds["one after another"], seconds["mechint sweep"], strict=True)]
    text = f"8 SAEs, {args.steps} steps: " + json.dumps({name: [round(v) for v in vs] for name, vs in seconds.items()})
    return {"machine": machine(), "seconds": seconds, "ratios": ratios}, f"{text}; times faster: {ratios}"
