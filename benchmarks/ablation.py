"""Ranking latents by ablation: ours against the original's way, at Pythia-70M's shape with random weights.

The original's way, written here from its description: for each latent and text a clean and an ablated forward pass of
the whole model through TransformerLens's `run_with_hooks`, one text at a time, and KL from two float32 log-softmaxes.
It is timed on both of TransformerLens's models: `HookedTransformer`, which the original used and version 4 removed, and
`TransformerBridge`, which took its place. The time is that of a sample of (latent, text) pairs, extrapolated to all of
them (each costs the same, firing or not; tokenising is left out). Ours is timed through `rank_features_by_ablation` on
random latents over all texts, everything included; without oneDNN as well, to show that share of the gain.

Wall time is what counts on a quiet machine; CPU time (all threads) is printed beside it because it suffers less from
neighbours. On a busy machine `--threads 1` gives the steadier ratio.

    python benchmarks/ablation.py                       rounds of all in turn, medians of their ratios
    python benchmarks/ablation.py --full                also one whole ranking of all latents
"""

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mechint.ablation import build_transformer_model, engines, rank_features_by_ablation, single_feature_ablation_hook
from mechint.models import LanguageModel, load_model, matmul
from mechint.sae import StandardSAE

HOOK = "blocks.3.hook_resid_post"
VOCAB = 50304


def save_model(folder: str) -> None:
    """Pythia-70M's shape with random weights; a tokenizer in which the text "w5 w17" is tokens 5 and 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", unk_token="w0").save_pretrained(
        folder
    )


def build_sae(model: LanguageModel, texts: list[str], l0: float) -> StandardSAE:
    """4096 random latents whose common encoder bias gives this L0 on the texts."""
    torch.manual_seed(1)
    sae = StandardSAE(512, 4096)
    rows = torch.cat([model.activations(torch.tensor([t]), HOOK)[0] for t in model.tokenize(texts, prepend_bos=True)])
    with torch.no_grad():
        sae.b_dec.copy_(rows.mean(0))
        before = (rows - sae.b_dec) @ sae.W_enc
        sae.b_enc.fill_(-float(before.flatten().kthvalue(int(before.numel() * (1 - l0 / sae.d_sae))).values))
    sae.metadata = {"hook_name": HOOK, "processing": "raw", "prepend_bos": True}
    return sae


def build_hooked_transformer():
    """The original's class at the same shape (its weights do not matter to its speed); None from version 4 on."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return None
    config = HookedTransformerConfig(
        n_layers=6,
        d_model=512,
        n_ctx=2048,
        d_head=64,
        n_heads=8,
        d_mlp=2048,
        d_vocab=VOCAB,
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=16,
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=True,
        seed=0,
    )
    return HookedTransformer(config).eval()


