"""Quality at equal data and equal steps: ours against SAELens and dictionary_learning, at the same L0. CPU.

    python benchmarks/quality.py peers --architectures standard topk          tune the peers, then three seeds
    python benchmarks/quality.py ours --name canonical --architecture standard -- --learning-rate 1e-3
    python benchmarks/quality.py table                                        everything measured so far, as markdown

At each of the L0 (16, 32, 64): the coefficient is searched on a logarithmic scale until two trainings bracket the L0
closely, and FVU, ce_recovered and the rest are read off between them, linearly in log L0 (FVU in log FVU). For the topk
family k is the L0. Peers are tuned over --lrs and their own input scalings at L0 --tune-at with the first seed;
warm-ups of 5 % (learning rate) and 10 % (sparsity), decay over the last fifth, dead after 10 % of the steps.

Every training ("member") is single-threaded and leaves one JSON under build/quality/members: a stopped search goes on
where it was. Two run side by side. Runs itself in the environment of benchmarks/peers.py.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from peers import run_inside
from quality_member import FOLDER, TOPK_FAMILY, input_scale, open_world, run_member

TARGETS = (16.0, 32.0, 64.0)
# Where the search for a coefficient begins, as a share of the vectors' mean norm (in the scale that the SAE sees): any
# value does, a good one saves two trainings. Peers sum over d_in and d_sae where ours averages.
FIRST_GUESS = {"standard": 0.12, "standard_april": 0.12, "gated": 0.12, "jumprelu": 0.01}
# Two trainings whose L0 differ by less than this factor bracket a target closely enough to interpolate.
CLOSE = 1.6
MOST_MEMBERS = 9
METRICS = ("fvu", "ce_recovered_mean", "dead", "mmcs", "recovered", "cosine")
Spec = dict[str, Any]


def is_topk(spec: Spec) -> bool:
    return spec["architecture"] in TOPK_FAMILY


def next_coefficient(points: Sequence[tuple[float, float]], target: float, guess: float) -> float | None:
    """The coefficient to try next, from (coefficient, L0) so far; None if the target is bracketed or met.

    Outside of what was tried: log L0 falls linearly in log coefficient, with the slope of the two nearest points
    (-1.4 with one point), by at most a factor of 8 a step. Inside: by interpolation, kept off the ends of the bracket.
    """
    points = sorted((lam, l0) for lam, l0 in points if l0 > 0)
    if not points:
        return guess
    if any(abs(math.log(l0 / target)) < 0.02 for _, l0 in points):
        return None
    above = [point for point in points if point[1] > target]  # too dense
    below = [point for point in points if point[1] < target]
    if above and below:
        low, high = min(above, key=lambda point: point[1]), max(below, key=lambda point: point[1])
        if low[1] / high[1] < CLOSE:
            return None
        share = math.log(low[1] / target) / math.log(low[1] / high[1])
        return low[0] * (high[0] / low[0]) ** min(max(share, 0.15), 0.85)
    side = above or below
    # Of equally near ones (everything active, say) the outermost, so that the search goes on.
    outward = -1 if above else 1
    near = min(side, key=lambda point: (abs(math.log(point[1] / target)), outward * point[0]))
    others = [point for point in points if point is not near and point[0] != near[0]]
    slope = -1.4
    if others:
        other = min(others, key=lambda point: abs(math.log(point[1] / near[1])))
        slope = math.log(other[1] / near[1]) / math.log(other[0] / near[0])
        slope = min(max(slope, -3.0), -0.4)
    factor = (target / near[1]) ** (1 / slope)
    # A little past the target, so that the next two trainings bracket it.
    factor **= 1.15
    return near[0] * min(max(factor, 1 / 8), 8.0)


def interpolate(results: Iterable[dict[str, Any]], target: float) -> dict[str, float] | None:
    """The metrics at exactly this L0, between the two nearest trainings around it; None if it is not bracketed."""
    found = sorted((result for result in results if result["l0"] > 0), key=lambda result: result["l0"])
    near = [result for result in found if abs(math.log(result["l0"] / target)) < 0.02]
    if near:
        best = min(near, key=lambda result: abs(math.log(result["l0"] / target)))
        return {name: best[name] for name in METRICS if best.get(name) is not None}
    below = [result for result in found if result["l0"] < target]
    above = [result for result in found if result["l0"] > target]
    if not below or not above:
        return None
    a, b = below[-1], above[0]
    share = math.log(target / a["l0"]) / math.log(b["l0"] / a["l0"])
    values = {}
    for name in METRICS:
        if a.get(name) is None or b.get(name) is None:
            continue
        if name == "fvu":
            values[name] = math.exp((1 - share) * math.log(a[name]) + share * math.log(b[name]))
        else:
            values[name] = (1 - share) * a[name] + share * b[name]
    return values


def run_curve(job: tuple[Spec, tuple[float, ...], tuple[float, ...]]) -> list[dict[str, Any]]:
    """All members of one setting and seed: a job is (spec without sparsity, L0 targets, coefficients to begin with)."""
    spec, targets, first = job
    # What an earlier search left is a start for this one.
    done = [member for member in load_members() if setting(member) == setting(spec) and member["seed"] == spec["seed"]]
    before = len(done)

    def add(sparsity: float) -> None:
        sparsity = float(f"{sparsity:.4g}")
        if any(member["sparsity"] == sparsity for member in done):
            return
        member = run_member(spec | {"sparsity": sparsity})
        done.append(member)
        result = member["result"]
        print(
            f"{spec['family']} {spec['architecture']} lr {spec.get('lr', '')} scale {spec.get('scale', '')}"
            f" {' '.join(spec.get('flags', ()))} seed {spec['seed']}: sparsity {member['sparsity']:g} -> L0"
            f" {result['l0']:.1f} FVU {result['fvu']:.4f} dead {result['dead']} ({result['seconds']:.0f} s)",
            file=sys.stderr,
            flush=True,
        )

    if is_topk(spec):
        first = targets
    elif aims_at_l0(spec):
        first = tuple(target * factor for target in targets for factor in (0.87, 1.15))
    for sparsity in first:
        add(sparsity)
    if is_topk(spec) or aims_at_l0(spec):
        return done
    guess = first_guess(spec)
    for target in targets:
        while len(done) < before + len(first) + MOST_MEMBERS:
            tried = [(member["sparsity"], member["result"]["l0"]) for member in done]
            sparsity = next_coefficient(tried, target, guess)
            size = len(done)
            if sparsity is not None:
                add(sparsity)
            if len(done) == size:  # found, or nothing finer than four digits is left to try
                break
    return done


def aims_at_l0(spec: Spec) -> bool:
    """dictionary_learning's JumpReLU penalty is around a target L0, which it misses by some percent."""
    return (spec["family"], spec["architecture"]) == ("dictionary_learning", "jumprelu")


