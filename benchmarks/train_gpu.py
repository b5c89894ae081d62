"""Speed of a training step on a CUDA GPU: vectors a second, beside SAELens and sparsify and the device's own limit.

    python benchmarks/train_gpu.py                                  ours alone, whatever the environment
    python benchmarks/peers.py benchmarks/train_gpu.py              with the peers (makes their environment)
    python benchmarks/train_gpu.py --shapes 512x4096 --precisions bf16 --profile

Batches lie in the device's memory. One contender at a time is built, warmed up (ours is captured then) and timed in
turns of a quarter of a second, and freed: at 4096x131072 two would not fit together. The product is timed again beside
each, so that a device that changed its clock shows. Weights move by a learning rate of 1e-6, so that L0 stays where a
bias put it (standard) or is k. Peers get the same precision: TF32 by torch's switch, bf16 by autocast around the step.

    limit = min(dense, sparse) of    dense  = 10 B d m / G + 28 P / S
                                     sparse =  2 B d m / G + 28 P / S + 16 B d L0 / R

B vectors a step, d width, m latents, P parameters. All measured here: G the product's rate at this precision and shape,
S a copy's bytes a second (Adam reads and writes 28 a parameter), R bytes a second of gathered and summed rows (the
decoder twice, and the batch and its residual for the two weight gradients).
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STILL = 1e-6
POOL = 8  # batches in memory


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, at_least: float = 0.05) -> float:
    """Seconds a call, after one untimed."""
    work()
    synchronize(device)
    count, started = 0, time.perf_counter()
    while True:
        work()
        count += 1
        if count % 4 == 0 or device != "cuda":
            synchronize(device)
            if (elapsed := time.perf_counter() - started) > at_least:
                return elapsed / count


@contextlib.contextmanager
def peers_precision(precision: str, device: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Setting:
    """One shape at one precision: data, planted weights and the device's rates."""

    def __init__(self, args: argparse.Namespace, d_in: int, d_sae: int, precision: str):
        self.device, self.batch, self.d_in, self.d_sae = args.device, args.batch_size, d_in, d_sae
        self.precision, self.k, self.l0 = precision, args.k, args.l0
        generator = torch.Generator(self.device).manual_seed(0)
        self.x = torch.randn(POOL, self.batch, d_in, device=self.device, generator=generator)
        self.W_dec = torch.randn(d_sae, d_in, device=self.device, generator=generator)
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        # of a few vectors' pre-activations, the value above which l0 of a vector's lie
        pre = (self.x[0, :64] @ self.W_dec.t()).flatten()
        self.cut = float(pre.topk(max(1, min(len(pre), round(self.l0 * 64)))).values[-1])

    def product_rate(self) -> float:
        from mechint.kernels.gpu.products import Products

        mm = Products(self.precision, torch.device(self.device))
        a, b = mm.cast(self.x[0]), mm.cast(self.W_dec).t()
        with mm.active():
            return 2 * self.batch * self.d_in * self.d_sae / seconds_of(lambda: mm(a, b), self.device)

    def rates(self) -> dict[str, float]:
        source = torch.empty(2**28 if self.device == "cuda" else 2**22, device=self.device)
        target = torch.empty_like(source)
        stream = 8 * source.numel() / seconds_of(lambda: target.copy_(source), self.device)
        per_row = max(1, min(32, self.d_sae))
        picked = torch.randint(0, self.d_sae, (self.batch, per_row), device=self.device)

        def gather() -> None:
            torch.nn.functional.embedding_bag(picked, self.W_dec, mode="sum")

        rows = 4 * self.d_in * picked.numel() / seconds_of(gather, self.device)
        return {"product": self.product_rate(), "stream": stream, "gather": rows}

    def limit(self, rates: dict[str, float], l0: float) -> float:
        """Seconds a step cannot go below."""
        product = 2 * self.batch * self.d_in * self.d_sae / rates["product"]
        adam = 28 * (2 * self.d_in * self.d_sae + self.d_in + self.d_sae) / rates["stream"]
        return adam + min(5 * product, product + 16 * self.batch * self.d_in * l0 / rates["gather"])


def ours(setting: Setting, architecture: str, sparse: bool | None) -> Callable[[int], Any]:
    from mechint.kernels import StepSettings
    from mechint.kernels.gpu import ManualKernel
    from mechint.sae import Objective, build_sae

    options = {"k": setting.k} if architecture == "topk" else {}
    with torch.device(setting.device):
        generator = torch.Generator(setting.device)
        sae = build_sae(architecture, setting.d_in, setting.d_sae, options=options, generator=generator)
    with torch.no_grad():
        sae.W_dec.copy_(setting.W_dec)
        sae.W_enc.copy_(setting.W_dec.t())
        if architecture == "standard":
            sae.get_parameter("b_enc").fill_(-setting.cut)
    optimizer = torch.optim.Adam(sae.parameters(), lr=STILL, fused=True)
    kernel = ManualKernel(sae, optimizer, precision=setting.precision, sparse=sparse)
    settings = StepSettings(STILL, 1.0, Objective(sparsity=STILL))
    return lambda number: kernel.step(setting.x[number % POOL], settings)


def peer(setting: Setting, family: str, architecture: str) -> Callable[[int], Any]:
    from peer_trainers import FAMILIES, Recipe, set_weights

    sparsity = setting.k if architecture == "topk" else STILL
    recipe = Recipe(
        architecture,
        setting.d_in,
        setting.d_sae,
        steps=1_000_000,
        batch_size=setting.batch,
        lr=STILL,
        sparsity=sparsity,
        dead_after=1_000_000,
        device=setting.device,
        options={"optimizer": "adam"} if family == "sparsify" else {},
    )
    trainee = FAMILIES[family](recipe)
    bias = torch.full((setting.d_sae,), -setting.cut if architecture == "standard" else 0.0, device=setting.device)
    set_weights(trainee, setting.W_dec.t(), bias, setting.W_dec, torch.zeros(setting.d_in, device=setting.device))

    def step(number: int) -> None:
        with peers_precision(setting.precision, setting.device):
            trainee.step(setting.x[number % POOL])

    return step


