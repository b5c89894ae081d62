"""One language model behind two backends that give the same tensors.

"transformers" puts a plain forward hook on the Hugging Face model: quick to import, the fast path for collection, and
limited to the residual stream between blocks. "bridge" is TransformerLens and knows every hook.

Processing "raw" is the residual stream as the model computes it (Hugging Face's `hidden_states[layer + 1]`). "centred"
is that minus its mean over d_model, which is what TransformerLens's old default processing gave. Every reader of the
residual stream begins with a LayerNorm, so centring changes no log-probability.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import layer_of_hook
from mechint.errors import MechintError, nearest
from mechint.models.bridge import editing, read_hooks, shape_at, wrong_order
from mechint.models.resolve import BUILTIN_MODELS, load_pretrained, resolve_model
from mechint.provenance import detect_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


class _Reached(Exception):
    """Leaves the forward pass once the hooked value is there; what comes after it is not needed."""


@final
class LanguageModel:
    """A loaded model. Make one with `load_model`.

    Sequences in a batch are padded on the right with any token: attention is causal, so real tokens never see padding,
    and no mask is needed. The caller ignores what comes out at padded positions.
    """

    def __init__(
        self,
        *,
        name: str,
        location: str,
        hf_model: Any,
        tokenizer: Any,
        processing: str,
        backend: str,
        device: str,
        revision: str | None = None,
    ):
        self.name = name
        # What is recorded: a built-in name rather than where the package happens to be installed.
        self.source = name if name in BUILTIN_MODELS else location
        self.location = location
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.processing = processing
        self.backend = backend
        self.device = device
        self.revision = revision
        config = hf_model.config
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.n_ctx: int = config.max_position_embeddings
        self.d_vocab: int = config.vocab_size
        self.blocks = _find_blocks(hf_model, self.n_layers)
        self._bridge: Any = None
        self._sha256: str | None = None
        self._tokenizer_sha256: str | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def bos_token_id(self) -> int:
        """The tokenizer's BOS id; for tokenizers without one, as TransformerLens does, the end-of-text id."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:  # 0 is a valid id (Pythia's)
                if token_id < self.d_vocab:
                    return token_id
                raise MechintError(
                    f"the tokenizer of {self.name} has {token_id} as its BOS, and the model has only {self.d_vocab}"
                    " embeddings: use --no-prepend-bos"
                )
        raise MechintError(f"the tokenizer of {self.name} has no BOS token: use --no-prepend-bos")

    @property
    def bridge(self) -> Any:
        """The model as a `TransformerBridge`; made on first use."""
        if self._bridge is None:
            from mechint.models.bridge import boot_bridge

            self.weights_sha256()  # before the bridge folds and centres the weights, and sets up the tokenizer
            self.tokenizer_sha256()
            self._bridge = boot_bridge(
                self.location,
                hf_model=self.hf_model,
                tokenizer=self.tokenizer,
                device=self.device,
                dtype=self.hf_model.dtype,
                centred=self.processing == "centred",
            )
        return self._bridge

    def check_hook(self, hook_name: str) -> None:
        """Raise `MechintError` unless this model and backend have the hook."""
        match = _RESIDUAL_HOOK.fullmatch(hook_name)
        if match and int(match[1]) < self.n_layers:
            return
        layer = layer_of_hook(hook_name)
        if layer is not None and layer >= self.n_layers:
            raise MechintError(
                f"hook {hook_name!r}: {self.name} has {self.n_layers} layers, so the last block is"
                f" blocks.{self.n_layers - 1}"
            )
        residual = [f"blocks.{i}.hook_resid_{site}" for i in range(self.n_layers) for site in ("pre", "post")]
        if self.backend == "transformers":
            raise MechintError(
                f"hook {hook_name!r} is not a residual-stream hook of {self.name} ({nearest(hook_name, residual)}):"
                " use --backend bridge for the others"
            )
        if hook_name not in self.bridge.hook_dict:
            names = {name for name in self.bridge.hook_dict if "original" not in name} | set(residual)
            raise MechintError(f"{self.name} has no hook {hook_name!r}; {nearest(hook_name, sorted(names))}")

    def hook_shape(self, hook_name: str) -> tuple[int, ...]:
        """The shape of a hook's value at one position: `(d_in,)`, or `(n_heads, d_head)` for a hook on single heads.

        Raises:
            MechintError: no such hook; one that does not hold a vector for each position (an attention pattern, for
                example), or that only shows what the model uses (a new value would change nothing).
        """
        if hook_name not in self._shapes:
            self.check_hook(hook_name)
            residual = _RESIDUAL_HOOK.fullmatch(hook_name)
            self._shapes[hook_name] = (self.d_model,) if residual else shape_at(self, hook_name)
        return self._shapes[hook_name]

    def hook_width(self, hook_name: str) -> int:
        """d_in at a hook; raises as `hook_shape` does."""
        return math.prod(self.hook_shape(hook_name))

    def tokenize(self, texts: Sequence[str], *, prepend_bos: bool, context_size: int | None = None) -> list[list[int]]:
        """Token ids of each text, BOS first if asked for, cut to `context_size` (or the model's own limit)."""
        limit = min(context_size or self.n_ctx, self.n_ctx)
        first = [self.bos_token_id] if prepend_bos else []
        return [(first + row)[:limit] for row in self.token_lists(texts)]

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, whole and without special tokens around it."""
        if not texts:
            return []
        # Only the ids are asked for: the fast tokenizer runs over the batch in parallel.
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

    def activations(self, tokens: Int[Tensor, "batch pos"], hook_name: str) -> Float[Tensor, "batch pos d_in"]:
        """What the hook holds, heads side by side where it is one on single heads. The model runs no further than it
        must."""
        return self.activations_at(tokens, [hook_name])[hook_name]

    def activations_at(
        self, tokens: Int[Tensor, "batch pos"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """`activations` of several hooks from one pass, which ends behind the last of them; in the order asked for."""
        with torch.inference_mode():
            tokens = tokens.to(self.device, non_blocking=True)
            if self.backend == "transformers":
                return self._from_blocks(tokens, hook_names)
            layers = [layer_of_hook(hook_name) for hook_name in hook_names]
            stop = None if None in layers else max(layer for layer in layers if layer is not None) + 1
            found = read_hooks(self.bridge, tokens, hook_names, stop)
            return {hook_name: value.flatten(2) for hook_name, value in found.items()}

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own predictions."""
        with torch.inference_mode():
            return self.hf_model(input_ids=tokens.to(self.device), use_cache=False).logits

    def logits_with(
        self,
        tokens: Int[Tensor, "batch pos"],
        hook_name: str,
        edit: Callable[..., Float[Tensor, "batch pos d_out"]],
        *,
        reads: str | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Predictions with the hook's value `v` replaced by `edit(v)`; `v` is in this model's processing, and heads lie
        side by side.

        With `reads`, the name of a hook that the model computes earlier, by `edit(v, x)` with `x` what that one holds.
        """
        with torch.inference_mode():
            tokens = tokens.to(self.device)
            if self.backend == "bridge":
                return self.bridge.run_with_hooks(
                    tokens, fwd_hooks=editing(hook_name, edit, reads), return_type="logits"
                )
            with self.edited(hook_name, edit, reads=reads):
                return self.hf_model(input_ids=tokens, use_cache=False).logits

    @contextlib.contextmanager
    def edited(self, hook_name: str, edit: Callable[..., Tensor], *, reads: str | None = None) -> Iterator[None]:
        """While the block lasts, every run of the model has the hook's value replaced as in `logits_with`. With the
        "transformers" backend these are runs of `hf_model`, with the other ones of `bridge`.

        Values hold the positions of that run, which with a key-value cache are the new ones.
        """
        if self.backend == "bridge":
            with self.bridge.hooks(fwd_hooks=editing(hook_name, edit, reads)):
                yield
            return
        read: list[Tensor] = []

        def change(value: Tensor) -> Tensor:
            if reads is not None and not read:
                raise wrong_order(reads, hook_name)
            return edit(self._processed(value), *(() if reads is None else (read.pop(),)))

        with contextlib.ExitStack() as handles:
            if reads is not None:
                handles.enter_context(self._at(reads, lambda value: read.append(self._processed(value))))
            handles.enter_context(self._at(hook_name, change))
            yield

    @contextlib.contextmanager
    def _at(self, hook_name: str, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """While the block lasts, `act` sees the residual stream at the hook, and replaces it unless it returns None."""
        layer, site = self._site(hook_name)
        if site == "pre":

            def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
                value, put = _hidden_argument(args, kwargs)
                new = act(value)
                return None if new is None else put(new)

            handle = self.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
        else:

            def after(module: Any, args: tuple, output: Any) -> Any:
                new = act(output[0] if isinstance(output, tuple) else output)
                return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

            handle = self.blocks[layer].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def weights_sha256(self) -> str:
        """Hex SHA-256 over names, dtypes, shapes and bytes of all parameters as loaded, sorted by name."""
        if self._sha256 is not None:
            return self._sha256
        digest = hashlib.sha256()
        for name, tensor in sorted(self.hf_model.state_dict().items()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy())
        self._sha256 = digest.hexdigest()
        return self._sha256

    def tokenizer_sha256(self) -> str:
        """Hex SHA-256 over the tokens with their ids and, where the tokenizer has some, its merges in order."""
        if self._tokenizer_sha256 is None:
            parts: list[Any] = [sorted(self.tokenizer.get_vocab().items())]
            if getattr(self.tokenizer, "is_fast", False):
                merges = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"].get("merges") or []
                # written as "a b" or as ["a", "b"], by the version of the library
                parts.append([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
            self._tokenizer_sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self._tokenizer_sha256

    def _site(self, hook_name: str) -> tuple[int, str]:
        match = _RESIDUAL_HOOK.fullmatch(hook_name)
        if match is None:
            self.check_hook(hook_name)
            raise AssertionError(f"{hook_name} passed check_hook but is no residual hook")
        return int(match[1]), match[2]

    def _processed(self, residual: Tensor) -> Tensor:
        return residual - residual.mean(-1, keepdim=True) if self.processing == "centred" else residual

    def _from_blocks(self, tokens: Tensor, hook_names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def reached(hook_name: str, value: Tensor) -> None:
            found[hook_name] = value
            if len(found) == len(hook_names):
                raise _Reached

        with contextlib.ExitStack() as handles:
            for hook_name in hook_names:
                handles.enter_context(self._at(hook_name, functools.partial(reached, hook_name)))
            with contextlib.suppress(_Reached):
                self.hf_model.base_model(input_ids=tokens, use_cache=False)
        return {hook_name: self._processed(found[hook_name]) for hook_name in hook_names}


def _hidden_argument(args: tuple, kwargs: dict) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]:
    """The residual stream among a block's arguments, and a function that puts another in its place."""
    if args:
        return args[0], lambda value: ((value, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda value: (args, {**kwargs, "hidden_states": value})


def _find_blocks(hf_model: Any, n_layers: int) -> torch.nn.ModuleList:
    for _, module in hf_model.base_model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return module
    raise MechintError(f"{type(hf_model).__name__} has no list of {n_layers} blocks: use --backend bridge")


def backend_for(*hook_names: str) -> str:
    """The quicker backend that has all of these hooks."""
    return "transformers" if all(map(_RESIDUAL_HOOK.fullmatch, hook_names)) else "bridge"


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    processing: str = "raw",
    backend: str = "auto",
    hook_name: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model by Hub id, alias (`pythia-70m`), local folder, or `builtin/pythia-tiny`.

    `backend` "auto" takes "transformers" for residual-stream hooks (or when no hook is named) and "bridge" otherwise.
    With `hook_name`, the hook is checked before the model is returned.

    Raises:
        MechintError: unknown model, Hub unreachable, unusable device, unknown hook or setting.
    """
    for value, options, flag in (
        (dtype, DTYPES, "--dtype"),
        (processing, ("raw", "centred"), "--processing"),
        (backend, ("auto", "transformers", "bridge"), "--backend"),
    ):
        if value not in options:
            raise MechintError(f"{flag} {value!r} is not known; {nearest(value, options)}")
    if backend == "auto":
        backend = "transformers" if hook_name is None else backend_for(hook_name)
    device = detect_device(device)
    location = resolve_model(name)
    hf_model, tokenizer, commit = load_pretrained(name, location, dtype=DTYPES[dtype], revision=revision)
    model = LanguageModel(
        name=name,
        location=location,
        hf_model=hf_model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        processing=processing,
        backend=backend,
        device=device,
        revision=commit,
    )
    if hook_name is not None:
        model.check_hook(hook_name)
    return model
