"""What benchmarks/train.py times: the data, the weights that every contender starts from, and one step of each of them.

Data: 500,000 rows of width 512 by default, each the sum of 20 of 2000 random directions drawn by a Zipf law, plus noise
(0.03 a dimension) and a mean offset.

Weights ("planted"): the first 2000 decoder rows are the true directions, the others random; the encoder is the
transpose; one bias common to all latents puts L0 where it is wanted, and a learning rate of 1e-6 leaves it there. The
cost of a dense step does not depend on any of this; that of a step which skips zeros depends on L0, which is printed.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_trainers import FAMILIES, Recipe, matryoshka_widths, set_weights
from peers import ROOT
from torch import Tensor, nn

FOLDER = ROOT / "build" / "bench"
L0S = {"standard": (200.0, 60.0), "jumprelu": (60.0,), "gated": (60.0,)}  # the others: k
N_DIRECTIONS, PER_ROW, NOISE = 2000, 20, 0.03
STILL = 1e-6  # learning rate of the timed steps


class Contender(NamedTuple):
    name: str
    family: str  # original, saelens, dictionary_learning, sparsify, mechint
    architecture: str
    l0: str  # "" where any: a dense step
    step: Callable[[int], Any]
    n_active: Callable[[], float]  # L0 of the last step, or of the weights on a batch


class Weights(NamedTuple):
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    cut: dict[float, float]  # pre-activation above which that many latents a row lie, by L0


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model or platform.processor(),
        "vector": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def make_rows(path: Path, n: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows mapped from `path`, directions); written on first use."""
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(N_DIRECTIONS, d_in, generator=generator), dim=1)
    offset = nn.functional.normalize(torch.randn(d_in, generator=generator), dim=0) * 3
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        zipf = 1 / torch.arange(1, N_DIRECTIONS + 1).float()
        rows = torch.empty(n, d_in)
        for part in rows.split(10_000):
            picked = torch.multinomial(zipf.expand(len(part), -1), PER_ROW, generator=generator)
            strength = 0.5 + torch.rand(picked.shape, generator=generator)
            dense = torch.zeros(len(part), N_DIRECTIONS).scatter_(1, picked, strength)
            part.copy_(dense @ directions + offset + NOISE * torch.randn(part.shape, generator=generator))
        unfinished = path.with_suffix(".tmp")
        torch.save(rows, unfinished)
        unfinished.rename(path)
    return torch.load(path, mmap=True, weights_only=True), directions


def plant(rows: Tensor, directions: Tensor, d_sae: int, l0s: tuple[float, ...]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    d_in = rows.shape[1]
    others = torch.randn(max(0, d_sae - len(directions)), d_in, generator=generator)
    W_dec = nn.functional.normalize(torch.cat([directions, others])[:d_sae], dim=1)
    sample = rows[:2048]
    b_dec = rows[:20_000].mean(dim=0)
    pre = ((sample - b_dec) @ W_dec.t()).flatten()
    cut = {l0: float(pre.kthvalue(pre.numel() - round(l0 * len(sample))).values) for l0 in l0s}
    return Weights(W_dec.t(), W_dec, b_dec, cut)


class OriginalSAE(nn.Module):
    """The original pipeline's model, written from its description: plain row-major parameters."""

    def __init__(self, weights: Weights | None, d_in: int, d_sae: int):
        super().__init__()
        self.b_pre, self.b_enc = nn.Parameter(torch.zeros(d_in)), nn.Parameter(torch.zeros(d_sae))
        self.W_enc = nn.Parameter(nn.init.xavier_normal_(torch.empty(d_in, d_sae)))
        self.W_dec = nn.Parameter(nn.init.xavier_normal_(torch.empty(d_sae, d_in)))
        self.renormalize()
        if weights is not None:
            with torch.no_grad():
                self.W_enc.copy_(weights.W_enc)
                self.W_dec.copy_(weights.W_dec)
                self.b_pre.copy_(weights.b_dec)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = torch.relu((x - self.b_pre) @ self.W_enc + self.b_enc)
        return acts @ self.W_dec + self.b_pre, acts

    @torch.no_grad()
    def renormalize(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))