@torch.no_grad()
def original_pair(lens, sae: StandardSAE, tokens: torch.Tensor, feature: int) -> torch.Tensor:
    """KL per position, in the original's way."""
    clean = lens.run_with_hooks(tokens, fwd_hooks=[], return_type="logits")
    hook = single_feature_ablation_hook(sae, feature)
    ablated = lens.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)], return_type="logits")
    log_p, log_q = F.log_softmax(clean[0], -1), F.log_softmax(ablated[0], -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def float64_pair(hf64, sae64: StandardSAE, tokens: torch.Tensor, feature: int) -> torch.Tensor:
    """KL per position, all in float64, by transformers and a plain hook."""

    def remove(module, args, out):
        return single_feature_ablation_hook(sae64, feature)(out, None)

    log_p = F.log_softmax(hf64(tokens).logits[0], -1)
    handle = hf64.gpt_neox.layers[3].register_forward_hook(remove)
    log_q = F.log_softmax(hf64(tokens).logits[0], -1)
    handle.remove()
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def describe(model: LanguageModel, sae: StandardSAE, texts: list[str]) -> None:
    n_active, share, rows_share = [], [], []
    for tokens in model.tokenize(texts, prepend_bos=True):
        active = sae.encode(model.activations(torch.tensor([tokens]), HOOK)[0]) > 0
        n_active.append(float(active.sum(1).float().mean()))
        fires = active.any(0)
        share.append(float(fires.float().mean()))
        rows_share.append(float((len(tokens) - active.int().argmax(0)[fires]).sum() / active.numel()))
    print(
        f"{len(texts)} texts of {len(tokens)} tokens with BOS, {sae.d_sae} latents, L0 {statistics.mean(n_active):.0f};"
        f" {statistics.mean(share):.1%} of pairs fire, {statistics.mean(rows_share):.1%} of positions are computed"
    )


def accuracy(model: LanguageModel, sae: StandardSAE, bridge, texts: list[str], n: int, scale: float) -> None:
    """Worst errors of per-pair mean and max KL, with the decoder scaled to make the effects larger."""
    sae = copy.deepcopy(sae)
    with torch.no_grad():
        sae.W_dec.mul_(scale)
    hf64, sae64 = copy.deepcopy(model.hf_model).double(), copy.deepcopy(sae).double()
    text = texts[:1]
    tokens = torch.tensor(model.tokenize(text, prepend_bos=True))
    active = (sae.encode(model.activations(tokens, HOOK)[0]) > 0).any(0)
    features = torch.nonzero(active).flatten()[:: max(1, int(active.sum()) // n)][:n].tolist()
    ours = {
        row["feature_idx"]: row
        for row in rank_features_by_ablation(sae, model, HOOK, text, features, show_progress=False)
    }
    exact = {feature: float64_pair(hf64, sae64, tokens, feature) for feature in features}
    theirs = {feature: original_pair(bridge, sae, tokens, feature).double() for feature in features}
    kls = [float(kl.mean()) for kl in exact.values()]
    print(f"decoder x{scale:g}: mean KL of {len(features)} latents {min(kls):.1e} .. {max(kls):.1e}")
    for name, mean, largest in (
        ("ours", lambda f: ours[f]["mean_kl"], lambda f: ours[f]["max_kl"]),
        ("original's way", lambda f: float(theirs[f].mean()), lambda f: float(theirs[f].max())),
    ):
        of_mean = [abs(mean(f) - float(exact[f].mean())) for f in features]
        of_max = [abs(largest(f) - float(exact[f].max())) for f in features]
        relative = statistics.median(e / k for e, k in zip(of_mean, kls, strict=True))
        print(
            f"  {name:<15} error against float64: mean_kl {max(of_mean):.1e} (median relative {relative:.0e}),"
            f" max_kl {max(of_max):.1e}"
        )


class Timed(NamedTuple):
    """Seconds, or a ratio of two of them."""

    wall: float
    cpu: float

    def per(self, n: int) -> "Timed":
        return Timed(self.wall / n, self.cpu / n)


def timed(work: Callable[[], object]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


def median(values: list[Timed]) -> Timed:
    return Timed(statistics.median(v.wall for v in values), statistics.median(v.cpu for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--latents", type=int, default=256, help="random latents that ours ranks in a round")
    parser.add_argument("--pairs", type=int, default=8, help="pairs that the original's way takes in a round")
    parser.add_argument("--l0", type=float, default=205.0)
    parser.add_argument("--check", type=int, default=24, help="latents whose error is measured")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice if not given")
    parser.add_argument("--full", action="store_true", help="also rank all latents once")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(2)
    texts = [
        " ".join(f"w{int(index)}" for index in torch.randint(1, VOCAB, (19,), generator=generator)) for _ in range(20)
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        model = load_model(folder, device="cpu")
        # A model of its own: TransformerLens puts its modules into the one that it is given.
        bridge = build_transformer_model(folder, device="cpu", processing="raw")
    originals = {"HookedTransformer": build_hooked_transformer(), "TransformerBridge": bridge}
    originals = {name: lens for name, lens in originals.items() if lens is not None}
    sae = build_sae(model, texts, args.l0)
    token_lists = model.tokenize(texts, prepend_bos=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, oneDNN products: {matmul.onednn_pays()}")
    describe(model, sae, texts)
    for scale in (1.0, 100.0):
        accuracy(model, sae, bridge, texts, args.check, scale)

    def ours(features: list[int], *, onednn: bool = True) -> None:
        pays = matmul.onednn_pays
        matmul.onednn_pays = pays if onednn else lambda: False
        rank_features_by_ablation(sae, model, HOOK, texts, features, show_progress=False)
        matmul.onednn_pays = pays

    def original(lens, features: list[int]) -> None:
        for index, feature in enumerate(features):
            original_pair(lens, sae, torch.tensor([token_lists[index % len(texts)]]), feature)

    def draw(n: int) -> list[int]:
        return torch.randperm(sae.d_sae, generator=generator)[:n].tolist()

    for lens in originals.values():
        original(lens, draw(2))
    ours(draw(16))
    counted = engines.NeoXEngine.precise_effect
    in_float64 = []
    engines.NeoXEngine.precise_effect = lambda self, pairs: in_float64.append(len(pairs)) or counted(self, pairs)
    of_original: dict[str, list[Timed]] = {name: [] for name in originals}
    of_ours: dict[str, list[Timed]] = {"ours": [], "ours without oneDNN": []}
    print("milliseconds a pair, firing or not, wall / CPU")
    for number in range(args.rounds):
        features = draw(args.latents)
        for name, lens in originals.items():
            some = draw(args.pairs)
            of_original[name].append(timed(functools.partial(original, lens, some)).per(args.pairs))
        for name, values in of_ours.items():
            work = functools.partial(ours, features, onednn=name == "ours")
            values.append(timed(work).per(args.latents * len(texts)))
        now = {name: values[-1] for name, values in (of_original | of_ours).items()}
        line = ", ".join(f"{name} {1e3 * value.wall:.2f} / {1e3 * value.cpu:.2f}" for name, value in now.items())
        print(f"round {number + 1}: {line}", flush=True)
    print(f"pairs computed again in float64: {sum(in_float64)}")

    grid = sae.d_sae * len(texts)
    for name, values in of_original.items():
        minutes = median(values).wall * grid / 60
        print(f"{name}: {minutes:.0f} min for all {grid} pairs, extrapolated from {args.pairs * args.rounds}")
    for name, values in of_ours.items():
        print(f"{name}: {median(values).wall * grid / 60:.1f} min for all")
        for other, theirs in of_original.items():
            ratios = [Timed(a.wall / b.wall, a.cpu / b.cpu) for a, b in zip(theirs, values, strict=True)]
            walls = [ratio.wall for ratio in ratios]
            print(
                f"  {median(ratios).wall:.0f} times as fast as {other} (rounds {min(walls):.0f} to {max(walls):.0f};"
                f" by CPU time {median(ratios).cpu:.0f})"
            )
    if args.full:
        print(f"ours, all {sae.d_sae} latents in one call: {timed(lambda: ours(list(range(sae.d_sae)))).wall:.0f} s")


if __name__ == "__main__":
    main()
