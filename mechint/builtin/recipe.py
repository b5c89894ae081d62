"""Trains pythia-tiny on the tales: tokenizer, model, curve, figures and card, in one command.

The model is a GPT-NeoX in Pythia-70M's shape (6 layers, parallel residual, rotary on a quarter of each head, untied
embeddings) at width 128. Every text starts with BOS (id 0), so position 0 of any later use looks as in training.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechint.builtin import tales
from mechint.errors import MechintError
from mechint.provenance import scratch_folder

if TYPE_CHECKING:
    import torch

BOS = 0
BOS_TOKEN = "<|endoftext|>"
CONTEXT = 256
TOKENIZER_TALES = 20_000  # enough that every word of the lexicon occurs
BASELINE_TALES = 20_000
HELDOUT_SEED = 1


def build_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE whose vocabulary is the 256 bytes and every word of ``texts`` seen twice, most common first.

    Whole words are looked up before merging (``ignore_merges``), so a known word is always one token and any other text
    falls back to bytes and still decodes to itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    words = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= 2]
    entries = list(dict.fromkeys([BOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]))
    vocab = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=BOS_TOKEN, unk_token=BOS_TOKEN,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(vocab_size: int, seed: int) -> Any:
    """An untrained GPT-NeoX of pythia-tiny's shape."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        hidden_act="gelu", max_position_embeddings=CONTEXT, layer_norm_eps=1e-5, bos_token_id=BOS, eos_token_id=BOS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=False, use_parallel_residual=True,
    )  # fmt: skip
    # Eager attention: at 100 positions and heads of 32 it trains faster on a CPU than the fused kernel.
    config._attn_implementation = "eager"
    return GPTNeoXForCausalLM(config)