def first_guess(spec: Spec) -> float:
    world = open_world(spec["world"], spec["seed"])
    norm = float(world.rows[:: len(world.rows) // 10_000].float().norm(dim=1).mean())
    share = FIRST_GUESS.get(spec["architecture"], 0.1)
    if spec["family"] == "mechint":
        return share * norm * spec["d_sae"] / world.rows.shape[1]
    return share * norm * input_scale(world, spec["scale"])


def at_targets(members: Sequence[dict[str, Any]], targets: Sequence[float]) -> dict[float, dict[str, float]]:
    """Interpolated metrics by target. A topk member stands for its k, whatever L0 it has on held-out rows."""
    if members and is_topk(members[0]):
        by_k = {member["sparsity"]: member["result"] for member in members}
        return {k: {n: by_k[k][n] for n in METRICS if n in by_k[k]} for k in targets if k in by_k}
    results = [member["result"] for member in members]
    found = {target: interpolate(results, target) for target in targets}
    return {target: values for target, values in found.items() if values is not None}


def run_all(jobs: Sequence[tuple[Spec, tuple[float, ...], tuple[float, ...]]], workers: int) -> list[list[dict]]:
    if workers == 1 or len(jobs) <= 1:
        return [run_curve(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return list(pool.imap(run_curve, jobs))


def setting(spec: Spec) -> str:
    """A curve's name: the spec (or member) without seed, sparsity and result."""
    own = {name: value for name, value in spec.items() if name not in ("seed", "sparsity", "result")}
    return json.dumps(own, sort_keys=True)


def base_spec(args: argparse.Namespace) -> Spec:
    return {"world": args.world, "d_sae": args.d_sae, "batch_size": args.batch_size, "steps": args.steps}


def variants(family: str, architecture: str, args: argparse.Namespace) -> list[Spec]:
    """What a peer is tuned over before its learning rate: its own ways of scaling the input, and for
    dictionary_learning's standard SAE also its other trainer of it. Scaling changes nothing in topk training."""
    scales = {"saelens": ("none", "sqrt_d"), "dictionary_learning": ("none", "unit")}[family]
    names = [architecture]
    if (family, architecture) == ("dictionary_learning", "standard"):
        names.append("standard_april")
    own = {"family": family, "lr": args.lrs[0], "seed": args.seeds[0]}
    return [
        base_spec(args) | own | {"architecture": name, "scale": scale}
        for name in names
        for scale in (scales[:1] if architecture in TOPK_FAMILY else scales)
    ]


Curve = tuple[float, Spec, list[dict[str, Any]]]


def best_curves(specs: Sequence[Spec], curves: Sequence[list[dict[str, Any]]], at: float) -> dict[tuple, Curve]:
    """(FVU at this L0, spec, members) of the best setting, by family and architecture."""
    best: dict[tuple, Curve] = {}
    for spec, members in zip(specs, curves, strict=True):
        found = at_targets(members, (at,)).get(at)
        name = (spec["family"], spec["architecture"].removesuffix("_april"))
        if found is not None and (name not in best or found["fvu"] < best[name][0]):
            best[name] = (found["fvu"], spec, members)
    return best


def tune_peers(args: argparse.Namespace) -> None:
    """One change at a time, at L0 --tune-at with the first seed: the scale, then the learning rate. The best is then
    trained at all L0 with all seeds."""
    targets = tuple(args.targets)
    specs = [
        spec
        for architecture in args.architectures
        for family in args.families
        for spec in variants(family, architecture, args)
    ]
    curves = run_all([(spec, (args.tune_at,), ()) for spec in specs], args.workers)
    rates = []
    for _, spec, members in best_curves(specs, curves, args.tune_at).values():
        tried = tuple(around(members, args.tune_at)[:1])
        rates += [(spec | {"lr": lr}, (args.tune_at,), tried) for lr in args.lrs[1:]]
    curves += run_all(rates, args.workers)
    best = best_curves([*specs, *(spec for spec, _, _ in rates)], curves, args.tune_at)
    # The coefficients that the tuning tried give the search its slope; they are read back, not trained again.
    jobs = [(spec, targets, tuple(m["sparsity"] for m in members)) for _, spec, members in best.values()]
    first = run_all(jobs, args.workers)
    jobs = []
    for (_, spec, _), members in zip(best.values(), first, strict=True):
        reached = () if is_topk(spec) else at_targets(members, targets)
        near = sorted({lam for target in reached for lam in around(members, target)})
        jobs += [(spec | {"seed": seed}, targets, tuple(near)) for seed in args.seeds[1:]]
    run_all(jobs, args.workers)
    print_table(args)


def around(members: Sequence[dict[str, Any]], target: float) -> list[float]:
    """The coefficients of the trainings just below and just above the target."""
    found = sorted((m["result"]["l0"], m["sparsity"]) for m in members if m["result"]["l0"] > 0)
    below = [sparsity for l0, sparsity in found if l0 <= target]
    above = [sparsity for l0, sparsity in found if l0 > target]
    if below and above:
        return [below[-1], above[0]]
    near = (below[-1:] + above[:1])[0]  # met within rounding; another seed's L0 differs by a few percent
    return [near / 1.06, near * 1.06]


def run_ours(args: argparse.Namespace) -> None:
    spec = base_spec(args) | {"family": "mechint", "architecture": args.architecture}
    spec |= {"name": args.name, "flags": args.flags}
    if args.sparsity_flag:
        spec["sparsity_flag"] = args.sparsity_flag
    targets = tuple(args.targets)
    if is_topk(spec):  # nothing to search: all members at once
        run_all([(spec | {"seed": seed}, (k,), ()) for seed in args.seeds for k in targets], args.workers)
    else:
        first = run_curve((spec | {"seed": args.seeds[0]}, targets, tuple(args.first)))
        near = sorted({lam for target in at_targets(first, targets) for lam in around(first, target)})
        run_all([(spec | {"seed": seed}, targets, tuple(near)) for seed in args.seeds[1:]], args.workers)
    print_table(args)


def load_members() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((FOLDER / "members").glob("*.json"))]


def print_table(args: argparse.Namespace) -> None:
    """Every setting with all seeds first, then at the first seed alone the best of each family."""
    members = [
        member
        for member in load_members()
        if all(member[name] == value for name, value in base_spec(args).items())
        and (not args.architectures or member["architecture"].removesuffix("_april") in args.architectures)
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for member in members:
        groups.setdefault(setting(member), []).append(member)
    rows: list[tuple[Any, ...]] = []
    for name, group in groups.items():
        spec = json.loads(name)
        by_seed = {
            seed: at_targets([member for member in group if member["seed"] == seed], args.targets)
            for seed in sorted({member["seed"] for member in group})
        }
        for target in args.targets:
            values = [found[target] for found in by_seed.values() if target in found]
            if values:
                rows.append((spec["architecture"].removesuffix("_april"), target, label(spec), values))
    best: dict[tuple[Any, ...], float] = {}
    for architecture, target, _, values in rows:
        fvu = statistics.mean(value["fvu"] for value in values)
        best[architecture, target] = min(best.get((architecture, target), math.inf), fvu)
    columns = [name for name in METRICS if any(name in value for row in rows for value in row[3])]
    print(f"\n{args.world}, d_sae {args.d_sae}, batch {args.batch_size}, {args.steps} steps; mean (sd) over seeds\n")
    print("| architecture | L0 | recipe | seeds | " + " | ".join(columns) + " |")
    print("|---" * (4 + len(columns)) + "|")
    for architecture, target, text, values in sorted(
        rows, key=lambda row: (row[0], row[1], statistics.mean(value["fvu"] for value in row[3]))
    ):
        if args.short and statistics.mean(v["fvu"] for v in values) > 2 * best[architecture, target]:
            continue
        cells = [cell([value[name] for value in values if name in value], name) for name in columns]
        print(f"| {architecture} | {target:g} | {text} | {len(values)} | " + " | ".join(cells) + " |")


def label(spec: Spec) -> str:
    if spec["family"] == "mechint":
        return f"mechint {spec.get('name', '')}"
    own = " (April)" if spec["architecture"].endswith("_april") else ""
    return f"{spec['family']}{own} lr {spec['lr']:g}, scale {spec['scale']}"


def cell(values: Sequence[float], name: str) -> str:
    if not values:
        return ""
    digits = 0 if name == "dead" else 4
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description="FVU, ce_recovered and dead latents at matched L0, against the peers.")
    parser.add_argument("what", choices=("peers", "ours", "table"))
    parser.add_argument("--world", choices=("tales", "synthetic"), default="tales")
    parser.add_argument("--architectures", nargs="+", default=[])
    parser.add_argument("--families", nargs="+", default=["saelens", "dictionary_learning"])
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="L0")
    parser.add_argument("--tune-at", type=float, default=32.0, help="peers: the L0 at which settings are chosen")
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="leave out settings with twice the best FVU")
    parser.add_argument("--name", default="", help="ours: what the table calls these flags")
    parser.add_argument("--architecture", default="standard", help="ours")
    parser.add_argument("--sparsity-flag", default="", help="ours: the flag to search over, if not --lam or --k")
    parser.add_argument("--first", nargs="*", type=float, default=[], help="ours: coefficients to begin with")
    parser.epilog = "After --: flags of mechint train, for ours."
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.flags = words[cut + 1 :]
    # For the workers; this process computes nothing. The allocator's settings spare them page faults, no more.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    if args.what == "peers":
        args.architectures = args.architectures or ["standard", "topk"]
        tune_peers(args)
    elif args.what == "ours":
        run_ours(args)
    else:
        print_table(args)


if __name__ == "__main__":
    run_inside()
    main()
