"""Speed of a training step against the peers, in interleaved rounds within one process. CPU.

    python benchmarks/train.py                       all architectures, 15 rounds (a quarter of an hour)
    python benchmarks/train.py --architectures standard --rounds 5
    python benchmarks/train.py --settings            the share that is mere library settings (processes of their own)
    python benchmarks/train.py --whole-run           3,000 steps from initialisation: same final loss and L0
    python benchmarks/train.py --sweep               `mechint sweep` of 8 SAEs against 8 runs in sequence (half an hour)

In each round every contender has one turn, in a random order: one step untimed, then steps for a quarter of a second
(at least one). Ratios are taken within a round and their median is quoted with the quartiles, so that a burst of other
work hits both sides; "min" is the best turn. The machine's own rates are measured in every round too (train_limit.py).
Everyone starts from the same weights and L0 stays put (train_rows.py); peers are given slices of rows in memory, their
best case; ours is timed on the same slices, and once more with rows picked from the file, as the original loop does.

Runs itself in the environment of benchmarks/peers.py. All rounds go to build/bench/train*.json; the table is markdown.
"""

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from peers import ROOT, run_inside

TURN_SECONDS = 0.25
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk")


def contenders(args: argparse.Namespace, rows: Any, weights: Any) -> list[Any]:
    from train_rows import L0S, original, ours, peer

    found = []
    for architecture in args.architectures:
        l0s = L0S.get(architecture, (float(args.k),))
        common = (rows, weights, args.batch_size)
        for l0 in l0s:
            for kernel in args.kernels:
                found.append(ours(architecture, kernel, *common, l0))
            if architecture == "standard" and "auto" in args.kernels:
                found.append(ours(architecture, "auto", *common, l0, fetch=True))
        if args.ours_only:
            continue
        if architecture == "standard":
            found.append(original(*common, l0s[0]))
        found.append(peer("saelens", architecture, *common, l0s[0]))
        found.append(peer("dictionary_learning", architecture, *common, l0s[0]))
        if architecture == "topk":
            found += [peer("sparsify", "topk", *common, l0s[0], optimizer=name) for name in ("adam", "signum")]
    return found


def take_turn(contender: Any, number: int) -> float:
    """Seconds a step."""
    contender.step(number)
    count, started = 0, time.perf_counter()
    while True:
        count += 1
        contender.step(number + count)
        elapsed = time.perf_counter() - started
        if elapsed > TURN_SECONDS:
            return elapsed / count


