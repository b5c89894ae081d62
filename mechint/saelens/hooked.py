"""`HookedSAETransformer`: a language model with SAEs in it, on TransformerLens's bridge (3.9 and 4.x).

An SAE is attached to a hook: what the hook holds is replaced by the SAE's output, and the SAE's own stages become hooks
of the model, `<hook>.hook_sae_input`, `_acts_pre`, `_acts_post`, `_recons`, `_error` and `_output`, that caches hold
and that functions can be attached to. A transcoder reads one hook and is attached to another, `hook_name_out`.

An SAE that was trained on the centred residual stream (TransformerLens's old default processing) is given centred
values also in a model that is loaded raw: the mean over d_model that centring removes is removed again by every
LayerNorm that reads the stream, so that predictions are those of a centred model. The other way round is an error.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from mechint.errors import MechintError, nearest
from mechint.inside import centres, read_hook, special_tokens, written_hook
from mechint.models import LanguageModel, load_model
from mechint.models.bridge import wrong_order
from mechint.sae import SAE
from mechint.sae.base import as_sae

# Arguments of TransformerLens's own from_pretrained that change no residual stream and no log-probability.
PROCESSING = ("fold_ln", "center_unembed", "fold_value_biases")
TOKENS_HOOK = "embed.hook_in"


@dataclass(eq=False)
class Attachment:
    """An SAE at a hook, and what must be undone to take it off."""

    sae: SAE
    reads: str  # the hook that is encoded
    writes: str  # the hook whose value is replaced: the same, but for transcoders
    use_error_term: bool
    exclude: frozenset[int]  # token ids at whose positions the SAE is passed by
    centres_in: bool
    centres_out: bool
    handles: list[tuple[Any, Any]] = field(default_factory=list)  # hooks, and TransformerLens's record of our function
    seen: Tensor | None = None  # what a transcoder reads, between the two hooks


@final
class HookedSAETransformer:
    """A language model that SAEs can be attached to. Make one with `from_pretrained`.

    Everything that TransformerLens's bridge can do is here as well (`to_tokens`, `run_with_cache`, `run_with_hooks`,
    `hook_dict`, `generate`, `cfg`, `tokenizer`, ...), with the attached SAEs in place.
    """

    def __init__(self, model: LanguageModel):
        self.language_model = model
        self.bridge: Any = model.bridge
        self._attached: dict[str, Attachment] = {}
        self._tokens: Tensor | None = None
        self._tokens_handle: Any = None

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype = "float32",
        center_writing_weights: bool = False,
        revision: str | None = None,
        **processing: Any,
    ) -> "HookedSAETransformer":
        """Load a model by Hub id, alias, local folder or `builtin/pythia-tiny`.

        Args:
            center_writing_weights: TransformerLens's old default processing, under which the residual stream is
                centred. Off here: SAEs trained on either kind can be attached to a raw model.
            processing: `fold_ln`, `center_unembed`, `fold_value_biases` are accepted; none of them changes a residual
                stream or a log-probability.

        Raises:
            MechintError: unknown model or argument, Hub unreachable, unusable device.
        """
        for name in processing:
            if name not in PROCESSING:
                raise MechintError(f"from_pretrained has no argument {name!r}; {nearest(name, PROCESSING)}")
        name = str(dtype).removeprefix("torch.")
        kind = "centred" if center_writing_weights else "raw"
        return cls(
            load_model(model_name, device=device, dtype=name, processing=kind, backend="bridge", revision=revision)
        )

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str, **given: Any) -> "HookedSAETransformer":
        """`from_pretrained` with the hooks exactly as the Hugging Face model computes them."""
        return cls.from_pretrained(model_name, **{**given, "center_writing_weights": False})

    def __getattr__(self, name: str) -> Any:
        if name in ("bridge", "language_model"):  # not there before __init__ has run
            raise AttributeError(name)
        return getattr(self.bridge, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bridge(*args, **kwargs)

    def __repr__(self) -> str:
        return f"HookedSAETransformer({self.language_model.name}, SAEs at {', '.join(self._attached) or 'no hook'})"

    def to(self, *args: Any, **kwargs: Any) -> "HookedSAETransformer":
        """Move the model (not the attached SAEs), as `torch.nn.Module.to`."""
        self.bridge.to(*args, **kwargs)
        self.language_model.device = str(next(self.bridge.parameters()).device)
        return self

    def eval(self) -> "HookedSAETransformer":
        """Evaluation mode, which a loaded model is in already."""
        self.bridge.eval()
        return self

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The attached SAEs by the name of the hook that they read."""
        return {name: attachment.sae for name, attachment in self._attached.items()}

    def get_sae_hook_name(self, sae: Any, internal: str = "hook_sae_acts_post") -> str:
        """The full name of one of an SAE's hooks, as caches and `hook_dict` have it."""
        sae = as_sae(sae)
        return f"{written_hook(sae, read_hook(sae))}.{internal}"

    # --- attaching and taking off -------------------------------------------------------------------------------------

    def add_sae(
        self, sae: Any, use_error_term: bool | None = None, exclude_special_tokens: bool | list[int] = False
    ) -> None:
        """Attach an SAE to the hook that it was trained on, in place of one that is there. It stays until `reset_saes`.

        A transcoder replaces what its `hook_name_out` holds by what it computes from its `hook_name`, skip connection
        included.

        Args:
            use_error_term: add what the SAE misses, so that the model computes what it did unless the SAE's hooks are
                interfered with. None: as `sae.use_error_term` says.
            exclude_special_tokens: pass the SAE by at special tokens (those of the tokenizer, or these ids).

        Raises:
            MechintError: the SAE names no hook, or one that the model does not have; another width or processing.
        """
        sae = as_sae(sae)
        reads = read_hook(sae)
        writes = written_hook(sae, reads)
        hooks = self.bridge.hook_dict
        for name in (reads, writes):
            if name not in hooks:
                raise self._no_hook(name, hooks)
        error = sae.use_error_term if use_error_term is None else use_error_term
        exclude = self._excluded(exclude_special_tokens)
        centred_in, centred_out = (centres(sae, name, self.language_model) for name in (reads, writes))
        attachment = Attachment(sae, reads, writes, error, exclude, centred_in, centred_out)
        for there in list(self._attached.values()):
            if there.reads == reads or hooks[there.writes] is hooks[writes]:
                self._take_off(there.reads)
        # hook points of the model's own class, so that its caches and functions find them
        stages = {name: type(hooks[writes])() for name in sae.hook_dict}
        for name, stage in stages.items():
            stage.name = f"{writes}.{name}"
            self.bridge._hook_registry[stage.name] = stage
        through = [(name, lambda value, hook: stages[hook.name](value)) for name in stages]

        def see(value: Tensor, hook: Any) -> None:
            attachment.seen = value

        def replace(value: Tensor, hook: Any) -> Tensor:
            with sae.hooks(through):
                return self._through(attachment, value)

        for name, function in ((reads, see), (writes, replace)):
            if function is replace or writes != reads:
                hooks[name].add_hook(function, is_permanent=True)
                attachment.handles.append((hooks[name], hooks[name].fwd_hooks[-1]))
        self._attached[reads] = attachment
        self._watch_tokens()

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take off the SAEs at these hooks, or all. Raises `MechintError` for a hook that has none."""
        names = list(self._attached) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
        for name in names:
            if name not in self._attached:
                there = ", ".join(self._attached) or "there is none at all"
                raise MechintError(f"no SAE is attached to {name!r}; attached: {there}")
        for name in names:
            self._take_off(name)

    @contextmanager
    def saes(
        self,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
    ) -> Iterator["HookedSAETransformer"]:
        """A block in which these SAEs are attached too; afterwards those are that were before, as they were.

        Args:
            reset_saes_end: False leaves them attached.
        """
        before = dict(self._attached)
        try:
            for sae in _listed(saes):
                self.add_sae(sae, use_error_term, exclude_special_tokens)
            yield self
        finally:
            if reset_saes_end:
                for name in [name for name, now in self._attached.items() if before.get(name) is not now]:
                    self._take_off(name)
                for name, was in before.items():
                    if name not in self._attached:
                        self.add_sae(was.sae, was.use_error_term, sorted(was.exclude))

    # --- running ------------------------------------------------------------------------------------------------------

    def run_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """A forward pass with these SAEs attached; what the model returns (logits, unless `return_type` says other)."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.bridge(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """`run_with_cache` with these SAEs attached: `(output, cache)`; the SAEs' hooks are in the cache."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.bridge.run_with_cache(
                *model_args, return_cache_object=return_cache_object, remove_batch_dim=remove_batch_dim, **kwargs
            )

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        fwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        bwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """`run_with_hooks` with these SAEs attached; functions may be put at the SAEs' hooks.

        Raises:
            MechintError: a hook that the model does not have (TransformerLens ignores those silently).
        """
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            there = self.bridge.hook_dict
            for name, _ in (*fwd_hooks, *bwd_hooks):
                if isinstance(name, str) and name not in there:
                    raise self._no_hook(name, there)
            return self.bridge.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _no_hook(self, name: str, hooks: Iterable[str]) -> MechintError:
        return MechintError(f"{self.language_model.name} has no hook {name!r}; {nearest(name, sorted(hooks))}")

    def _through(self, attachment: Attachment, value: Tensor) -> Tensor:
        """What the hook holds from now on."""
        sae = attachment.sae
        d_out = "d_in" if attachment.writes == attachment.reads else "d_out"
        target = self._side_by_side(value, sae.d_out, attachment.writes, d_out)
        x = target
        if attachment.writes != attachment.reads:
            if attachment.seen is None:
                raise wrong_order(attachment.reads, attachment.writes)
            x, attachment.seen = self._side_by_side(attachment.seen, sae.d_in, attachment.reads, "d_in"), None
        mean = None
        if attachment.centres_out:
            # given back afterwards, so that the error term makes up for all that is lost
            mean = target.mean(dim=-1, keepdim=True)
            target = target - mean
        if attachment.centres_in:
            x = x - x.mean(dim=-1, keepdim=True)
        passed = self._passed(attachment, value)
        out = sae.replacement(x, target, use_error_term=attachment.use_error_term, passed=passed)
        if mean is not None:
            out = out + mean
        return out.to(value.dtype).reshape(value.shape)

    def _side_by_side(self, value: Tensor, width: int, hook_name: str, dimension: str) -> Tensor:
        """What an SAE of this width is given of a hook's value: of one on single heads, `[batch, pos, head, d_head]`,
        all heads side by side, or one head after the other to an SAE of one head."""
        cfg = self.bridge.cfg
        if value.ndim > 3:
            heads = (cfg.n_heads, getattr(cfg, "n_key_value_heads", None))
            if value.ndim > 4 or value.shape[-1] != cfg.d_head or value.shape[-2] not in heads:
                raise MechintError(f"{hook_name} holds {list(value.shape)}, not one vector a token")
            if width != cfg.d_head or value.shape[-2] == 1:
                value = value.flatten(-2)
        if value.shape[-1] != width:
            raise MechintError(
                f"the SAE has {dimension} {width}, but {hook_name} of {self.language_model.name} is"
                f" {value.shape[-1]} wide"
            )
        return value

    def _passed(self, attachment: Attachment, value: Tensor) -> Tensor | None:
        """Where the SAE is passed by, `[batch, pos, 1]`; None for nowhere."""
        if not attachment.exclude:
            return None
        assert self._tokens is not None and self._tokens.shape == value.shape[:2], "no tokens seen for this pass"
        excluded = torch.tensor(sorted(attachment.exclude), device=self._tokens.device)
        return torch.isin(self._tokens, excluded)[..., None]

    def _excluded(self, exclude_special_tokens: bool | Sequence[int]) -> frozenset[int]:
        if isinstance(exclude_special_tokens, bool):
            return special_tokens(self.language_model.tokenizer) if exclude_special_tokens else frozenset()
        return frozenset(int(token) for token in exclude_special_tokens)

    def _take_off(self, hook_name: str) -> None:
        attachment = self._attached.pop(hook_name)
        for point, handle in attachment.handles:
            _remove(point, handle)
        for name in attachment.sae.hook_dict:
            self.bridge._hook_registry.pop(f"{attachment.writes}.{name}", None)
        self._watch_tokens()

    def _watch_tokens(self) -> None:
        """See the token ids of each pass while an attached SAE needs them."""
        needed = any(attachment.exclude for attachment in self._attached.values())
        point = self.bridge.hook_dict[TOKENS_HOOK]
        if needed and self._tokens_handle is None:

            def see(tokens: Tensor, hook: Any) -> None:
                self._tokens = tokens

            point.add_hook(see, is_permanent=True)
            self._tokens_handle = point.fwd_hooks[-1]
        elif not needed and self._tokens_handle is not None:
            _remove(point, self._tokens_handle)
            self._tokens_handle = self._tokens = None


def _listed(saes: Any) -> Iterable[Any]:
    """One SAE or several. An SAE of this package can be iterated over too, so it is asked for its kind first."""
    return [saes] if isinstance(saes, torch.nn.Module) else list(saes)


def _remove(point: Any, handle: Any) -> None:
    """Take one function off a hook and leave the others; by identity, as handles compare by content."""
    handle.hook.remove()
    for index, there in enumerate(point.fwd_hooks):
        if there is handle:
            del point.fwd_hooks[index]
            return
