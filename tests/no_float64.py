"""A device without float64, as Apple's GPUs are, played by the CPU.

Within `NoFloat64()` the device "mps" is there. Tensors made or moved there say so, and stay there with all that is
computed from them; what they hold lies in ordinary memory. Making a float64 tensor there is the error that MPS raises,
and so is mixing them with tensors of the CPU that are not scalars.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps")
# Functions that take tensors of two devices.
MIXES = ("__setitem__", "__getitem__", "index_put_", "__get__", "__set__", "_has_compatible_shallow_copy_type")


def _is_mps(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "mps"


class NoFloat64(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, Any] = {}  # storages, held so that no other comes to lie at the same address
        self._patches = (
            mock.patch.object(torch.backends.mps, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
        )

    def __enter__(self) -> "NoFloat64":
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        super().__exit__(*what)
        for patch in self._patches:
            patch.stop()

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._there

    def _put(self, value: Any) -> None:
        for tensor in tree_flatten(value)[0]:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                if tensor.dtype in (torch.float64, torch.complex128):
                    raise TypeError(
                        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                    )
                storage = tensor.untyped_storage()
                self._there[storage._cdata] = storage

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        with torch._C.DisableTorchFunction():
            there = [one for one in tensors if self.holds(one)]
            if func == Tensor.device.__get__:
                return MPS if there else func(*args)
            if func == Tensor.is_mps.__get__:
                return bool(there)
            if name in ("cpu", "numpy", "to", "copy_", "_to_copy"):
                return self._moved(func, name, args, kwargs, bool(there))
            wanted = [value for value in (*args, *kwargs.values()) if _is_mps(value)]
            apart = [one for one in tensors if not self.holds(one) and one.dim() > 0]
            if there and apart and name not in MIXES:
                raise RuntimeError(f"Expected all tensors to be on the same device, but found mps and cpu! ({name})")
            args, kwargs = tree_map(lambda value: torch.device("cpu") if _is_mps(value) else value, (args, kwargs))
            result = func(*args, **kwargs)
            if there or wanted:
                self._put(result)
            return result

    def _moved(self, func: Callable, name: str, args: Any, kwargs: Any, there: bool) -> Any:
        if name == "numpy":
            if there:
                raise TypeError("can't convert mps device type tensor to numpy. Use Tensor.cpu() first")
            return func(*args, **kwargs)
        if name == "copy_":
            return func(*args, **kwargs)
        device = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (str, torch.device))]
        others = [value for value in args[1:] if isinstance(value, Tensor)]
        goes = there
        if name == "cpu":
            goes = False
        elif device:
            goes = _is_mps(device[0])
        elif others:
            goes = self.holds(others[0])
        args, kwargs = tree_map(lambda value: torch.device("cpu") if _is_mps(value) else value, (args, kwargs))
        result = func(*args, **kwargs)
        if goes != there:
            result = result.clone()  # a move, never the same memory
        if goes:
            self._put(result)
        return result
