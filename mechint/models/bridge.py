"""The only file that imports transformer_lens. Works with 3.9 and 4.x, through `TransformerBridge`.

A hook on single heads holds `[batch, pos, head, d_head]`. Here, and so in all of mechint, heads are laid side by side:
whoever reads a hook gets `[batch, pos, d_in]`, and what an edit returns is put back in the hook's own shape.
"""

import contextlib
import math
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.errors import MechintError, nearest, one_line

# Largest relative difference between a bridge and its Hugging Face model that rounding makes: attention is eager in
# one and fused in the other. Families that TransformerLens computes wrongly differ by a tenth or more.
SAME_MODEL = {torch.float32: 0.005}
SAME_MODEL_HALF = 0.05


def boot_bridge(
    source: str,
    *,
    hf_model: Any,
    tokenizer: Any,
    device: str,
    dtype: torch.dtype,
    centred: bool,
    name: str,
    probe: Int[Tensor, "batch pos"],
    expected: tuple[Tensor, Mapping[str, Tensor]],
) -> Any:
    """A `TransformerBridge` around an already loaded Hugging Face model, proved to be that model.

    `centred` gives the numerics of the old `HookedTransformer.from_pretrained` (LayerNorm folded, weights centred);
    otherwise every hook holds exactly what the Hugging Face model computes. Switches `hf_model` to eager attention.

    Args:
        expected: the log-probabilities of `probe`, and what hooks of the residual stream hold, by `hf_model` itself.

    Raises:
        MechintError: TransformerLens does not know the family, or computes something else than the model.
    """
    from transformer_lens.model_bridge import TransformerBridge

    kind = type(hf_model).__name__
    try:
        with _no_installing():
            bridge = TransformerBridge.boot_transformers(
                source, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
            )
            bridge.enable_compatibility_mode(no_processing=not centred)
        # The bridge's default is False for GPT-NeoX; the original pipeline, and mechint everywhere, prepends BOS.
        bridge.cfg.default_prepend_bos = True
        difference = _difference(bridge, probe, *expected)
    except MechintError:
        raise
    except Exception as error:  # what an unknown layout makes its adapters raise has no common class
        raise MechintError(
            f"TransformerLens cannot run {name} ({kind}): {one_line(error, 160)}; use a hook that --backend"
            " transformers has, such as blocks.3.hook_resid_post"
        ) from error
    if not difference <= SAME_MODEL.get(dtype, SAME_MODEL_HALF):
        advice = "use --processing raw, or" if centred else "use"
        raise MechintError(
            f"TransformerLens's {'processing' if centred else 'version'} of {name} ({kind}) is another model: its"
            f" values differ from Hugging Face's by {difference:.1%}; {advice} a hook that --backend transformers has,"
            " such as blocks.3.hook_resid_post"
        )
    return bridge


def _difference(bridge: Any, probe: Tensor, log_probs: Tensor, hooked: Mapping[str, Tensor]) -> float:
    """The largest relative difference of the bridge's values from the expected ones."""
    with torch.inference_mode():
        own = bridge(probe, return_type="logits").float().log_softmax(-1)
        values = read_hooks(bridge, probe, list(hooked)) if hooked else {}
    found = [(own, log_probs), *((values[name], value) for name, value in hooked.items())]
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in found)


@contextlib.contextmanager
def _no_installing() -> Iterator[None]:
    """TransformerLens runs `pip install torchvision`, which brings another torch along, where a model with a vision
    tower has no image processor. Texts need none."""

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise OSError("mechint installs nothing by itself")

    own, subprocess.check_call = subprocess.check_call, refuse
    try:
        yield
    finally:
        subprocess.check_call = own


def is_bridge(model: Any) -> bool:
    """Whether `model` is a `TransformerBridge`, without importing transformer_lens for anything else."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


def read_hooks(
    bridge: Any, tokens: Int[Tensor, "batch pos"], hook_names: Sequence[str], stop_at_layer: int | None = None
) -> dict[str, Tensor]:
    """What the hooks hold, each in its own shape; the model runs once, no further than `stop_at_layer`.

    Raises:
        MechintError: no pass through the model comes by one of them.
    """
    _, cache = bridge.run_with_cache(
        tokens,
        # a callable, because strings would also return the hooks' aliases
        names_filter=lambda name: name in hook_names,
        stop_at_layer=stop_at_layer,
        return_type=None,
    )
    for hook_name in hook_names:
        if hook_name not in cache:
            raise MechintError(
                f"hook {hook_name!r}: no pass through the model comes by it (TransformerLens switches some hooks on by"
                " settings): take another hook, such as blocks.3.hook_resid_post"
            )
    return {hook_name: cache[hook_name] for hook_name in hook_names}


def editing(
    hook_name: str, edit: Callable[..., Tensor], reads: str | None = None
) -> list[tuple[str, Callable[..., Any]]]:
    """`edit` as the hooks of a bridge's `run_with_hooks`; see `LanguageModel.logits_with`."""
    read: list[Tensor] = []

    def see(value: Tensor, hook: Any) -> None:
        read.append(value.flatten(2))

    def replace(value: Tensor, hook: Any) -> Tensor:
        if reads is not None and not read:
            raise wrong_order(reads, hook_name)
        return edit(value.flatten(2), *(() if reads is None else (read.pop(),))).reshape(value.shape)

    return [*([] if reads is None else [(reads, see)]), (hook_name, replace)]