def contenders(args: argparse.Namespace, architecture: str) -> dict[str, Callable[[Setting], Callable[[int], Any]]]:
    """Ours by both ways and by its own choice, and the peers that this environment has."""
    from mechint.kernels.gpu import skip_zeros

    found: dict[str, Callable[[Setting], Callable[[int], Any]]] = {
        "ours": lambda setting: ours(setting, architecture, None),
        "ours, dense": lambda setting: ours(setting, architecture, False),
    }
    if args.device == "cuda" and skip_zeros.has_triton(torch.device(args.device)):
        found["ours, zeros skipped"] = lambda setting: ours(setting, architecture, True)
    if args.peers and importlib.util.find_spec("sae_lens"):
        found["SAELens"] = lambda setting: peer(setting, "saelens", architecture)
    if args.peers and architecture == "topk" and importlib.util.find_spec("sparsify"):
        found["sparsify"] = lambda setting: peer(setting, "sparsify", architecture)
    return found


def time_one(
    args: argparse.Namespace, setting: Setting, make: Callable[[Setting], Callable[[int], Any]]
) -> dict[str, Any]:
    """Seconds a step in each turn; an out-of-memory is a result too."""
    number = 0

    def next_step() -> Any:
        nonlocal number
        number += 1
        return step(number)

    try:
        step = make(setting)
        for _ in range(args.warm_up):
            result = next_step()
        turns = [seconds_of(next_step, args.device, args.turn) for _ in range(args.turns)]
        found: dict[str, Any] = {"seconds": turns, "product_beside": setting.product_rate()}
        if result is not None:  # ours
            found["l0"] = next_step().n_active.item() / setting.batch
        if args.profile:
            profile(next_step)
        return found
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def profile(step: Callable[[], Any]) -> None:
    """The kernels that a step's time goes to, on stderr."""
    with torch.profiler.profile() as record:
        for _ in range(5):
            step()
    order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(record.key_averages().table(sort_by=order, row_limit=20), file=sys.stderr)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for shape in args.shapes:
        d_in, d_sae = (int(word) for word in shape.split("x"))
        for precision in args.precisions:
            setting = Setting(args, d_in, d_sae, precision)
            rates = setting.rates()
            free(args.device)
            for architecture in args.architectures:
                l0 = float(args.k) if architecture == "topk" else float(args.l0)
                entry: dict[str, Any] = {
                    "shape": shape,
                    "precision": precision,
                    "architecture": architecture,
                    "rates": rates,
                    "limit_seconds": setting.limit(rates, l0),
                    "contenders": {},
                }
                for name, make in contenders(args, architecture).items():
                    entry["contenders"][name] = time_one(args, setting, make)
                    free(args.device)
                    print(f"{shape} {precision} {architecture} {name}: done", file=sys.stderr, flush=True)
                found.append(entry)
            del setting
            free(args.device)
    return found


def table(args: argparse.Namespace, entries: list[dict[str, Any]]) -> str:
    lines = []
    for entry in entries:
        rates, results = entry["rates"], entry["contenders"]
        lines += [
            f"{entry['architecture']} {entry['shape']}, {entry['precision']}, batch {args.batch_size}: product"
            f" {rates['product'] / 1e12:.1f} TFLOP/s, copy {rates['stream'] / 1e9:.0f} GB/s, gather"
            f" {rates['gather'] / 1e9:.0f} GB/s; limit {args.batch_size / entry['limit_seconds']:,.0f} vectors/s",
            "",
            "| | L0 | ms min | ms median | vectors/s | share of the limit | ours is faster by |",
            "|---" * 7 + "|",
        ]
        mine = statistics.median(results["ours"].get("seconds", [float("nan")]))
        for name, result in results.items():
            if "failed" in result:
                lines.append(f"| {name} | | | | {result['failed']} | | |")
                continue
            middle = statistics.median(result["seconds"])
            cells = [
                name,
                f"{result['l0']:.0f}" if "l0" in result else "",
                f"{1e3 * min(result['seconds']):.3f}",
                f"{1e3 * middle:.3f}",
                f"{args.batch_size / middle:,.0f}",
                f"{entry['limit_seconds'] / middle:.0%}",
                "" if name == "ours" else f"{middle / mine:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time training steps on a CUDA GPU.")
    parser.add_argument("--shapes", nargs="+", default=["512x4096", "512x16384", "4096x131072"], help="d_in x d_sae")
    parser.add_argument("--architectures", nargs="+", default=["standard", "topk"], choices=["standard", "topk"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "tf32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l0", type=int, default=64, help="of standard")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn", type=float, default=0.25, help="seconds")
    parser.add_argument(
        "--warm-up", type=int, default=70, help="steps; ours looks at its density in the first and 65th"
    )
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--profile", action="store_true", help="the kernels behind each figure, on stderr")
    parser.add_argument("--device", default="cuda", help="cpu: for a look at the benchmark itself")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    if args.peers and not importlib.util.find_spec("sae_lens"):
        print("no peers here: python benchmarks/peers.py benchmarks/train_gpu.py has them", file=sys.stderr)
    entries = measure(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    path = ROOT / "build" / "bench" / "train-gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": name, "torch": torch.__version__, "entries": entries}, indent=1) + "\n")
    print(f"{name}, torch {torch.__version__}\n\n{table(args, entries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