def run_rounds(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peer_trainers import matryoshka_widths
    from train_limit import Probe, limit_ms
    from train_rows import FOLDER, L0S, machine, make_rows, plant

    if args.threads:
        torch.set_num_threads(args.threads)
    rows, directions = make_rows(FOLDER / f"rows-{args.rows}-{args.d_in}.pt", args.rows, args.d_in)
    l0s = tuple({l0 for name in args.architectures for l0 in L0S.get(name, ())})
    weights = plant(rows, directions, args.d_sae, l0s)
    field = contenders(args, rows, weights)
    probe = Probe(args.batch_size, args.d_in, args.d_sae)
    shuffle = random.Random(args.seed)
    seconds: dict[str, list[float]] = {key(contender): [] for contender in field}
    for contender in field:  # compiled kernels, first pages
        contender.step(0)
    for number in range(args.rounds):
        probe.run()
        for contender in shuffle.sample(field, len(field)):
            seconds[key(contender)].append(take_turn(contender, 7 * number))
        shown = {name: round(1e3 * values[-1], 1) for name, values in seconds.items()}
        print(f"round {number + 1}/{args.rounds}: {shown}", file=sys.stderr, flush=True)
    rates = probe.rates()
    measured = []
    for contender in field:
        n_active = contender.n_active()
        n_prefixes = len(matryoshka_widths(args.d_sae)) if "matryoshka" in contender.architecture else 1
        measured.append(
            {
                "name": contender.name,
                "family": contender.family,
                "architecture": contender.architecture,
                "l0_wanted": contender.l0,
                "l0": n_active,
                "seconds": seconds[key(contender)],
                "limit": limit_ms(rates, args.batch_size, args.d_in, args.d_sae, n_active, n_prefixes),
            }
        )
    shape = {name: getattr(args, name) for name in ("d_in", "d_sae", "batch_size", "rows", "seed", "k")}
    return {"machine": machine(), "shape": shape, "rates": rates, "probe": probe.seconds, "contenders": measured}


def key(contender: Any) -> str:
    return f"{contender.name} at L0 {contender.l0}"


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median of the rounds' ratios, with the quartiles."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    if len(ratios) < 4:
        return f"{statistics.median(ratios):.1f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def tables(report: dict[str, Any]) -> str:
    shape, batch = report["shape"], report["shape"]["batch_size"]
    rates = ", ".join(f"{name} {value:.0f}" for name, value in report["rates"].items())
    lines = [
        f"d_in {shape['d_in']}, d_sae {shape['d_sae']}, batch {batch}, float32, "
        f"{len(report['contenders'][0]['seconds'])} rounds; {report['machine']['cpu']}, "
        f"{report['machine']['threads']} threads, torch {report['machine']['torch']}",
        f"best rates: {rates}",
        "",
    ]
    for architecture in dict.fromkeys(item["architecture"] for item in report["contenders"]):
        group = [item for item in report["contenders"] if item["architecture"] == architecture]
        mine = [item for item in group if item["family"] == "mechint"]
        # What peers are compared with: the best kernel's rows; the original loop with those that also fetch rows.
        auto = [item for item in mine if "dense kernel" not in item["name"] and "file" not in item["name"]] or mine
        fetching = [item for item in mine if "file" in item["name"]] or auto
        heads = "".join(f" | vs ours at L0 {item['l0']:.0f}" for item in auto)
        lines += [f"| {architecture} | L0 | ms min | ms median | vectors/s{heads} |", "|---" * (5 + len(auto)) + "|"]
        for item in group:
            seconds = item["seconds"]
            middle = statistics.median(seconds)
            l0 = f"{item['l0']:.0f}" if item["l0_wanted"] != "any" else f"any ({item['l0']:.0f})"
            cells = [item["name"], l0, f"{1e3 * min(seconds):.1f}", f"{1e3 * middle:.1f}", f"{batch / middle:,.0f}"]
            against = fetching if item["family"] == "original" else auto
            cells += [ratio(seconds, other["seconds"]) for other in against]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| ours | L0 | limit ms (product + Adam + gathers) | best ms | share of the limit |", "|---" * 5 + "|"]
    for item in report["contenders"]:
        if item["family"] == "mechint" and "file" not in item["name"]:
            limit, best = item["limit"], 1e3 * min(item["seconds"])
            parts = " + ".join(f"{limit[name]:.1f}" for name in ("product", "adam", "gathers"))
            share = f"{limit['limit'] / best:.0%}"
            lines.append(
                f"| {item['name']} | {item['l0']:.0f} | {limit['limit']:.1f} ({parts}) | {best:.1f} | {share} |"
            )
    return "\n".join(lines)


def save(report: dict[str, Any], name: str) -> None:
    from train_rows import FOLDER

    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"all rounds: {path.relative_to(ROOT)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps against the peers.")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernels", nargs="+", help="of ours: auto and dense; for a whole run auto alone")
    parser.add_argument("--ours-only", action="store_true", help="no peers: a look at the kernels alone")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=3000, help="of the whole run and of the sweep's members")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch's own choice if not given")
    parser.add_argument("--name", default="train", help="of the JSON")
    for what in ("settings", "whole-run", "sweep"):
        parser.add_argument(f"--{what}", action="store_true")
    args = parser.parse_args()
    args.kernels = args.kernels or (["auto"] if args.whole_run else ["auto", "dense"])
    if args.settings:
        from train_settings import run

        report, text = run(args)
    elif args.whole_run or args.sweep:
        import train_whole

        report, text = train_whole.sweep(args) if args.sweep else train_whole.whole_run(args)
    else:
        report = run_rounds(args)
        text = tables(report)
    kind = "-settings" if args.settings else "-whole" if args.whole_run else "-sweep" if args.sweep else ""
    save(report, args.name + kind)
    print(text)


if __name__ == "__main__":
    run_inside()
    main()
