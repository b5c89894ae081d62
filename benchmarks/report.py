"""What the report of a large run costs: seconds with and without the gather pass, megabytes of the file. CPU.

    python benchmarks/report.py [--rows 200000] [--d-sae 4096] [--browser]

The run is made on first use in build/bench: a random GPT-NeoX of Pythia-70M's shape whose vocabulary of 50,304 are made
words of English length, and a store of `--rows` activations (d_in 512, float32), each the sum of 20 of 2,000 directions
drawn by a Zipf law plus noise, in texts of 128 tokens. A row's token is drawn by Zipf's law over 50,304 tokens, half of
the time from those of its strongest direction. The SAE's decoder holds these directions and random ones, L0 is about
60. Ranking and concepts are tables drawn at random in the size that the commands write.

Each case is a process of its own. Printed: seconds in all, of these in the gather pass, CPU seconds of the rest, the
file's size, the contexts of a latent that fitted. `--browser` also loads the file in Chromium and prints the seconds
until it can be read, and until a latent is shown after a click.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from contexts import N_DIRECTIONS, PER_ROW, planted_sae
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "bench"
D_IN, VOCABULARY, TEXT = 512, 50_304, 128


def make_model(folder: Path) -> None:
    """Random weights in Pythia-70M's shape, and a tokenizer of made words."""
    if (folder / "tokenizer_config.json").is_file():
        return
    from tokenizers import Tokenizer, models
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    rng = random.Random(0)
    letters = "etaoinshrdlucmfwygpbvk"
    words = {"<|endoftext|>": 0}
    while len(words) < VOCABULARY:
        word = "".join(rng.choices(letters, k=rng.choice([2, 3, 4, 4, 5, 5, 6, 7, 8])))
        words.setdefault(" " + word if rng.random() < 0.6 else word, len(words))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")),
        bos_token="<|endoftext|>", eos_token="<|endoftext|>",
    )  # fmt: skip
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=D_IN, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_run(root: Path, n_rows: int, d_sae: int) -> Path:
    """The run's directory; model, store and run are made if they are not there."""
    from mechint.config import SAETrainConfig
    from mechint.data import open_activations
    from mechint.runs import write_manifest
    from mechint.sae import save_checkpoint

    make_model(root / "model")
    store, run = root / f"activations-{n_rows}", root / "runs" / f"rows-{n_rows}-{d_sae}"
    directions = make_store(store, root / "model", n_rows)
    if (run / "manifest.json").is_file():
        return run
    activations = open_activations(store)
    sae = planted_sae("standard", 60, directions, activations.rows(torch.arange(2048)), d_sae)
    sae.metadata = {key: activations.info[key] for key in ("hook_name", "model_name", "processing", "prepend_bos")}
    run.mkdir(parents=True, exist_ok=True)
    config = SAETrainConfig(
        activations_path=str(store), activation_dim=D_IN, expansion=d_sae // D_IN, model_name=str(root / "model")
    )
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    steps = [f"{i * 100},{1 / (i + 1)},{0.9 / (i + 1)},0.01,{0.1 / (i + 1) + 0.015},3,0.001,3" for i in range(500)]
    (run / "metrics.csv").write_text("\n".join(["step,loss,mse,l1,l0,dead_features,lr,lam", *steps]) + "\n")
    save_checkpoint(sae, run / "checkpoint.pt")
    sae.save_model(run / "sae")
    summary = {"num_features": d_sae, "l0": 60.0, "fvu": 0.1, "n_train": n_rows, "n_val": n_rows // 20}
    (run / "summary.json").write_text(json.dumps(summary))
    write_tables(run, d_sae)
    inputs = {"activations": {"path": os.path.relpath(store, run), "sha256": activations.sha256, "n_rows": n_rows}}
    write_manifest(run, config, summary, inputs=inputs)
    return run


def make_store(folder: Path, model: Path, n_rows: int) -> torch.Tensor:
    """The directions; the store is written if it is not there."""
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(N_DIRECTIONS, D_IN, generator=generator), dim=1)
    if (folder / "store.json").is_file():
        return directions
    folder.mkdir(parents=True, exist_ok=True)
    zipf = (1 / torch.arange(1, N_DIRECTIONS + 1).double()).cumsum(0)
    words = (1 / torch.arange(1, VOCABULARY + 1).double()).cumsum(0)
    shards = []
    for number, part in enumerate(torch.arange(n_rows).split(50_000)):
        n = len(part)
        drawn = torch.rand(n, PER_ROW, generator=generator, dtype=torch.float64) * zipf[-1]
        picked = torch.searchsorted(zipf, drawn).clamp_max(N_DIRECTIONS - 1)
        strength = 0.5 + torch.rand(n, PER_ROW, generator=generator)
        rows = nn.functional.embedding_bag(picked, directions, mode="sum", per_sample_weights=strength)
        rows += 0.03 * torch.randn(n, D_IN, generator=generator)
        strongest = picked.gather(1, strength.argmax(dim=1, keepdim=True))[:, 0]
        free = torch.searchsorted(words, torch.rand(n, generator=generator, dtype=torch.float64) * words[-1])
        own = (strongest * 25 + torch.randint(4, (n,), generator=generator)) % VOCABULARY
        columns = {
            "activations": rows,
            "tokens": torch.where(torch.rand(n, generator=generator) < 0.5, own, free).clamp_max(VOCABULARY - 1).int(),
            "text_ids": part // TEXT,
            "positions": (part % TEXT + 1).int(),
        }
        name = f"shard-{number:05d}.safetensors"
        save_file(columns, folder / name)
        shards.append({"name": name, "n_rows": n, "sha256": str(number)})
    info = {
        "format_version": 1, "d_in": D_IN, "dtype": "float32", "n_rows": n_rows, "shards": shards,
        "hook_name": "blocks.3.hook_resid_post", "model_name": str(model), "processing": "raw", "prepend_bos": True,
    }  # fmt: skip
    (folder / "store.json").write_text(json.dumps(info))
    return directions


