"""Top contexts of all latents from one pass over stored activations: seconds and peak memory. CPU.

    python benchmarks/contexts.py [--rows 1000000] [--d-in 512] [--d-sae 4096] [--cases standard:60 topk:64]

The store is written on first use (float32, ten shards, as collect leaves them): every row is the sum of 20 of 2000
directions drawn by a Zipf law, plus an offset and noise. The SAE's first 2000 decoder rows are these directions, its
encoder is the transpose, and a bias common to all latents (or k) puts L0 where the case says.

Each case is one process: `gather` over all rows, with everything that it keeps (counts, means, 20 strongest rows, 100
random rows, histograms, partners). Printed: seconds; seconds times the cores' share that the process got (its CPU time
divided by the number of threads: what a free machine would take); peak memory, of which mapped from the store (pages
that the system may drop at any time).

Then, in one process and interleaved, over the first 65,536 rows: `gather`, the encoder alone in float32
(`SAE.encode`), and the plain way (encode, torch.topk of each batch, merged). Medians of the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "bench"
N_DIRECTIONS, PER_ROW, NOISE = 2000, 20, 0.03
K = 20


def make_store(folder: Path, n_rows: int, d_in: int, n_shards: int = 10) -> Tensor:
    """The directions; the store is written if it is not there."""
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(N_DIRECTIONS, d_in, generator=generator), dim=1)
    if (folder / "store.json").is_file():
        return directions
    folder.mkdir(parents=True, exist_ok=True)
    offset = nn.functional.normalize(torch.randn(d_in, generator=generator), dim=0) * 3
    zipf = (1 / torch.arange(1, N_DIRECTIONS + 1).double()).cumsum(0)
    shards = []
    for number, part in enumerate(torch.arange(n_rows).chunk(n_shards)):
        n = len(part)
        drawn = torch.rand(n, PER_ROW, generator=generator, dtype=torch.float64) * zipf[-1]
        picked = torch.searchsorted(zipf, drawn).clamp_max(N_DIRECTIONS - 1)
        strength = 0.5 + torch.rand(n, PER_ROW, generator=generator)
        rows = nn.functional.embedding_bag(picked, directions, mode="sum", per_sample_weights=strength)
        rows += offset + NOISE * torch.randn(n, d_in, generator=generator)
        name = f"shard-{number:05d}.safetensors"
        columns = {
            "activations": rows,
            "tokens": picked[:, 0].to(torch.int32).clone(),
            "text_ids": part // 128,
            "positions": (part % 128 + 1).to(torch.int32),
        }
        save_file(columns, folder / name)
        shards.append({"name": name, "n_rows": n, "sha256": str(number)})
    info = {"format_version": 1, "d_in": d_in, "dtype": "float32", "shards": shards}
    (folder / "store.json").write_text(json.dumps(info))
    return directions


def planted_sae(architecture: str, l0: float, directions: Tensor, sample: Tensor, d_sae: int):  # noqa: ANN201
    from mechint.sae import build_sae

    generator = torch.Generator().manual_seed(1)
    d_in = directions.shape[1]
    others = torch.randn(max(0, d_sae - len(directions)), d_in, generator=generator)
    options = {"k": int(l0)} if architecture == "topk" else {}
    sae = build_sae(architecture, d_in, d_sae, generator=generator, options=options)
    with torch.no_grad():
        sae.W_dec.copy_(nn.functional.normalize(torch.cat([directions, others])[:d_sae], dim=1))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_dec.copy_(sample.mean(dim=0))
        if architecture != "topk":
            pre = sae.pre_activations(sample).flatten()
            cut = float(pre.kthvalue(pre.numel() - round(l0 * len(sample))).values)
            if architecture == "jumprelu":
                sae.get_parameter("threshold").fill_(max(cut, 0.0))
            else:
                sae.b_enc.fill_(-cut)
    return sae


def plain_way(sae, acts, k: int) -> Tensor:  # noqa: ANN001
    """Dense feature_acts of each batch, sorted by torch.topk and merged with the best so far."""
    best = torch.full((k, sae.d_sae), -torch.inf)
    with torch.inference_mode():
        for x in acts.split(4096):
            best = torch.cat([best, sae.encode(x).topk(k, dim=0).values]).topk(k, dim=0).values
    return best


def memory() -> dict[str, float]:
    """MB of this process: peak, and now mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def one(folder: Path, architecture: str, l0: float, n_rows: int, d_in: int, d_sae: int) -> dict[str, float]:
    from mechint.analysis import gather
    from mechint.data import open_activations

    directions = make_store(folder, n_rows, d_in)
    acts = open_activations(folder)
    sae = planted_sae(architecture, l0, directions, acts.rows(torch.arange(min(2048, n_rows))), d_sae)
    gather(sae, acts.rows(torch.arange(min(4096, n_rows))))  # loads what is compiled
    start, cpu = time.perf_counter(), time.process_time()
    latents = gather(sae, acts, progress=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "l0": latents.l0, "threads": torch.get_num_threads(), **memory()}


def compare(folder: Path, architecture: str, l0: float, n_rows: int, d_in: int, d_sae: int, rounds: int) -> dict:
    from mechint.analysis import gather
    from mechint.data import open_activations

    directions = make_store(folder, n_rows, d_in)
    acts = open_activations(folder)
    x = acts.rows(torch.arange(min(2**16, n_rows)))
    sae = planted_sae(architecture, l0, directions, x[:2048], d_sae)

    def bare() -> None:
        with torch.inference_mode():
            for part in x.split(4096):
                sae.encode(part)

    ways = {"gather": lambda: gather(sae, x), "encode": bare, "plain": lambda: plain_way(sae, x, K)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        ways[name]()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    over = {name: [a / b for a, b in zip(times["gather"], times[name], strict=True)] for name in ("encode", "plain")}
    return {"case": f"{architecture}:{l0:g}", **{f"over_{n}": statistics.median(v) for n, v in over.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--cases", nargs="+", default=["standard:60", "topk:64", "standard:200"])
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison; 0 leaves it out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = FOLDER / f"contexts-{args.rows}x{args.d_in}"
    sizes = (args.rows, args.d_in, args.d_sae)
    if args.one:
        architecture, l0 = args.one.split(":")
        print(json.dumps(one(folder, architecture, float(l0), *sizes)))
        return
    make_store(folder, args.rows, args.d_in)
    for case in args.cases:
        command = [sys.executable, __file__, "--one", case]
        for name in ("rows", "d_in", "d_sae"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        free = found["cpu"] / found["threads"]
        print(
            f"{case}: {found['seconds']:.1f} s, {free:.1f} s of CPU a thread ({found['threads']} threads);"
            f" L0 {found['l0']:.1f}; peak {found['VmHWM']:.0f} MB, now {found['RssAnon']:.0f} MB own and"
            f" {found['RssFile']:.0f} MB mapped",
            flush=True,
        )
    for case in args.cases if args.rounds else ():
        architecture, l0 = case.split(":")
        print(json.dumps(compare(folder, architecture, float(l0), *sizes, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