def encoded(
    tokenizer: Any, split: tales.Split, seed: int, start: int, count: int, end: bool = False
) -> list[list[int]]:
    """Token ids of ``count`` tales, each after BOS; with ``end``, one more BOS closes each text."""
    texts = [tales.tale(index, split, seed).text for index in range(start, start + count)]
    return [[BOS, *ids, *[BOS] * end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def stream_hash(count: int = 200) -> str:
    """sha256 of the first tales of both splits: stays while the text stays, however the source is rearranged."""
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(tales.tale(index, "train").text.encode())
        digest.update(tales.tale(index, "heldout", HELDOUT_SEED).text.encode())
    return digest.hexdigest()


def training_batches(tokenizer: Any, seed: int, batch_size: int) -> Iterator[list[list[int]]]:
    """Endless batches of tales of like length, from a fresh part of the stream each time."""
    import random

    rng = random.Random(seed)
    start, block = 0, 64 * batch_size
    while True:
        rows = sorted(encoded(tokenizer, "train", seed, start, block, end=True), key=len)
        batches = [rows[at : at + batch_size] for at in range(0, block, batch_size)]
        rng.shuffle(batches)
        yield from batches
        start += block


def padded(rows: Sequence[Sequence[int]]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Ids ``[batch, pos]``, right padded with BOS, and a mask that is true where a token stands."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), BOS, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask


def cross_entropy(model: Any, rows: Sequence[Sequence[int]], batch_size: int = 32) -> float:
    """Mean cross-entropy in nats a token; the first element of each row (BOS) is context only."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(rows), batch_size):
            ids, mask = padded(rows[at : at + batch_size])
            logits = model(ids).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            total += float(losses[mask[:, 1:]].sum())
            count += int(mask[:, 1:].sum())
    return total / count


def baselines(train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]], vocab: int) -> tuple[float, float]:
    """Unigram and bigram cross-entropy of ``heldout`` in nats; counts from ``train``.

    Unigrams with one added to each count; bigrams smoothed towards them: ``(c(v, w) + 4 p(w)) / (c(v) + 4)``.
    """
    unigrams = Counter(token for row in train for token in row[1:])
    pairs = Counter(pair for row in train for pair in zip(row, row[1:], strict=False))
    firsts = Counter(token for row in train for token in row[:-1])
    total = sum(unigrams.values()) + vocab
    unigram_sum = bigram_sum = 0.0
    count = 0
    for row in heldout:
        for before, token in zip(row, row[1:], strict=False):
            chance = (unigrams[token] + 1) / total
            unigram_sum -= math.log(chance)
            bigram_sum -= math.log((pairs[before, token] + 4 * chance) / (firsts[before] + 4))
            count += 1
    return unigram_sum / count, bigram_sum / count


def train(
    model: Any, tokenizer: Any, heldout: Sequence[Sequence[int]], *, steps: int, minutes: float, batch_size: int,
    lr: float, seed: int, bf16: bool,
) -> list[dict[str, int | float]]:  # fmt: skip
    """AdamW with linear warmup and cosine decay; stops at ``steps`` or ``minutes``, whichever comes first.

    The schedule follows whichever limit is nearer, so that a slower machine still ends with a decayed rate.
    Returns the curve: step, tokens seen, seconds, training loss since the last row, held-out cross-entropy.
    """
    import torch
    from tqdm import tqdm

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    batches = training_batches(tokenizer, seed, batch_size)
    curve: list[dict[str, int | float]] = []
    started, tokens, losses = time.monotonic(), 0, []
    every = max(1, min(500, steps // 8))
    for step in tqdm(range(1, steps + 1), desc="train", file=sys.stderr, mininterval=5):
        spent = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        warm = min(1.0, step / min(200, max(1, steps // 10)))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))
        ids, mask = padded(next(batches))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            # Only positions with a target go through the unembedding, which is the largest product of the model.
            hidden = model.gpt_neox(ids, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
            logits = model.get_output_embeddings()(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])
        if not torch.isfinite(loss):
            raise MechintError(f"the loss is {loss.item()} at step {step}: train with a lower --lr than {lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += int(mask[:, 1:].sum())
        losses.append(loss.item())
        last = step == steps or spent >= 1.0
        if last or step % every == 0:
            curve.append({
                "step": step, "tokens": tokens, "seconds": round(time.monotonic() - started, 1),
                "train_loss": round(sum(losses) / len(losses), 4),
                "heldout_ce": round(cross_entropy(model, heldout[:128]), 4),
            })  # fmt: skip
            losses = []
            tqdm.write(" ".join(f"{key}={value}" for key, value in curve[-1].items()), file=sys.stderr)
        if last:
            break
    return curve


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 6) -> str:
    """Greedy continuation of ``prompt`` after BOS, up to ``tokens`` tokens or the end of the text."""
    import torch

    ids = [BOS, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + tokens:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == BOS:
                break
    return tokenizer.decode([token for token in ids[start:] if token != BOS])


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save; prints where the model lies and its held-out cross-entropy beside the baselines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="saved_models/pythia-tiny", help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=8000, help="most optimizer steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="most minutes of training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="tales a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (%(default)s)")
    parser.add_argument("--heldout-tales", type=int, default=1000, help="tales to evaluate on (%(default)s)")
    parser.add_argument("--no-bf16", action="store_true", help="compute in float32 also where bf16 is fast")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder when it exists")
    args = parser.parse_args(argv)
    try:
        print(run(args))
    except MechintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> str:
    """The whole recipe; the output folder appears only when everything in it is complete."""
    import torch

    from mechint.builtin import card, probes

    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise MechintError(f"{output} exists: give another --output, or --overwrite to replace it")
    for name in ("steps", "minutes", "batch_size", "lr", "heldout_tales"):
        if getattr(args, name) <= 0:
            raise MechintError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")
    # bf16 products are several times faster where the processor has them, and slower where it has not.
    bf16 = not args.no_bf16 and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    tokenizer = build_tokenizer([tales.tale(index, "train", args.seed).text for index in range(TOKENIZER_TALES)])
    model = build_model(len(tokenizer), args.seed)
    heldout = encoded(tokenizer, "heldout", HELDOUT_SEED, 0, args.heldout_tales)
    curve = train(
        model, tokenizer, heldout, steps=args.steps, minutes=args.minutes, batch_size=args.batch_size, lr=args.lr,
        seed=args.seed, bf16=bf16,
    )  # fmt: skip
    model.eval().half().float()  # what is measured below is what the fp16 file holds
    unigram, bigram = baselines(encoded(tokenizer, "train", args.seed, 0, BASELINE_TALES), heldout, len(tokenizer))
    figures: dict[str, object] = {
        "heldout_ce": round(cross_entropy(model, heldout), 4), "unigram_ce": round(unigram, 4),
        "bigram_ce": round(bigram, 4), "heldout_tales": args.heldout_tales, "heldout_seed": HELDOUT_SEED,
        "tokens_trained": int(curve[-1]["tokens"]), "steps": int(curve[-1]["step"]),
        "seconds": curve[-1]["seconds"], "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
        "bf16_compute": bf16, "threads": torch.get_num_threads(), "vocab_size": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()), "tales_source_sha256": tales.source_hash(),
        "tales_sha256": stream_hash(),
        "right_answers": probes.shares(model, tokenizer),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output) as scratch:
        made = scratch / "model"
        made.mkdir()
        save(made, model, tokenizer, curve)
        card.write(made, figures, curve, [(prompt, complete(model, tokenizer, prompt)) for prompt in card.PROMPTS])
        (made / "model.safetensors").chmod(0o644)
        if output.exists():
            shutil.rmtree(output)
        os.replace(made, output)
    return (
        f"{output}: held-out cross-entropy {figures['heldout_ce']} nats a token "
        f"(unigram {figures['unigram_ce']}, bigram {figures['bigram_ce']})"
    )


def save(folder: Path, model: Any, tokenizer: Any, curve: Sequence[dict[str, int | float]]) -> None:
    """Weights in fp16, tokenizer and training curve, in the layout ``from_pretrained`` reads."""
    import torch

    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Half precision is for the file only: a reader that asks for no dtype computes in float32.
    config["dtype"] = str(torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with open(folder / "training_curve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
