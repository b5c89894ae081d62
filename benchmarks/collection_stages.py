"""Collection against a bare forward, and its stages one by one.

    python benchmarks/collection_stages.py forward --model FOLDER --hook blocks.14.hook_resid_post --dataset FILE.jsonl
    python benchmarks/collection_stages.py stages [--d-model 512] [--texts 6000]

`forward`: `collect`, end to end from a text file to shards on the disk, against the model alone over the same token
batches up to the same layer ("fast": with the products that collection uses; "plain": as torch does them). Interleaved
rounds in one process; ratios are collect's tokens a second over the model's.

`stages`: with a stand-in for the model that takes no time, what reading and tokenising, copying rows, and hashing and
writing cost alone, and all of them as `collect` runs them. Loading is left out everywhere.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from collection import make_model, write_texts  # the benchmark beside this one

from mechint.config import CollectConfig
from mechint.data import collect as collecting
from mechint.data.collect import block_of, collect, open_source
from mechint.data.windows import Block, WindowRows, run_block
from mechint.models import load_model
from mechint.models.matmul import FastLinear


def planned(config: CollectConfig, model: Any) -> list[Block]:
    """The blocks that `collect` makes of the texts."""
    source, blocks = open_source(config), []
    for start in range(0, config.num_texts, config.texts_per_shard):
        texts = source.read(start, min(config.texts_per_shard, config.num_texts - start))
        blocks.append(block_of(config, model, texts, start)[1])
    source.close()
    return blocks


def seconds(work: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timed(work: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Seconds that passed, and of processor time of all threads, which other work on the machine changes little."""
    started, spent = time.perf_counter(), time.process_time()
    work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - spent


def forward(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = load_model(args.model, device=args.device, dtype=args.dtype, hook_name=args.hook)
    config = CollectConfig(
        model=args.model,
        hook=args.hook,
        dataset=args.dataset,
        text_field=args.text_field,
        num_texts=args.texts,
        max_chars=args.max_chars,
        dtype=args.dtype,
        device=args.device,
        output=folder / "acts",
    )
    blocks = planned(config, model)
    n_tokens = sum(block.n_tokens for block in blocks)

    def bare(fast: bool) -> None:
        with FastLinear() if fast else contextlib.nullcontext():
            for block in blocks:
                for batch in block.batches:
                    model.activations_at(batch.tokens, [args.hook])

    wall: dict[str, list[float]] = {"plain": [], "fast": [], "collect": []}
    cpu: dict[str, list[float]] = {"plain": [], "fast": [], "collect": []}
    for number in range(args.rounds + 1):  # the first only warms up
        for name, took, spent in (("plain", *timed(bare, False)), ("fast", *timed(bare, True))):
            wall[name].append(took)
            cpu[name].append(spent)
        with mock.patch.object(collecting, "load_model", lambda *_, **__: model):
            started = time.process_time()
            wall["collect"].append(collect(config.with_overrides(output=folder / str(number)), progress=False).seconds)
            cpu["collect"].append(time.process_time() - started)
        speeds = {name: f"{n_tokens / values[-1]:,.0f} tokens/s" for name, values in wall.items()}
        print(
            "round",
            number,
            speeds,
            {name: f"{values[-1]:.1f} s of processor" for name, values in cpu.items()},
            flush=True,
        )
    report: dict[str, Any] = {"tokens_a_round": n_tokens, "dtype": args.dtype, "threads": torch.get_num_threads()}
    for name in ("plain", "fast"):
        report[f"collect_over_{name}"] = {
            "wall_median_of_ratios": middle_ratio(wall[name][1:], wall["collect"][1:]),
            "wall_of_best": min(wall[name][1:]) / min(wall["collect"][1:]),
            "processor_time_median_of_ratios": middle_ratio(cpu[name][1:], cpu["collect"][1:]),
        }
    return report


def middle_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def stages(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    make_model(folder / "model", hidden_size=args.d_model)
    write_texts(folder / "texts.txt", args.texts)
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(args.hooks))
    model = load_model(str(folder / "model"), device=args.device, dtype=args.dtype, hook_name=hooks[0])
    ready = torch.randn(2**17, args.d_model, dtype=model.hf_model.dtype, device=model.device)

    def at_once(tokens: torch.Tensor, hook_names: Any) -> dict[str, torch.Tensor]:
        rows = ready[: tokens.numel()].view(*tokens.shape, args.d_model)
        return dict.fromkeys(hook_names, rows)

    model.activations_at = at_once  # type: ignore[method-assign]
    config = CollectConfig(
        model=str(folder / "model"),
        hook=hooks,
        dataset=str(folder / "texts.txt"),
        num_texts=args.texts,
        max_chars=10_000,
        dtype=args.dtype,
        device=args.device,
        output=folder / "acts",
    )
    rounds = [one_round(config.with_overrides(output=folder / str(n)), model) for n in range(args.rounds + 1)][1:]
    took = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    n_tokens = sum(block.n_tokens for block in planned(config, model))
    alone = [took["read"], took["copy"], took["write"]]
    return {
        "tokens_a_round": n_tokens,
        "tokens_per_s": {name: round(n_tokens / value) for name, value in took.items()},
        "one_after_another_over_collect": sum(alone) / took["collect"],
        "slowest_stage_over_collect": max(alone) / took["collect"],
    }


def one_round(config: CollectConfig, model: Any) -> dict[str, float]:
    """Seconds of each stage alone, and of all of them in `collect`."""
    blocks: list[Block] = []
    rows: list[WindowRows] = []

    def read() -> None:
        blocks.extend(planned(config, model))

    def copy() -> None:
        rows.extend(run_block(model, config.hooks, block) for block in blocks)

    def write() -> None:
        for number, (block, found) in enumerate(zip(blocks, rows, strict=True)):
            shard = collecting._Shard(number, block, {"n_texts": 1, "texts_sha256": "", "state": None})
            for hook in config.hooks:
                folder = config.output.with_name(f"alone-{config.output.name}") / hook
                collecting._write_shard(shard, found, mock.Mock(folder=folder, hook=hook))

    took = {"read": seconds(read, "cpu"), "copy": seconds(copy, model.device), "write": seconds(write, "cpu")}
    rows.clear()
    with mock.patch.object(collecting, "load_model", lambda *_, **__: model):
        took["collect"] = collect(config, progress=False).seconds
    for name in (config.output.name, f"alone-{config.output.name}"):
        shutil.rmtree(config.output.with_name(name))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Collection against a bare forward, and its stages.")
    parser.add_argument("what", choices=("forward", "stages"))
    parser.add_argument("--model")
    parser.add_argument("--hook", default="blocks.3.hook_resid_post")
    parser.add_argument("--dataset")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--max-chars", type=int, default=10_000)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hooks", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps((forward if args.what == "forward" else stages)(args, Path(name)), indent=2))


if __name__ == "__main__":
    main()
