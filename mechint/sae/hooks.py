"""Hook points inside an SAE, with the names and calls of TransformerLens's `HookedRootModule`.

They are written on torch's own module hooks, so that opening an SAE does not import TransformerLens.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechint.errors import MechintError, nearest

HookFunction = Callable[[Tensor, "HookPoint"], Tensor | None]
Names = str | Sequence[str] | Callable[[str], bool] | None


class HookPoint(nn.Module):
    """Passes a value on. A function attached to it, `fn(value, hook)`, sees the value and may return another."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.ctx: dict[str, Any] = {}
        self._handles: list[tuple[RemovableHandle, bool]] = []  # of a function, and whether it is permanent

    def forward(self, value: Tensor) -> Tensor:
        return value

    def add_hook(
        self,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> RemovableHandle:
        """Attach a function; `bwd` gives it the gradient of the value. `level` is TransformerLens's, and not used."""
        if dir == "fwd":
            handle = self.register_forward_hook(lambda *at: hook(at[-1], self), prepend=prepend)
        else:

            def backward(_: Any, __: Any, gradients: Any) -> Any:
                given = hook(gradients[0], self)
                return None if given is None else (given,)

            handle = self.register_full_backward_hook(backward, prepend=prepend)
        self._handles.append((handle, is_permanent))
        return handle

    def remove_hooks(self, including_permanent: bool = False) -> None:
        for handle, permanent in self._handles:
            if including_permanent or not permanent:
                handle.remove()
        self._handles = [] if including_permanent else [pair for pair in self._handles if pair[1]]


class Hooked(nn.Module):
    """A module with hook points, its children that are `HookPoint`s. Subclasses register them."""

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """The hook points by name."""
        return {name: point for name, point in self.named_modules() if isinstance(point, HookPoint)}

    def hook_points(self) -> list[HookPoint]:
        return list(self.hook_dict.values())

    def add_hook(self, name: Names, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd", **given: Any) -> None:
        """Attach a function to the points of a name, of several, or for which a function of the name is true."""
        for point in self._points(name):
            point.add_hook(hook, dir, **given)

    def reset_hooks(self, clear_contexts: bool = True, including_permanent: bool = False) -> None:
        """Remove all attached functions, but permanent ones unless asked for."""
        for point in self.hook_points():
            point.remove_hooks(including_permanent)
            if clear_contexts:
                point.ctx.clear()

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        bwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["Hooked"]:
        """A block in which these functions are attached; False for `reset_hooks_end` leaves them there."""
        handles: list[RemovableHandle] = []
        directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd")
        try:
            for direction, given in zip(directions, (fwd_hooks, bwd_hooks), strict=True):
                for name, hook in given:
                    handles += [point.add_hook(hook, direction) for point in self._points(name)]
            yield self
        finally:
            if reset_hooks_end:
                for handle in handles:
                    handle.remove()
                for point in self.hook_points():
                    point._handles = [pair for pair in point._handles if pair[0] not in handles]
                    if clear_contexts:
                        point.ctx.clear()

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        bwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The module's output with functions attached: `sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", fn)])`.

        With `bwd_hooks`, attach, run and go backward in a `hooks(...)` block, or pass `reset_hooks_end=False`.

        Raises:
            MechintError: a name that no hook point has.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Names = None,
        device: Any = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """`(output, cache)`; the cache holds what each hook point passed on, by name, detached.

        `incl_bwd`: the output must be one number; its gradients are cached as `<name>_grad`.
        """
        cache: dict[str, Tensor] = {}

        def keep(end: str) -> HookFunction:
            def store(value: Tensor, hook: HookPoint) -> None:
                kept = value.detach() if device is None else value.detach().to(device)
                cache[hook.name + end] = kept[0] if remove_batch_dim else kept

            return store

        backward: list[tuple[Names, HookFunction]] = [(names_filter, keep("_grad"))] if incl_bwd else []
        with self.hooks([(names_filter, keep(""))], backward):
            output = self(*args, **kwargs)
            if incl_bwd:
                output.backward()
        return output, cache

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """A block in which no attached function runs."""
        kept = [(point, point._forward_hooks) for point in self.hook_points()]
        for point, _ in kept:
            point._forward_hooks = OrderedDict()
        try:
            yield
        finally:
            for point, hooks in kept:
                point._forward_hooks = hooks

    def _points(self, name: Names) -> list[HookPoint]:
        there = self.hook_dict
        if callable(name):
            return [point for each, point in there.items() if name(each)]
        names = list(there) if name is None else [name] if isinstance(name, str) else list(name)
        for each in names:
            if each not in there:
                raise MechintError(f"{type(self).__name__} has no hook point {each!r}; {nearest(each, there)}")
        return [there[each] for each in names]
