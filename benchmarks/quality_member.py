"""One training on one world, and what came out of it: the unit that quality.py schedules. Single-threaded.

Worlds, both of d_in 128:
    tales      activations of the built-in model on its built-in texts, `blocks.3.hook_resid_post`; cross-entropy too
    synthetic  sparse sums of known directions: how many of them the decoder found is measured too

Everyone trains on the same rows and is measured by the same code: reconstruction and L0 on held-out rows, dead latents
as those that stay at 0 on DEAD_ROWS training rows, cross-entropy on held-out texts with `mechint.eval`.
"""

import contextlib
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "quality"
HOOK = "blocks.3.hook_resid_post"
N_TALES = 14_000  # about 1.16 million rows
N_SYNTHETIC = 1_000_000
N_DIRECTIONS = 768
DEAD_ROWS = 262_144
CE_TEXTS = 200
VAL_FRACTION = 0.05
TOPK_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")


class World(NamedTuple):
    path: Path
    train: Tensor  # row numbers
    val: Tensor
    rows: Tensor  # [n, d_in], mapped
    directions: Tensor | None  # [n_directions, d_in], of unit norm


class Applied(nn.Module):
    """A trained SAE of any family for code that wants `forward` -> (x_hat, feature_acts), in the activations' scale."""

    def __init__(self, encode: Any, decode: Any, W_dec: Tensor, scale: float = 1.0):
        super().__init__()
        self.encode_scaled, self.decode_scaled, self.scale = encode, decode, scale
        self.d_sae, self.d_in = W_dec.shape
        self.W_dec = self.W_enc = W_dec.detach()

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_scaled(x * self.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.encode(x)
        return self.decode_scaled(acts) / self.scale, acts


def make_tales(path: Path) -> None:
    from mechint.cli.collect import main

    words = ["--model", "builtin/pythia-tiny", "--dataset", "builtin/tales", "--hook", HOOK]
    if main([*words, "--num-texts", str(N_TALES), "--output", str(path)]):
        raise SystemExit("the collection failed")


def synthetic_rows(n: int, d_in: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows, directions). Of 768 random directions, on average 16 a row, in Zipf-like frequencies between 25 % and
    0.2 % of the rows; strengths from a gamma distribution of mean 1, a mean offset of norm 2, noise of norm 0.1."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(N_DIRECTIONS, d_in, generator=generator), dim=1)
    frequency = (torch.arange(1, N_DIRECTIONS + 1).float() + 10).pow(-0.8)
    frequency = (frequency * (16 / frequency.sum())).clamp(0.002, 0.25)
    frequency = frequency[torch.randperm(N_DIRECTIONS, generator=generator)]
    offset = torch.nn.functional.normalize(torch.randn(d_in, generator=generator), dim=0) * 2
    blocks = []
    for start in range(0, n, 50_000):
        size = min(50_000, n - start)
        active = torch.rand(size, N_DIRECTIONS, generator=generator) < frequency
        # The sum of four exponentials, divided by 4: gamma with shape 4, mean 1, standard deviation 1/2.
        strength = -torch.rand(4, size, N_DIRECTIONS, generator=generator).clamp_min_(1e-12).log_().mean(dim=0)
        noise = torch.randn(size, d_in, generator=generator) * (0.1 / d_in**0.5)
        blocks.append((active * strength) @ directions + offset + noise)
    return torch.cat(blocks), directions


@functools.cache
def open_world(name: str, seed: int) -> World:
    """The rows and their split, the one that `mechint train --seed` uses; made on first use."""
    from mechint.data import open_activations
    from mechint.data.batches import split_indices

    path = FOLDER / f"{name}.pt"
    extra = FOLDER / "synthetic-directions.pt"
    if not path.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        if name == "tales":
            make_tales(path)
        else:
            rows, directions = synthetic_rows(N_SYNTHETIC)
            torch.save(directions, extra)
            torch.save(rows, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    activations = open_activations(path)
    train, val = split_indices(activations, VAL_FRACTION, seed, "text" if name == "tales" else "row")
    known = torch.load(extra, weights_only=True) if name == "synthetic" else None
    return World(path, train, val, activations.tensor(), known)


def batch(world: World, step: int, batch_size: int, seed: int) -> Tensor:
    """Batch of a step: the training rows in a random order without repeats, another order each epoch."""
    per_epoch = len(world.train) // batch_size
    epoch, position = divmod(step, per_epoch)
    order = _order(len(world.train), seed * 1000 + epoch)
    picked = order[position * batch_size : (position + 1) * batch_size]
    return world.rows[world.train[picked]].float()


@functools.lru_cache(maxsize=1)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def input_scale(world: World, how: str) -> float:
    """What the peers multiply activations by: SAELens to a mean norm of sqrt(d_in), dictionary_learning to a mean
    squared norm of 1."""
    norms = world.rows[world.train[:: max(1, len(world.train) // 20_000)]].float().norm(dim=1)
    if how == "sqrt_d":
        return float(world.rows.shape[1] ** 0.5 / norms.mean())
    return {"none": 1.0, "unit": float(1 / norms.pow(2).mean().sqrt())}[how]


def train_peer(spec: dict[str, Any], world: World) -> Applied:
    from peer_trainers import FAMILIES, Recipe

    steps = spec["steps"]
    recipe = Recipe(
        architecture=spec["architecture"],
        d_in=world.rows.shape[1],
        d_sae=spec["d_sae"],
        steps=steps,
        batch_size=spec["batch_size"],
        lr=spec["lr"],
        sparsity=spec["sparsity"],
        lr_warmup=int(steps * spec.get("lr_warmup", 0.05)),
        sparsity_warmup=int(steps * spec.get("sparsity_warmup", 0.1)),
        decay=int(steps * spec.get("decay", 0.2)),
        dead_after=max(1, int(steps * spec.get("dead_after", 0.1))),
        seed=spec["seed"],
        options=spec.get("options", {}),
    )
    scale = input_scale(world, spec.get("scale", "none"))
    trainee = FAMILIES[spec["family"]](recipe)
    for step in range(steps):
        trainee.step(batch(world, step, spec["batch_size"], spec["seed"]) * scale)
    names = dict(trainee.module.named_parameters())
    W_dec = names["W_dec"] if "W_dec" in names else names["decoder.weight"].t()
    return Applied(trainee.encode, trainee.decode, W_dec, scale)


def train_ours(spec: dict[str, Any], world: World) -> Applied:
    """`mechint train` with the spec's flags, in a run directory under build/quality/runs."""
    from mechint.cli.train import main
    from mechint.sae import load_sae

    name = f"{spec['world']}-{key(spec)}"
    flag = "--k" if spec["architecture"] in TOPK_FAMILY else "--lam"
    flags = {
        "--activations-path": world.path,
        "--architecture": spec["architecture"],
        "--steps": spec["steps"],
        "--batch-size": spec["batch_size"],
        "--expansion": spec["d_sae"] // world.rows.shape[1],
        "--seed": spec["seed"],
        "--val-fraction": VAL_FRACTION,
        "--runs-root": FOLDER / "runs",
        "--run-name": name,
        spec.get("sparsity_flag", flag): f"{spec['sparsity']:g}",
    }
    words = [str(word) for pair in flags.items() for word in pair] + list(spec.get("flags", ()))
    run = FOLDER / "runs" / name
    if run.exists():  # of a member that was stopped; a finished one is never asked again
        run.rename(run.with_name(f"{name}-stopped-{time.time_ns()}"))
    log = FOLDER / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        failed = main(words)
    if failed:
        raise SystemExit(f"training failed ({log}): {' '.join(words)}")
    sae = load_sae(run / "sae")
    return Applied(sae.encode, sae.decode, sae.W_dec)


@torch.no_grad()
def measure(applied: Applied, world: World, *, ce: bool) -> dict[str, Any]:
    from mechint.eval.sums import ReconstructionSums, count_active

    sums = ReconstructionSums(applied.d_in, applied.d_sae)
    for picked in world.val.split(4096):
        x = world.rows[picked].float()
        x_hat, acts = applied(x)
        sums.add(x, x_hat, acts)
    metrics = sums.metrics()
    fired = torch.zeros(applied.d_sae, dtype=torch.long)
    every = max(1, len(world.train) // DEAD_ROWS)
    for picked in world.train[::every][:DEAD_ROWS].split(4096):
        fired += count_active(applied.encode(world.rows[picked].float()))
    result = {name: metrics[name] for name in ("l0", "fvu", "cosine", "l2_ratio", "n_val")}
    result["dead"] = int((fired == 0).sum())
    if world.directions is not None:
        rows = torch.nn.functional.normalize(applied.W_dec, dim=1)
        best = (world.directions @ rows.t()).amax(dim=1)
        result |= {"mmcs": float(best.mean()), "recovered": float((best > 0.9).float().mean())}
    if ce:
        result |= cross_entropy(applied, world)
    return result


def cross_entropy(applied: Applied, world: World) -> dict[str, float]:
    from mechint.eval.language import language_metrics, texts_from_rows

    activations, model = _model(world.path)
    texts = texts_from_rows(activations, world.val, max_texts=CE_TEXTS)
    mean = world.rows[world.train[::50]].float().mean(dim=0)
    found = language_metrics(applied, model, texts, mean, HOOK)  # type: ignore[arg-type]
    return {name: found[name] for name in ("ce_recovered_mean", "ce_recovered_zero", "ce_clean", "ce_sae")}


@functools.cache
def _model(path: Path) -> tuple[Any, Any]:
    from mechint.data import open_activations
    from mechint.models import load_model

    return open_activations(path), load_model("builtin/pythia-tiny", device="cpu", hook_name=HOOK)


def key(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def member_path(spec: dict[str, Any]) -> Path:
    return FOLDER / "members" / f"{spec['world']}-{spec['family']}-{spec['architecture']}-{key(spec)}.json"


def run_member(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with its `result`; read from disk if this very spec was run before."""
    path = member_path(spec)
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    world = open_world(spec["world"], spec["seed"])
    started = time.perf_counter()
    applied = train_ours(spec, world) if spec["family"] == "mechint" else train_peer(spec, world)
    seconds = time.perf_counter() - started
    done = spec | {"result": measure(applied, world, ce=spec["world"] == "tales") | {"seconds": seconds}}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(done, indent=1, sort_keys=True))
    unfinished.rename(path)
    return done
