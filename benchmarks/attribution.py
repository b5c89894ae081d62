"""Speed of the causal ranking at Pythia-70M's shape (random weights, 4096 random latents at L0 64).

Attribution of all latents: tokens a second, and what 100,000 tokens take at that rate (the cost is linear in tokens at
a given length of text; `--full` runs them all). Exact removal: (latent, text) pairs a minute, of which only those that
fire cost anything. Beside the wall time, the CPU time of the process over its threads: on a machine that others use it
is the steadier of the two. The reference of the attribution is one plain forward pass over the same tokens, in
interleaved rounds: the ratio is what does not depend on the neighbours.

    python benchmarks/attribution.py
    python benchmarks/attribution.py --full --length 128
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from ablation import HOOK, VOCAB, build_sae, save_model

from mechint.ablation import attribute
from mechint.ablation.rank import ablate_texts
from mechint.eval import Text
from mechint.models import load_model, matmul


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds a thread."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, (time.process_time() - cpu) / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a round")
    parser.add_argument("--length", type=int, default=128, help="tokens a text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--l0", type=float, default=64.0)
    parser.add_argument("--latents", type=int, default=100, help="latents removed in a round")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice if not given")
    parser.add_argument("--full", action="store_true", help="also attribute 100,000 tokens")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(2)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        model = load_model(folder, device="cpu")

    def texts(n_tokens: int, length: int) -> list[Text]:
        rows = torch.randint(1, VOCAB, (max(1, n_tokens // length), length), generator=generator).tolist()
        return [Text(row, [False] + [True] * (length - 1)) for row in rows]

    sae = build_sae(model, [" ".join(f"w{t}" for t in text.tokens[1:]) for text in texts(1024, args.length)], args.l0)
    sae.requires_grad_(False)
    batch = texts(args.tokens, args.length)
    tokens = torch.tensor([text.tokens for text in batch])
    short = texts(20 * 20, 20)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, oneDNN products: {matmul.onednn_pays()};"
        f" {tokens.numel()} tokens a round, {args.length} a text, {args.draws} draws"
    )
    work: dict[str, Callable[[], object]] = {
        "plain forward": lambda: [model.logits(part) for part in tokens.split(4)],
        "attribution": lambda: attribute(sae, model, HOOK, batch, draws=args.draws),
        "attribution, no draws": lambda: attribute(sae, model, HOOK, batch, draws=0),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    removed: dict[str, list[float]] = {"20 tokens": [], f"{args.length} tokens": []}
    n_active = (
        attribute(sae, model, HOOK, short, draws=0).n_active_texts,
        attribute(sae, model, HOOK, batch[:8], draws=0).n_active_texts,
    )
    for number in range(args.rounds):
        for name, run in work.items():
            times[name].append(timed(run))
        line = [f"{name} {times[name][-1][0]:.2f} s / CPU {times[name][-1][1]:.2f}" for name in work]
        for (name, values), some, count in zip(removed.items(), (short, batch[:8]), n_active, strict=True):
            latents = torch.randperm(sae.d_sae, generator=generator)[: args.latents].tolist()
            wall, cpu = timed(lambda some=some, latents=latents: ablate_texts(sae, model, HOOK, some, latents))
            firing = int(count[latents].sum())
            values.append(60 * firing / wall)
            line.append(
                f"exact, {name}: {len(some) * len(latents)} pairs, {firing} of them fire, {wall:.1f} s / CPU {cpu:.1f}"
            )
        print(f"round {number + 1}: " + "; ".join(line), flush=True)
    for name, values in times.items():
        wall, cpu = (statistics.median(part) for part in zip(*values, strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(values, times["plain forward"], strict=True))
        minutes, of_cpu = (1e5 * seconds / tokens.numel() / 60 for seconds in (wall, cpu))
        print(
            f"{name}: {tokens.numel() / wall:.0f} tokens/s; 100,000 tokens in {minutes:.1f} min (by CPU time"
            f" {of_cpu:.1f}); {ratio:.2f} times a plain forward"
        )
    for name, values in removed.items():
        print(f"exact removal, texts of {name}: {statistics.median(values):.0f} firing pairs a minute")
    if args.full:
        wall, cpu = timed(lambda: attribute(sae, model, HOOK, texts(100_000, args.length), draws=args.draws))
        print(f"all {sae.d_sae} latents over 100,000 tokens: {wall / 60:.1f} min (by CPU time {cpu / 60:.1f})")


if __name__ == "__main__":
    main()