class OriginalLoop:
    """Its loop: random rows of a mapped tensor, autograd, clipping, torch's Adam as it comes, renormalising."""

    def __init__(self, rows: Tensor, sae: OriginalSAE, batch_size: int, seed: int = 0, *, among: Tensor | None = None):
        """`among`: the row numbers to train on, all if None."""
        self.rows, self.sae, self.batch_size = rows, sae, batch_size
        self.among = torch.arange(len(rows)) if among is None else among
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=STILL)
        self.ever_active = torch.zeros(len(sae.b_enc), dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(seed)
        self.last: dict[str, Tensor] = {}

    def step(self, lr: float, lam: float) -> None:
        picked = torch.randint(0, len(self.among), (self.batch_size,), generator=self.generator)
        x = self.rows[self.among[picked]]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x_hat, acts = self.sae(x)
        mse, l1 = (x_hat - x).pow(2).mean(), acts.abs().mean()
        loss = mse + lam * l1
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.sae.renormalize()
        self.ever_active |= (acts > 0).any(dim=0)
        self.last = {"mse": mse.detach(), "l1": l1.detach(), "acts": acts.detach()}


def batches(rows: Tensor, batch_size: int) -> Callable[[int], Tensor]:
    """Contiguous slices of rows in memory: the best case, and what every contender but the original loop is given."""
    held = rows[: 16 * batch_size].clone()
    return lambda step: held[(step % 16) * batch_size :][:batch_size]


def l0_on(encode: Callable[[Tensor], Tensor], x: Tensor) -> float:
    with torch.no_grad():
        return float((encode(x[:512]) > 0).float().sum(dim=1).mean())


def original(rows: Tensor, weights: Weights, batch_size: int, l0: float) -> Contender:
    sae = OriginalSAE(weights, rows.shape[1], len(weights.W_dec))
    nn.init.constant_(sae.b_enc, -weights.cut[l0])
    loop = OriginalLoop(rows, sae, batch_size)
    return Contender(
        "original loop",
        "original",
        "standard",
        "any",
        lambda step: loop.step(STILL, 3.0),
        lambda: l0_on(lambda x: sae(x)[1], rows),
    )


def peer(
    family: str, architecture: str, rows: Tensor, weights: Weights, batch_size: int, l0: float, **options: Any
) -> Contender:
    topk_like = "topk" in architecture
    recipe = Recipe(
        architecture=architecture.removesuffix("_adam"),
        d_in=rows.shape[1],
        d_sae=len(weights.W_dec),
        steps=1_000_000,
        batch_size=batch_size,
        lr=STILL,
        sparsity=l0 if topk_like or (family, architecture) == ("dictionary_learning", "jumprelu") else STILL,
        dead_after=1_000_000,
        options=options,
    )
    trainee = FAMILIES[family](recipe)
    threshold = architecture == "jumprelu"
    bias = torch.full((recipe.d_sae,), 0.0 if topk_like or threshold else -weights.cut[l0])
    data = batches(rows, batch_size)
    if topk_like:
        trainee.step(data(0))  # the first step places b_dec in some of them
    set_weights(trainee, weights.W_enc, bias, weights.W_dec, weights.b_dec)
    if threshold:
        named = dict(trainee.module.named_parameters())
        nn.init.constant_(named["threshold"], weights.cut[l0])
        if family == "dictionary_learning":  # it does not subtract b_dec from its input
            named["b_enc"].data.copy_(-(weights.b_dec @ weights.W_enc))
    label = {"saelens": "SAELens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}[family]
    extra = f" ({options['optimizer']})" if "optimizer" in options else ""
    return Contender(
        f"{label} {architecture}{extra}",
        family,
        architecture,
        f"{l0:g}" if topk_like else "any",
        lambda step: trainee.step(data(step)),
        lambda: l0 if topk_like else l0_on(trainee.encode, rows),
    )


def ours(
    architecture: str, kernel: str, rows: Tensor, weights: Weights, batch_size: int, l0: float, *, fetch: bool = False
) -> Contender:
    """`fetch`: with rows picked at random from the mapped file in every step, as `mechint train` does and as the
    original loop does."""
    from mechint.kernels import StepSettings, make_kernel
    from mechint.sae import Objective, build_sae

    options: dict[str, Any] = {"k": int(l0)} if "topk" in architecture else {}
    if architecture == "matryoshka_batchtopk":
        options["widths"] = tuple(matryoshka_widths(len(weights.W_dec)))
    sae = build_sae(architecture, rows.shape[1], len(weights.W_dec), options=options)
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc)
        sae.W_dec.copy_(weights.W_dec)
        sae.b_dec.copy_(weights.b_dec)
        if "topk" not in architecture:
            for name in {"gated": ("b_gate", "b_mag"), "jumprelu": ("threshold",)}.get(architecture, ("b_enc",)):
                sign = 1 if name == "threshold" else -1
                nn.init.constant_(sae.get_parameter(name), sign * weights.cut[l0])
    optimizer = torch.optim.Adam(sae.parameters(), lr=STILL, fused=True)
    steps = make_kernel(sae, optimizer, kernel=kernel)
    settings = StepSettings(STILL, 1.0, Objective(sparsity=STILL))
    data = batches(rows, batch_size)
    generator = torch.Generator().manual_seed(0)
    last: list[float] = [float("nan")]

    def step(number: int) -> None:
        x = data(number)
        if fetch:
            picked = torch.randint(0, len(rows), (batch_size,), generator=generator).sort().values
            x = rows.index_select(0, picked)
        last[0] = steps.step(x, settings).n_active

    name = f"ours {architecture}, {steps.name} kernel" + (", rows from the file" if fetch else "")
    return Contender(name, "mechint", architecture, f"{l0:g}", step, lambda: float(last[0]) / batch_size)
