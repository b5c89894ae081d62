"""What a causal language model is made of, found out by running it on two short texts rather than by its class's name.

The blocks are the list of modules that hand one residual stream from each to the next. So a vision tower, which a text
never enters, cannot be taken for them, and neither can a list of experts. The attention and the MLP of a block are the
two of its parts whose outputs it adds to the stream; where no two are (a scaled residual, an addition inside of the
MLP), nothing is claimed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechint.errors import MechintError

# Positions of the two texts that a model is looked at with; the texts differ in the last one only.
N_PROBE = 6
# Largest change of an earlier activation by a later token that is rounding, relative to its norm. With half precision
# the two texts' rows differ by no more in any family tested; attention that looks ahead changes them by a tenth or so.
SAME_PREFIX = {torch.float32: 1e-4}
SAME_PREFIX_HALF = 0.02
# The context length of models that have no limit of their own, as TransformerLens has it.
UNLIMITED_CONTEXT = 2048

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")


class Sizes(NamedTuple):
    """Sizes as a config states them; None where it does not."""

    d_model: int | None
    n_layers: int | None
    n_ctx: int
    d_vocab: int


class Structure(NamedTuple):
    """The blocks of a model, and the width of what they hand on."""

    blocks: nn.ModuleList
    d_model: int


class Parts(NamedTuple):
    """Modules of one block. `attn_out` and `mlp_out` are added to the residual stream as they come; `attn` and `mlp`
    are the layers themselves, which a norm may follow. None: there is no such module."""

    attn_out: nn.Module | None
    mlp_out: nn.Module | None
    attn: nn.Module | None
    mlp: nn.Module | None


def sizes_of(hf_config: Any, tokenizer: Any) -> Sizes:
    """Sizes of the text part of a config. A model without a context limit has its tokenizer's, or 2,048 tokens."""
    text = hf_config.get_text_config(decoder=True)
    limit = _first(text, "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
    if limit is None:
        said = getattr(tokenizer, "model_max_length", None)
        limit = said if said is not None and said < 10**7 else UNLIMITED_CONTEXT  # 10^30 stands for "not known"
    return Sizes(
        _first(text, "hidden_size", "n_embd", "d_model"),
        _first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        limit,
        text.vocab_size,
    )


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def probe_tokens(hf_config: Any, d_vocab: int, device: Any) -> Int[Tensor, "2 pos"]:
    """Two texts of ordinary tokens that differ in the last one. Ids with a role in the config (padding, images) do not
    occur."""
    roles: set[int] = set()
    for config in (hf_config, hf_config.get_text_config(decoder=True)):
        roles |= {value for key, value in vars(config).items() if key.endswith(("_id", "_index")) and _is_id(value)}
    ordinary = [token for token in range(min(d_vocab, N_PROBE + 1 + len(roles) + 8)) if token not in roles]
    ordinary = [ordinary[i % len(ordinary)] for i in range(N_PROBE + 1)]
    return torch.tensor([ordinary[:N_PROBE], [*ordinary[: N_PROBE - 1], ordinary[N_PROBE]]], device=device)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def hidden_argument(args: tuple, kwargs: dict) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]:
    """The residual stream among a block's arguments, and a function that puts another in its place."""
    if args:
        return args[0], lambda value: ((value, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda value: (args, {**kwargs, "hidden_states": value})


def first_output(output: Any) -> Any:
    """What a module gives, without what stands beside it (attention weights, a cache)."""
    return output[0] if isinstance(output, tuple) else output


class _Call(NamedTuple):
    """One call of a module: its number in the order of ends, and copies of what went in and came out."""

    order: int
    value_in: Tensor | None
    value_out: Tensor | None


@contextmanager
def _watching(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[_Call]]]:
    calls: dict[nn.Module, list[_Call]] = {module: [] for module in modules}
    count = 0

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal count
        given = args[0] if args else kwargs.get("hidden_states")
        calls[module].append(_Call(count, _copy(given), _copy(first_output(output))))
        count += 1

    with ExitStack() as handles:
        for module in calls:
            handles.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield calls


def _copy(value: Any) -> Tensor | None:
    """In float32 on the CPU, and a copy: some models add to an output in place."""
    if not isinstance(value, Tensor) or value.ndim != 3 or not value.is_floating_point():
        return None
    return value.detach().to("cpu", torch.float32, copy=True)


def find_structure(hf_model: Any, tokens: Int[Tensor, "2 pos"], name: str) -> Structure | None:
    """The model's blocks; None if no list of modules hands one residual stream on.

    Raises:
        MechintError: a later token changes what the blocks give at an earlier position.
    """
    lists = {path: module for path, module in hf_model.named_modules() if isinstance(module, nn.ModuleList)}
    with torch.inference_mode(), _watching({block for members in lists.values() for block in members}) as calls:
        hf_model.base_model(input_ids=tokens, use_cache=False)
    chains = {path: members for path, members in lists.items() if _hands_on([calls[block] for block in members])}
    # of a list within a block of another one, the outer one; of two beside each other, the longer one
    outer = [path for path in chains if not any(path.startswith(f"{other}.") for other in chains)]
    if not outer:
        return None
    blocks = chains[max(outer, key=lambda path: len(chains[path]))]
    out = calls[blocks[-1]][0].value_out
    assert out is not None
    _check_causal(out, hf_model.dtype, name)
    return Structure(blocks, out.shape[-1])


def _hands_on(calls: list[list[_Call]]) -> bool:
    """Whether each module is run once, on what the one before it gave, a vector a token."""
    handed: Tensor | None = None
    for of_one in calls:
        if len(of_one) != 1:
            return False
        _, value_in, value_out = of_one[0]
        if value_in is None or value_out is None or value_in.shape != value_out.shape:
            return False
        if value_in.shape[:2] != (2, N_PROBE) or (handed is not None and not torch.equal(handed, value_in)):
            return False
        handed = value_out
    return handed is not None


def _check_causal(out: Float[Tensor, "2 pos d_model"], dtype: torch.dtype, name: str) -> None:
    first, second = out[:, :-1]
    change = float(((first - second).norm(dim=-1) / first.norm(dim=-1).clamp_min(1e-9)).max())
    if change > SAME_PREFIX.get(dtype, SAME_PREFIX_HALF):
        raise MechintError(
            f"{name} looks both ways: a later token changes what it computes at an earlier one (by {change:.0%}), as in"
            " an encoder such as BERT. Its activations depend on the padding beside a text, and nothing can be"
            " predicted from them: give a causal language model"
        )


def find_parts(hf_model: Any, blocks: nn.ModuleList, tokens: Int[Tensor, "2 pos"]) -> list[Parts]:
    """The attention and the MLP of each block."""
    children = [list(block.children()) for block in blocks]
    watched = {module for modules in children for module in modules} | set(blocks)
    with torch.inference_mode(), _watching(watched) as calls:
        hf_model.base_model(input_ids=tokens, use_cache=False)
    return [_parts(block, calls, hf_model.dtype) for block in blocks]


def _parts(block: nn.Module, calls: dict[nn.Module, list[_Call]], dtype: torch.dtype) -> Parts:
    attn, mlp = (_child(block, names) for names in (_ATTENTION, _MLP))
    ran = [(module, calls[module][0]) for module in block.children() if len(calls[module]) == 1]
    ran.sort(key=lambda pair: pair[1].order)
    (own,) = calls[block]
    assert own.value_in is not None and own.value_out is not None
    added = own.value_out - own.value_in
    begin = next((i for i, (module, _) in enumerate(ran) if module is attn), len(ran))
    outputs: list[tuple[nn.Module, Tensor]] = []
    for module, call in ran[begin:]:
        value = call.value_out
        # of a module and the dropout behind it, which does nothing here, the module itself
        if value is not None and value.shape == added.shape and not any(torch.equal(value, v) for _, v in outputs):
            outputs.append((module, value))
    pairs = [
        (float((added - a - b).norm()), first, second)
        for i, (first, a) in enumerate(outputs)
        for second, b in outputs[i + 1 :]
    ]
    pairs.sort(key=lambda pair: pair[0])
    # what rounding to the model's precision leaves of stream + attention + MLP
    rounding = 4 * torch.finfo(dtype).eps * float(own.value_in.norm() + own.value_out.norm())
    proved = pairs and pairs[0][0] <= min(rounding, 0.1 * float(added.norm()))
    if not proved or (len(pairs) > 1 and pairs[1][0] < 4 * pairs[0][0]):
        return Parts(None, None, attn, mlp)
    return Parts(pairs[0][1], pairs[0][2], attn, mlp)


def _child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((module for name, module in block.named_children() if name in names), None)


def subtracts_mean(hf_model: Any, blocks: nn.ModuleList, tokens: Int[Tensor, "2 pos"]) -> bool:
    """Whether every reader of the residual stream takes its mean over d_model off (as LayerNorm does and RMSNorm does
    not), so that the mean changes no prediction.

    Found by adding a constant to the stream in front of every block and behind the last one; for the scale, the same
    with a vector of equal length that alternates in sign.
    """

    def logits(direction: Callable[[Tensor], Tensor] | None) -> Tensor:
        def shifted(value: Tensor) -> Tensor:
            assert direction is not None
            return value + value.float().std().to(value.dtype) * direction(value)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            value, put = hidden_argument(args, kwargs)
            return put(shifted(value))

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            value = shifted(first_output(output))
            return (value, *output[1:]) if isinstance(output, tuple) else value

        with ExitStack() as handles, torch.inference_mode():
            if direction is not None:
                for block in blocks:
                    handles.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                handles.callback(blocks[-1].register_forward_hook(after).remove)
            return hf_model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)

    own = logits(None)
    constant = (logits(torch.ones_like) - own).norm()
    alternating = (logits(_alternating) - own).norm()
    return bool(constant < 0.1 * alternating)


def _alternating(value: Tensor) -> Tensor:
    return (1 - 2 * (torch.arange(value.shape[-1], device=value.device) % 2)).to(value.dtype).expand_as(value)