def write_tables(run: Path, d_sae: int) -> None:
    """ranking.csv, concepts.csv and latent_concepts.csv in the size of real ones."""
    rng = random.Random(0)
    names = [f"concept_{i}" for i in range(100)]
    ranking = [
        {"feature_idx": i, "rank": i + 1, "attribution": rng.random() ** 4, "exact_kl": rng.random() if i < 200 else "",
         "sample": "top" if i < 100 else "control" if i < 200 else ""}
        for i in range(d_sae)
    ]  # fmt: skip
    concepts = [
        {"concept": name, "parent": "", "n_tokens": 100, "best_latent": i, "f1": rng.random()}
        for i, name in enumerate(names)
    ]
    latents = [{"feature_idx": i, "concept": rng.choice(names), "f1": rng.random()} for i in range(d_sae)]
    for name, rows in (("ranking", ranking), ("concepts", concepts), ("latent_concepts", latents)):
        with open(run / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def one(run: Path, figures: bool) -> dict[str, float]:
    from mechint.config import ReportConfig
    from mechint.report.html import make_report
    from mechint.report.pack import unpack

    start, cpu = time.perf_counter(), time.process_time()
    made = make_report(ReportConfig(runs=(run,), overwrite=True, figures=figures, device="cpu"))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    text = made.path.read_text(encoding="utf-8")
    _, arrays = unpack(text.split('id="latents-0">')[1].split("<")[0])
    per_latent = len(arrays["ctx_value"]) / max(int((arrays["fires"] > 0).sum()), 1)
    return {
        "seconds": seconds,
        "gather_seconds": made.gather_seconds,
        "cpu": cpu,
        "mb": made.n_bytes / 1e6,
        "contexts": per_latent,
        "dead": int((arrays["fires"] == 0).sum()),
    }


def in_browser(path: Path) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        while not page.evaluate("document.documentElement.dataset.ready === 'yes'"):
            time.sleep(0.01)
        ready = time.perf_counter() - start
        timed = "(() => { const t = performance.now(); %s; return performance.now() - t })()"
        latent = page.evaluate(timed % "location.hash = '#latent=7'; show()")
        back = page.evaluate(timed % "location.hash = '#'; show()")
        find = page.evaluate(timed % "search(RUNS[0], 'tea')")
        browser.close()
    return {"ready_s": ready, "latent_ms": latent, "back_ms": back, "first_search_ms": find}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--one", choices=["anew", "kept", "figures"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    run = make_run(FOLDER / "report", args.rows, args.d_sae)
    if args.one:
        if args.one == "anew":
            (run / "latents.json").unlink(missing_ok=True)
        print(json.dumps(one(run, args.one == "figures")))
        return
    words = {"anew": "gather made anew", "kept": "gather kept", "figures": "gather kept, with figures"}
    for case, name in words.items():
        command = [sys.executable, __file__, "--one", case, "--rows", str(args.rows), "--d-sae", str(args.d_sae)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print(
            f"{name}: {found['seconds']:.1f} s, of these {found['gather_seconds']:.1f} s gathering;"
            f" {found['cpu']:.1f} s of CPU; {found['mb']:.2f} MB; {found['contexts']:.1f} contexts a latent,"
            f" {found['dead']} dead",
            flush=True,
        )
    if args.browser:
        print(", ".join(f"{name} {value:.2f}" for name, value in in_browser(run / "report.html").items()))


if __name__ == "__main__":
    main()
