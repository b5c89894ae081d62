"""One language model behind two backends that give the same tensors.

"transformers" puts a plain forward hook on the Hugging Face model: quick to import, the fast path for collection, and
limited to the residual stream between blocks. "bridge" is TransformerLens and knows every hook.

Processing "raw" is the residual stream as the model computes it (Hugging Face's `hidden_states[layer + 1]`). "centred"
is that minus its mean over d_model, which is what TransformerLens's old default processing gave. Every reader of the
residual stream begins with a LayerNorm, so centring changes no log-probability.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import layer_of_hook
from mechint.errors import MechintError, nearest
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

    @property
    def bos_token_id(self) -> int:
        """The tokenizer's BOS id; for tokenizers without one, as TransformerLens does, the end-of-text id."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:  # 0 is a valid id (Pythia's)
                return token_id
        raise MechintError(f"the tokenizer of {self.name} has no BOS token: use --no-prepend-bos")

    @property
    def bridge(self) -> Any:
        """The model as a `TransformerBridge`; made on first use."""
        if self._bridge is None:
            from mechint.models.bridge import boot_bridge

            self.weights_sha256()  # before the bridge folds and centres the weights
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

    def tokenize(self, texts: Sequence[str], *, prepend_bos: bool, context_size: int | None = None) -> list[list[int]]:
        """Token ids of each text, BOS first if asked for, cut to `context_size` (or the model's own limit)."""
        if not texts:
            return []
        limit = min(context_size or self.n_ctx, self.n_ctx)
        # Only the ids are asked for: the fast tokenizer runs over the batch in parallel.
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids
        first = [self.bos_token_id] if prepend_bos else []
        return [(first + row)[:limit] for row in ids]

    def activations(self, tokens: Int[Tensor, "batch pos"], hook_name: str) -> Float[Tensor, "batch ..."]:
        """What the hook holds; the model runs no further than it must.

        `[batch, pos, d_in]`, but `[batch, pos, head, d_head]` for a hook on single heads.
        """
        with torch.inference_mode():
            tokens = tokens.to(self.device)
            if self.backend == "transformers":
                return self._from_blocks(tokens, hook_name)
            layer = layer_of_hook(hook_name)
            _, cache = self.bridge.run_with_cache(
                tokens,
                # a callable, because a string would also return the hook's alias
                names_filter=lambda name: name == hook_name,
                stop_at_layer=None if layer is None else layer + 1,
                return_type=None,
            )
            return cache[hook_name]

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own predictions."""
        with torch.inference_mode():
            return self.hf_model(input_ids=tokens.to(self.device), use_cache=False).logits

    def logits_with(
        self,
        tokens: Int[Tensor, "batch pos"],
        hook_name: str,
        edit: Callable[[Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_in"]],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Predictions with the hook's value `v` replaced by `edit(v)`; `v` is in this model's processing."""
        with torch.inference_mode():
            tokens = tokens.to(self.device)
            if self.backend == "bridge":
                hooks = [(hook_name, lambda value, hook: edit(value))]
                return self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
            with self.edited(hook_name, edit):
                return self.hf_model(input_ids=tokens, use_cache=False).logits

    @contextlib.contextmanager
    def edited(self, hook_name: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the block lasts, every run of `hf_model` has the hook's value `v` replaced by `edit(v)`.

        With the "transformers" backend only. `v` holds the positions of that run, which with a key-value cache are the
        new ones.
        """
        layer, site = self._site(hook_name)
        if site == "pre":

            def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                value, put = _hidden_argument(args, kwargs)
                return put(edit(self._processed(value)))

            handle = self.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
        else:

            def after(module: Any, args: tuple, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (edit(self._processed(output[0])), *output[1:])
                return edit(self._processed(output))

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

    def _site(self, hook_name: str) -> tuple[int, str]:
        match = _RESIDUAL_HOOK.fullmatch(hook_name)
        if match is None:
            self.check_hook(hook_name)
            raise AssertionError(f"{hook_name} passed check_hook but is no residual hook")
        return int(match[1]), match[2]

    def _processed(self, residual: Tensor) -> Tensor:
        return residual - residual.mean(-1, keepdim=True) if self.processing == "centred" else residual

    def _from_blocks(self, tokens: Tensor, hook_name: str) -> Tensor:
        layer, site = self._site(hook_name)
        found: list[Tensor] = []

        def before(module: Any, args: tuple, kwargs: dict) -> None:
            found.append(_hidden_argument(args, kwargs)[0])
            raise _Reached

        def after(module: Any, args: tuple, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        block = self.blocks[layer]
        handle = (
            block.register_forward_pre_hook(before, with_kwargs=True)
            if site == "pre"
            else block.register_forward_hook(after)
        )
        try:
            self.hf_model.base_model(input_ids=tokens, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return self._processed(found[0])


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
        residual = hook_name is None or _RESIDUAL_HOOK.fullmatch(hook_name)
        backend = "transformers" if residual else "bridge"
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
