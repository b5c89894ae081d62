"""One evaluation pass against a bare forward of model and SAE over the same tokens. CPU.

    python benchmarks/evaluation.py [--rounds 7] [--texts 32] [--length 128] [--threads 1] [--world pythia-70m|builtin]

The bare forward: the model's logits for all tokens, as transformers computes them, in the same batches, and the SAE's
encode and decode of what the hook held on the way (512 wide, 4096 latents, blocks.3.hook_resid_post of 6 layers; random
weights, because speed does not depend on them). Nothing is measured from what comes out. "bare, fast products" is the
same with the matrix products of `mechint.models.matmul`, so that what those bring can be told from the rest.

The pass: `run_texts`, which gathers every metric of docs/metrics.md: reconstruction at every token by text and by kind
of token, cross-entropy and KL of clean, spliced, zero- and mean-ablated predictions, all proofs included. "no
baselines" leaves zero and mean out. "plain products" is the pass as it runs where torch's own products are the fastest,
"whole model" the whole model for each of the four sets of predictions, as hooks inside a layer need.

Rounds are interleaved in one process; the median of the rounds' ratios is printed, and their range, by wall time and by
CPU time of all threads, which neighbours disturb less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ablation import HOOK, build_sae, save_model  # the benchmark beside this one

from mechint.eval import Text, one_pass
from mechint.eval.one_pass import LanguageSums, run_texts
from mechint.eval.sums import ReconstructionSums
from mechint.eval.texts import batches
from mechint.models import LanguageModel, load_model, matmul
from mechint.models.matmul import FastLinear, onednn_pays
from mechint.sae import SAE, StandardSAE

BATCH = 16


def bare(model: LanguageModel, sae: SAE, texts: Sequence[Text], max_tokens: int) -> None:
    """Logits of all tokens and the SAE's reconstruction of the hooked rows, thrown away."""
    rows: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        rows.append(value)
        return value

    with torch.inference_mode():
        for batch in batches(texts, BATCH, max_tokens):
            rows.clear()
            model.logits_with(batch.tokens, HOOK, keep)
            sae(rows[0].flatten(0, 1))


def whole_pass(
    model: LanguageModel, sae: SAE, texts: Sequence[Text], mean: torch.Tensor, **changes: Any
) -> LanguageSums:
    _, n_groups = one_pass.text_groups(len(texts))
    rows = ReconstructionSums(sae.d_in, sae.d_sae, n_groups=4 * n_groups, centre=mean)
    special = frozenset({0})
    return run_texts([sae], model, texts, HOOK, mean=mean, rows=rows, special=special, batch_size=BATCH, **changes)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def builtin_world(n_texts: int) -> tuple[LanguageModel, SAE, list[Text]]:
    from mechint.builtin.tales import tale
    from mechint.eval import texts_from_tokens

    model = load_model("builtin/pythia-tiny", device="cpu", hook_name=HOOK)
    lines = [" ".join(tale(index, "heldout", 0).text.split()) for index in range(n_texts)]
    sae = StandardSAE(model.d_model, 8 * model.d_model)
    return model, sae, texts_from_tokens(model.tokenize(lines, prepend_bos=True), prepend_bos=True, keep_bos=False)


def random_world(n_texts: int, length: int, l0: float) -> tuple[LanguageModel, SAE, list[Text]]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        model = load_model(folder, device="cpu", hook_name=HOOK)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(1, model.d_vocab, (n_texts, length - 1), generator=generator).tolist()
    texts = [Text([0, *tokens], [False] + [True] * (length - 1)) for tokens in drawn]
    lines = [" ".join(f"w{token}" for token in tokens) for tokens in drawn[:4]]
    return model, build_sae(model, lines, l0), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, BOS included (random weights)")
    parser.add_argument("--l0", type=float, default=64.0)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice if not given")
    parser.add_argument("--world", choices=["pythia-70m", "builtin"], default="pythia-70m")
    parser.add_argument("--without-whole", action="store_true", help="leave the whole model's four runs out")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.world == "builtin":
        model, sae, texts = builtin_world(args.texts)
    else:
        model, sae, texts = random_world(args.texts, args.length, args.l0)
    n_tokens = sum(len(text.tokens) for text in texts)
    print(
        f"{args.world}: {len(texts)} texts, {n_tokens} tokens, d_in {sae.d_in}, {sae.d_sae} latents, vocabulary"
        f" {model.d_vocab}; torch {torch.__version__}, {torch.get_num_threads()} threads, fast products:"
        f" {onednn_pays()}"
    )
    mean = torch.zeros(sae.d_in)
    max_tokens = one_pass.MAX_LOGIT_ELEMENTS // model.d_vocab  # the largest block of logits that is made at once
    make_splice = one_pass.make_splice

    def bare_fast() -> None:
        with FastLinear():
            bare(model, sae, texts, max_tokens)

    def whole_model() -> None:
        one_pass.make_splice = lambda *_: "timed without"
        try:
            whole_pass(model, sae, texts, mean)
        finally:
            one_pass.make_splice = make_splice

    def plain_products() -> None:
        pays = matmul.onednn_pays
        matmul.onednn_pays = lambda: False
        try:
            whole_pass(model, sae, texts, mean)
        finally:
            matmul.onednn_pays = pays

    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, sae, texts, max_tokens),
        "bare, fast products": bare_fast,
        "pass": lambda: whole_pass(model, sae, texts, mean),
        "pass, no baselines": lambda: whole_pass(model, sae, texts, mean, baselines=()),
    }
    if onednn_pays():
        ways["pass, plain products"] = plain_products
    if not args.without_whole:
        ways["pass, whole model"] = whole_model
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for name in ("bare", "pass"):
        ways[name]()  # warm
    for number in range(args.rounds):
        for name, work in ways.items():
            times[name].append(measured(work))
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {1e3 * times[name][-1][0]:.0f} ms" for name in ways),
            flush=True,
        )
    for against in ("bare", "bare, fast products"):
        for name in ways:
            if name in ("bare", against):
                continue
            ratios = [
                [mine[kind] / other[kind] for mine, other in zip(times[name], times[against], strict=True)]
                for kind in (0, 1)
            ]
            wall, cpu = ratios
            print(
                f"{name} / {against}: {statistics.median(wall):.2f} (rounds {min(wall):.2f} to {max(wall):.2f}),"
                f" CPU time {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
            )


if __name__ == "__main__":
    main()
