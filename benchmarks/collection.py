"""Collection against the original's way, at Pythia-70M's shape with random weights. CPU.

    python benchmarks/collection.py [--rounds 7] [--texts 256] [--no-memory]

The original's way: one 120-token text at a time through the whole model, unembedding included, gradients on, the hook's
value taken from TransformerLens's cache. It gets token ids; tokenising and writing cost it nothing here. The original
used `HookedTransformer` ("original", while TransformerLens has it); its successor `TransformerBridge` is timed too.

Ours: `collect` itself, from a text file to shards on the disk: reading, tokenising, the model, checks, norms, hashing,
fsync. Loading the model is left out on both sides.

Rounds are interleaved in one process; the ratio of medians is printed, and the ratio of the best. Then the peak
resident memory of a process that collects a .pt of n and of 8n texts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ablation import build_hooked_transformer  # the benchmark beside this one

HOOK = "blocks.3.hook_resid_post"
CONTEXT = 120


def make_model(folder: Path, hidden_size: int = 512) -> None:
    """Pythia-70M's shape with random weights, and a byte-level BPE tokenizer trained on the tales."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from mechint.builtin.tales import tale

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((tale(i).text for i in range(500)), trainer)
    special = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, unk_token=special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=hidden_size,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(folder)


def write_texts(path: Path, n_texts: int) -> None:
    """Texts of more than CONTEXT tokens, one a line; `--context-size` makes windows of that length of them."""
    from mechint.builtin.tales import tale

    lines = (" ".join(tale(3 * i + j).text for j in range(3)) for i in range(n_texts))
    path.write_text("\n".join(lines) + "\n")


def originals_way(lens, tokens: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Seconds, and the rows of each text."""
    rows = []
    started = time.perf_counter()
    for text in tokens:
        _, cache = lens.run_with_cache(text[None], names_filter=lambda name: name == HOOK)
        rows.append(cache[HOOK][0].detach().cpu())
    return time.perf_counter() - started, rows


def full_contexts(activations, n_contexts: int) -> torch.Tensor:
    """The rows of the first contexts that are CONTEXT long; what is left of a text is a shorter one."""
    contexts, lengths = activations.context_ids.unique_consecutive(return_counts=True)
    whole = contexts[lengths == CONTEXT][:n_contexts]
    return torch.isin(activations.context_ids, whole).nonzero().flatten()


def memory(model: Path, texts: Path, folder: Path, n_texts: int) -> tuple[int, int]:
    """(peak resident bytes of a process that collects, bytes of what it wrote)."""
    output = folder / f"{n_texts}.pt"
    words = ["--model", model, "--dataset", texts, "--num-texts", n_texts, "--output", output, "--dtype", "bfloat16"]
    words += ["--context-size", CONTEXT, "--max-chars", 10_000, "--checkpoint-every", 64, "--hook", HOOK]
    # VmHWM begins anew at exec; ru_maxrss keeps this (large) process's peak from the fork, and would hide the child's.
    code = (
        f"from mechint.cli.collect import main; assert main({[str(word) for word in words]!r}) == 0;"
        "print([1024 * int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1]), output.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Time collection against the original's way.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=256, help="texts a round for ours")
    parser.add_argument("--texts-original", type=int, default=12, help="texts a round for the original's way")
    parser.add_argument("--batch-size", type=int, help="texts a batch; filled by tokens if not given")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), args)


def run(folder: Path, args: argparse.Namespace) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    from mechint.config import CollectConfig
    from mechint.data import open_activations
    from mechint.data.collect import collect

    model, texts = folder / "model", folder / "texts.txt"
    make_model(model)
    write_texts(texts, 2048 if args.memory else args.texts)
    bridge = TransformerBridge.boot_transformers(str(model), device="cpu")
    hooked = build_hooked_transformer()
    speeds: dict[str, list[float]] = {"original": [], "bridge": [], "float32": [], "bfloat16": []}
    rows: dict[str, torch.Tensor] = {}
    for number in range(args.rounds + 1):  # the first only warms up
        for dtype in ("float32", "bfloat16"):
            config = CollectConfig(
                model=str(model),
                hook=HOOK,
                dataset=str(texts),
                num_texts=args.texts,
                max_chars=10_000,
                context_size=CONTEXT,
                output=folder / f"{dtype}-{number}",
                keep_bos=True,
                dtype=dtype,
                batch_size=args.batch_size,
                device="cpu",
            )
            done = collect(config, progress=False)
            if number:
                speeds[dtype].append(done.n_tokens / done.seconds)
            activations = open_activations(config.output)
            places = full_contexts(activations, args.texts_original)
            rows[dtype] = activations.rows(places)
            tokens = activations.tokens[places].long().view(-1, CONTEXT)
        seconds, originals = originals_way(bridge, tokens)
        hooked_seconds = seconds if hooked is None else originals_way(hooked, tokens)[0]
        if number:
            speeds["bridge"].append(tokens.numel() / seconds)
            speeds["original"].append(tokens.numel() / hooked_seconds)
            print("round", number, {key: f"{values[-1]:,.0f} tokens/s" for key, values in speeds.items()}, flush=True)
    reference = torch.cat(originals)
    report = {}
    for dtype in ("float32", "bfloat16"):
        error = (rows[dtype] - reference).norm(dim=-1) / reference.norm(dim=-1)
        report[dtype] = {
            "ratio_of_medians": statistics.median(speeds[dtype]) / statistics.median(speeds["original"]),
            "ratio_of_medians_to_bridge": statistics.median(speeds[dtype]) / statistics.median(speeds["bridge"]),
            "ratio_of_best": max(speeds[dtype]) / max(speeds["original"]),
            "median_of_ratios": statistics.median(
                ours / theirs for ours, theirs in zip(speeds[dtype], speeds["original"], strict=True)
            ),
            "median_tokens_per_s": statistics.median(speeds[dtype]),
            "relative_error_mean": float(error.mean()),
            "relative_error_max": float(error.max()),
        }
    for key in ("original", "bridge"):
        report[key] = {"median_tokens_per_s": statistics.median(speeds[key])}
    report["threads"] = torch.get_num_threads()
    report["texts_a_round"] = args.texts
    if args.memory:
        for factor in (1, 8):
            peak, size = memory(model, texts, folder, 256 * factor)
            report[f"memory_{factor}x"] = {"texts": 256 * factor, "peak_mb": peak / 1e6, "written_mb": size / 1e6}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
