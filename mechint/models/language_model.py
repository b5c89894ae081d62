"""One language model behind two backends that give the same tensors.

"transformers" puts a plain forward hook on the Hugging Face model: quick to import, the fast path for collection, and
limited to the residual stream between blocks and to what attention and MLP give. "bridge" is TransformerLens and knows
every hook.

Processing "raw" is the residual stream as the model computes it (Hugging Face's `hidden_states[layer + 1]`). "centred"
is that minus its mean over d_model, which is what TransformerLens's old default processing gave. It is offered where
every reader of the residual stream begins with a LayerNorm, so that centring changes no log-probability. An RMSNorm
does not subtract the mean: there TransformerLens leaves it in, and "centred" is refused.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import canonical_hook, layer_of_hook
from mechint.errors import MechintError, nearest
from mechint.models.bridge import editing, read_hooks, shape_at, wrong_order
from mechint.models.placing import BESIDE_INT8, main_device, on_one_device, placing, warn_if_offloaded, weight
from mechint.models.resolve import BUILTIN_MODELS, load_pretrained, resolve_model
from mechint.models.structure import (
    Parts,
    find_parts,
    find_structure,
    first_output,
    hidden_argument,
    probe_tokens,
    sizes_of,
    subtracts_mean,
)
from mechint.provenance import detect_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": BESIDE_INT8}
_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# What a part of a block gives, by the fields of `Parts`: as it is added to the stream, or before a norm that follows.
_PART_HOOK = re.compile(r"blocks\.(\d+)\.(hook_attn_out|hook_mlp_out|attn\.hook_out|mlp\.hook_out)")
_PART_OF = {"hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "attn.hook_out": "attn", "mlp.hook_out": "mlp"}


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
        sizes = sizes_of(hf_model.config, tokenizer)
        self.n_ctx = sizes.n_ctx
        self.d_vocab = sizes.d_vocab
        self._probe = probe_tokens(hf_model.config, self.d_vocab, device)
        self._structure = find_structure(hf_model, self._probe, name)
        # 0 where neither the model's structure nor its config says
        self.d_model = self._structure.d_model if self._structure else sizes.d_model or 0
        self.n_layers = len(self._structure.blocks) if self._structure else sizes.n_layers or 0
        self._parts: list[Parts] | None = None
        if processing == "centred":
            self.centre()
        self._bridge: Any = None
        self._sha256: str | None = None
        self._tokenizer_sha256: str | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The layers. Raises `MechintError` where no list of modules hands one residual stream on."""
        if self._structure is None:
            raise MechintError(
                f"{self.name} ({type(self.hf_model).__name__}) has no list of blocks that hand one residual stream from"
                " each to the next: use --backend bridge"
            )
        return self._structure.blocks

    @functools.cached_property
    def subtracts_mean(self) -> bool:
        """Whether what reads the residual stream takes its mean off, so that "centred" is another name of it."""
        return subtracts_mean(self.hf_model, self.blocks, self._probe)

    def centre(self) -> None:
        """Use the model in the processing "centred" from here on. Raises `MechintError` where that has no meaning."""
        if not self.subtracts_mean:
            raise MechintError(
                f"processing centred has no meaning for {self.name}: what reads its residual stream does not subtract"
                " the mean (RMSNorm, for example, does not), so that taking it off changes the model's predictions, and"
                " TransformerLens leaves it in too. Use --processing raw, which is what others train on for this model"
            )
        self.processing = "centred"

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

            if not on_one_device(self.hf_model):
                raise MechintError(
                    f"{self.name} is spread over several devices, and TransformerLens runs on one: use a hook that"
                    " --backend transformers has, such as blocks.3.hook_resid_post"
                )
            self.weights_sha256()  # before the bridge folds and centres the weights, and sets up the tokenizer
            self.tokenizer_sha256()
            self._bridge = boot_bridge(
                self.location,
                hf_model=self.hf_model,
                tokenizer=self.tokenizer,
                device=self.device,
                dtype=self.hf_model.dtype,
                centred=self.processing == "centred",
                name=self.name,
                probe=self._probe,
                expected=self._expected_of_bridge(),
            )
        return self._bridge

    def _expected_of_bridge(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of the probe, and what the last block gives, by the plain Hugging Face model."""
        found: dict[str, Tensor] = {}
        with contextlib.ExitStack() as handles, torch.inference_mode():
            if self._structure is not None:
                hook_name = f"blocks.{self.n_layers - 1}.hook_resid_post"

                def see(value: Tensor) -> None:
                    found[hook_name] = self._processed(value)

                handles.enter_context(self._at(hook_name, see))
            return self.hf_model(input_ids=self._probe, use_cache=False).logits.float().log_softmax(-1), found

    def on_transformers(self, hook_name: str) -> bool:
        """Whether the "transformers" backend has the hook."""
        if self._structure is None:
            return False
        match = _RESIDUAL_HOOK.fullmatch(hook_name) or _PART_HOOK.fullmatch(hook_name)
        if match is None or int(match[1]) >= self.n_layers:
            return False
        return match[2] not in _PART_OF or self._part(hook_name) is not None

    def choose_backend(self, *hook_names: str) -> None:
        """Take the quicker backend that has all of these hooks."""
        self.backend = "transformers" if all(map(self.on_transformers, hook_names)) else "bridge"

    def _part(self, hook_name: str) -> torch.nn.Module | None:
        match = _PART_HOOK.fullmatch(hook_name)
        assert match is not None, hook_name
        if self._parts is None:
            self._parts = find_parts(self.hf_model, self.blocks, self._probe)
        return getattr(self._parts[int(match[1])], _PART_OF[match[2]])

    def check_hook(self, hook_name: str) -> None:
        """Raise `MechintError` unless this model and backend have the hook."""
        if self.backend == "transformers" and self.on_transformers(hook_name):
            return
        same = canonical_hook(hook_name)
        layer = layer_of_hook(same)
        if layer is not None and 0 < self.n_layers <= layer:
            raise MechintError(
                f"hook {hook_name!r}: {self.name} has {self.n_layers} layers, so the last block is"
                f" blocks.{self.n_layers - 1}"
            )
        if same != hook_name:
            raise MechintError(f"hook {hook_name!r} is a module's name: here it is {same}")
        if self.backend == "transformers":
            layers = range(self.n_layers if self._structure else 0)
            plain = [f"blocks.{i}.hook_resid_{site}" for i in layers for site in ("pre", "post")]
            parts = [f"blocks.{i}.{site}" for i in layers for site in _PART_OF]
            known = plain + [name for name in parts if self.on_transformers(name)]
            raise MechintError(
                f"hook {hook_name!r} is none that the transformers backend has for {self.name}"
                f" ({nearest(hook_name, known)}): use --backend bridge for the others"
            )
        if hook_name not in self.bridge.hook_dict:
            names = sorted(name for name in self.bridge.hook_dict if "original" not in name)
            raise MechintError(f"{self.name} has no hook {hook_name!r}; {nearest(hook_name, names)}")

    def hook_shape(self, hook_name: str) -> tuple[int, ...]:
        """The shape of a hook's value at one position: `(d_in,)`, or `(n_heads, d_head)` for a hook on single heads.

        Raises:
            MechintError: no such hook; one that does not hold a vector for each position (an attention pattern, for
                example), or that only shows what the model uses (a new value would change nothing).
        """
        if hook_name not in self._shapes:
            self.check_hook(hook_name)
            plain = self.on_transformers(hook_name)
            self._shapes[hook_name] = (self.d_model,) if plain else shape_at(self, hook_name)
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
        """While the block lasts, `act` sees the value at the hook, and replaces it unless it returns None."""
        module, goes_in = self._module_at(hook_name)
        of_part = _PART_HOOK.fullmatch(hook_name) is not None  # Falcon then changes it in place
        if goes_in:

            def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
                value, put = hidden_argument(args, kwargs)
                new = act(value.to(self.device))
                return None if new is None else put(new.to(value.device))

            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:

            def after(module: Any, args: tuple, output: Any) -> Any:
                value = first_output(output)
                new = act((value.clone() if of_part else value).to(self.device))
                if new is not None:
                    new = (new.clone() if of_part else new).to(value.device)
                return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

            handle = module.register_forward_hook(after)
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
            value: Tensor = weight(self.hf_model, name, tensor).contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
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

    def _module_at(self, hook_name: str) -> tuple[torch.nn.Module, bool]:
        """The module at a hook of the "transformers" backend, and whether the hook holds what goes into it (else what
        comes out)."""
        if not self.on_transformers(hook_name):
            self.check_hook(hook_name)
            raise AssertionError(f"{hook_name} passed check_hook but is none of the transformers backend")
        match = _RESIDUAL_HOOK.fullmatch(hook_name)
        if match is not None:
            return self.blocks[int(match[1])], match[2] == "pre"
        part = self._part(hook_name)
        assert part is not None, hook_name
        return part, False

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


def load_model(
    name: str,
    *,
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str = "float32",
    processing: str = "raw",
    backend: str = "auto",
    hook_name: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model by Hub id, alias (`pythia-70m`), local folder, GGUF file, or `builtin/pythia-tiny`.

    `device_map` "auto" spreads it over all devices, and what they cannot hold over memory and disk; accelerate's own
    maps can be given too. `dtype` "int8" has its linear layers in 8 bits, by bitsandbytes, and activations in bfloat16.
    `backend` "auto" takes "transformers" for the hooks that it has (or when no hook is named) and "bridge" otherwise.
    With `hook_name`, the hook is checked before the model is returned.

    Raises:
        MechintError: unknown model, Hub unreachable, unusable device, unknown hook or setting; a model that looks both
            ways; `processing` "centred" for one whose norms do not subtract the mean; accelerate or bitsandbytes
            missing where they are needed.
    """
    for value, options, flag in (
        (dtype, DTYPES, "--dtype"),
        (processing, ("raw", "centred"), "--processing"),
        (backend, ("auto", "transformers", "bridge"), "--backend"),
    ):
        if value not in options:
            raise MechintError(f"{flag} {value!r} is not known; {nearest(value, options)}")
    if device_map == "auto" and device is not None:
        raise MechintError(f"--device {device} and --device-map auto: give one of them")
    device = detect_device(device)
    location = resolve_model(name)
    placed = placing(device, device_map, int8=dtype == "int8")
    hf_model, tokenizer, commit = load_pretrained(name, location, dtype=DTYPES[dtype], revision=revision, **placed)
    if placed:
        warn_if_offloaded(hf_model, name)
        device = main_device(hf_model, device)
    else:
        hf_model = hf_model.to(device)
    model = LanguageModel(
        name=name,
        location=location,
        hf_model=hf_model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        processing=processing,
        backend="transformers" if backend == "auto" else backend,
        device=device,
        revision=commit,
    )
    if hook_name is not None:
        if backend == "auto":
            model.choose_backend(hook_name)
        model.check_hook(hook_name)
    return model