def wrong_order(hook_in: str, hook_out: str) -> MechintError:
    return MechintError(
        f"an SAE cannot read {hook_in} and replace {hook_out}, which the model computes first: are hook_name and"
        " hook_name_out the wrong way around?"
    )


def shape_at(model: Any, hook_name: str) -> tuple[int, ...]:
    """The shape of a hook's value at one position, `(d_in,)` or `(n_heads, d_head)`, from tokens of two lengths.

    `model` has `bridge`, `name`, `n_ctx` and `d_vocab`.

    Raises:
        MechintError: the hook does not hold a vector for each position, or nothing reads what it holds, or putting its
            own value back changes the predictions.
    """
    found = []
    for n_pos in {min(length, model.n_ctx) for length in (7, 4)}:
        tokens = (torch.arange(2 * n_pos).view(2, n_pos) % model.d_vocab).to(model.device)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hooks that are switched off; the error says it
            value = read_hooks(model.bridge, tokens, [hook_name])[hook_name]
        if value.ndim not in (3, 4) or value.shape[:2] != (2, n_pos) or not value.is_floating_point():
            raise MechintError(
                f"hook {hook_name!r} holds {list(value.shape)} for 2 texts of {n_pos} tokens, not one vector a token:"
                " take another hook, such as blocks.3.hook_resid_post"
            )
        found.append(tuple(value.shape[2:]))
    if len(set(found)) > 1:
        raise MechintError(
            f"hook {hook_name!r} holds {list(found[0])} or {list(found[1])} for a token, by the length of the text, not"
            " one vector: take another hook, such as blocks.3.hook_resid_post"
        )
    with torch.inference_mode():
        noise = torch.randn(value.flatten(2).shape, generator=torch.Generator().manual_seed(0)).to(value)
        own = model.bridge(tokens, return_type="logits")
        try:
            same, changed = (
                model.bridge.run_with_hooks(tokens, fwd_hooks=editing(hook_name, edit), return_type="logits")
                for edit in (lambda own: own, lambda own: own + noise * (1 + own.std()))
            )
        except Exception as error:  # such as a norm without the weights that TransformerLens looks for
            raise MechintError(
                f"hook {hook_name!r}: TransformerLens cannot replace what {model.name} computes there"
                f" ({one_line(error, 120)}): take another hook, such as blocks.3.hook_resid_post"
            ) from error
        moved = float((same.float().log_softmax(-1) - own.float().log_softmax(-1)).norm())
        if moved > SAME_MODEL.get(own.dtype, SAME_MODEL_HALF) * float(own.float().log_softmax(-1).norm()):
            raise MechintError(
                f"hook {hook_name!r}: TransformerLens puts back another value there than {model.name} computes, so that"
                " predictions change even when nothing is edited: take another hook, such as blocks.3.hook_resid_post"
            )
        if torch.equal(changed, own):
            raise MechintError(
                f"hook {hook_name!r}: {model.name} does not use what is put there, so that nothing can be measured by"
                " replacing it: take another hook, such as blocks.3.hook_resid_post"
            )
    return found[0]


class BridgedModel:
    """A `TransformerBridge` that the caller made, behind those methods of `LanguageModel` that readers use."""

    backend = "bridge"

    def __init__(self, bridge: Any):
        self.bridge = bridge
        self.hf_model = bridge.original_model
        self.tokenizer = bridge.tokenizer
        self.name: str = bridge.cfg.model_name
        self.d_vocab: int = bridge.cfg.d_vocab
        self.n_ctx: int = bridge.cfg.n_ctx
        self.device = next(bridge.parameters()).device
        self.processing: str | None = None  # not recorded by TransformerLens
        self._shapes: dict[str, tuple[int, ...]] = {}

    def check_hook(self, hook_name: str) -> None:
        if hook_name not in self.bridge.hook_dict:
            names = sorted(name for name in self.bridge.hook_dict if "original" not in name)
            raise MechintError(f"{self.name} has no hook {hook_name!r}; {nearest(hook_name, names)}")

    def hook_shape(self, hook_name: str) -> tuple[int, ...]:
        if hook_name not in self._shapes:
            self.check_hook(hook_name)
            self._shapes[hook_name] = shape_at(self, hook_name)
        return self._shapes[hook_name]

    def hook_width(self, hook_name: str) -> int:
        return math.prod(self.hook_shape(hook_name))

    def tokenize(self, texts: Sequence[str], *, prepend_bos: bool, context_size: int | None = None) -> list[list[int]]:
        limit = min(context_size or self.n_ctx, self.n_ctx)
        rows = [self.bridge.to_tokens(text, prepend_bos=prepend_bos)[0].tolist() for text in texts]
        return [row[:limit] for row in rows]

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.bridge(tokens.to(self.device), return_type="logits")

    def activations(self, tokens: Int[Tensor, "batch pos"], hook_name: str) -> Float[Tensor, "batch pos d_in"]:
        return self.activations_at(tokens, [hook_name])[hook_name]

    def activations_at(
        self, tokens: Int[Tensor, "batch pos"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        found = read_hooks(self.bridge, tokens.to(self.device), hook_names)
        return {hook_name: value.flatten(2) for hook_name, value in found.items()}

    def logits_with(
        self, tokens: Int[Tensor, "batch pos"], hook_name: str, edit: Callable[..., Tensor], *, reads: str | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        hooks = editing(hook_name, edit, reads)
        return self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks, return_type="logits")
