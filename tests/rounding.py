"""What rounding to float32 may do to a computation, derived while it runs: the bounds of tests that compare two ways to
compute the same.

The computation runs in float64 over float32 inputs, and beside each entry runs the standard deviation of the error that
float32 has there, in whatever order a processor adds. Operations round by up to U = 2^-24 of their result, up or down
as it comes (probabilistic error analysis: Higham and Mary 2019, "A new approach to probabilistic rounding error
analysis"), so that errors add as independent ones do, in squares:

    a + b, a * b, a / b    add U |result| to the errors of a and b; in a product each of them is multiplied by the size
                           of the other factor
    a sum of n products    adds gamma(n) sum |a_i b_i|: each of n additions rounds a partial sum that is no larger than
                           this, sqrt(n) U together, and n U at most (ROOM gamma(n) <= n U)
    a > b, relu, topk      have no error where the two sides are further apart than ROOM deviations. The rows of the
                           batch in which they are not are `unclear`: what they give is up to the processor

An error is within ROOM deviations. Independent ones leave 8 once in 10^15 entries; what it is for is those that have a
common cause, and operations that a written-out gradient needs beyond autograd's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

U = 2.0**-24
ROOM = 8.0
TINY = 2.0**-126  # below it float32 has no full digits

aten = torch.ops.aten


def gamma(n: int) -> float:
    return min(n / ROOM, math.sqrt(n)) * U


class Rounding(TorchDispatchMode):
    """Runs beside float64 on a CPU. `rows`: of the batch, so that what is unclear can be told by row."""

    def __init__(self, rows: int):
        super().__init__()
        self.unclear = torch.zeros(rows, dtype=torch.bool)
        self._errors: dict[Any, Tensor] = {}
        self._kept: list[Any] = []  # so that no address is used twice

    def error(self, tensor: Any) -> Tensor:
        """The deviation at each entry; 0 for what was given."""
        if not isinstance(tensor, Tensor):
            return torch.zeros((), dtype=torch.float64)
        found = self._errors.get(_place(tensor))
        return torch.zeros(tensor.shape, dtype=torch.float64) if found is None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        self._ask(packet, args)
        result = func(*args, **kwargs)
        outcome = result[0] if packet is aten.topk else result
        if _is_float(outcome) and packet not in FRESH and any(map(_is_float, _flat(args))):
            if packet in SAME:
                error = func(*_errors_for(self, args), **kwargs)
            else:
                assert packet in RULES, f"no rule for {func}"
                assert not kwargs or packet in (aten.add, aten.sub, aten.topk), (func, kwargs)
                errors = [self._errors.get(_place(a), 0.0) if isinstance(a, Tensor) else 0.0 for a in args]
                error = RULES[packet](result, args, errors, kwargs)
            self._errors[_place(outcome)] = torch.as_tensor(error, dtype=torch.float64).expand(outcome.shape)
        self._kept.append((args, result))
        return result

    def _ask(self, packet: Any, args: Any) -> None:
        """Mark the rows in which rounding could decide a comparison the other way."""
        if packet in COMPARISONS or packet is aten.relu:
            a, b = args[0], (args[1] if len(args) > 1 else 0.0)
        elif packet is aten.threshold_backward:
            a, b = args[1], args[2]
        elif packet is aten.topk:
            return self._ask_topk(args)
        else:
            return None
        if not _is_float(a):
            return None
        margin = _together(self.error(a), self.error(b)) + U * (b.abs() if isinstance(b, Tensor) else abs(b))
        return self._mark((a - b).abs() < ROOM * margin)

    def _ask_topk(self, args: Any) -> None:
        values, k, error = args[0], args[1], ROOM * self.error(args[0])
        if k >= values.shape[-1]:
            return
        kept = torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, dim=-1).indices, True)
        lowest = (values - error).masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
        highest = (values + error).masked_fill(kept, -math.inf).amax(dim=-1, keepdim=True)
        self._mark(torch.where(kept, values - error < highest, values + error > lowest) & (lowest < highest))

    def _mark(self, unclear: Tensor) -> None:
        if unclear.any():
            by_row = len(self.unclear) and unclear.numel() % len(self.unclear) == 0
            assert by_row or self.unclear.any(), "what is unclear belongs to no row"
            if by_row:
                self.unclear |= unclear.reshape(len(self.unclear), -1).any(dim=1)


def _place(tensor: Tensor) -> Any:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _flat(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [t for a in args for t in _flat(a)] if isinstance(args, (list, tuple)) else []


def _errors_for(mode: Rounding, args: Any) -> Any:
    """The arguments with errors in the place of values."""
    if isinstance(args, (list, tuple)):
        return type(args)(_errors_for(mode, a) for a in args)
    return mode.error(args) if _is_float(args) else args


# --- the rules: result, arguments, their errors (0.0: given), keyword arguments -> error of the result ----------------
# U twice where a scalar may come in that float32 has to round first


def _together(*errors: Any) -> Any:
    """Of independent errors: the root of the sum of their squares."""
    squares = [e * e for e in errors if isinstance(e, Tensor) or e]  # most are the 0 of what was given
    total = squares[0] if squares else torch.zeros((), dtype=torch.float64)
    for square in squares[1:]:
        total = total.add_(square) if total.shape == square.shape else total + square
    return total.sqrt()


def _add(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(e[0], kwargs.get("alpha", 1) * e[1], 2 * U * r)


def _mul(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(_times(a[0], e[1]), _times(a[1], e[0]), 2 * U * r)


def _times(value: Any, error: Any) -> Any:
    return value * error if isinstance(error, Tensor) else 0.0


def _div(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(e[0] / a[1], _times(r, e[1]) / a[1], 2 * U * r)


def _mm(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    A, B = a[0].abs(), a[1].abs()
    total = (A @ B).mul_(gamma(A.shape[1])).square_()
    if isinstance(e[0], Tensor):
        total.addmm_(e[0].square(), B.square_() if isinstance(e[1], float) else B.square())
    if isinstance(e[1], Tensor):
        total.addmm_(A.square_(), e[1].square())
    return total.sqrt_()


def _sum(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    n = a[0].numel() // max(1, r.numel())
    own = gamma(n) * a[0].to(r.dtype).abs().sum(*_dims(a))
    return _together(e[0].square().sum(*_dims(a)).sqrt(), own) if isinstance(e[0], Tensor) else own


def _mean(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(_sum(r, a, e, kwargs) * (r.numel() / a[0].numel()), U * r)


def _dims(a: Any) -> Any:
    return (list(range(a[0].ndim)), False) if len(a) == 1 else (a[1], a[2] if len(a) > 2 else False)


def _pow(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    assert a[1] in (1, 2), a[1]
    return e[0] if a[1] == 1 else _together(2 * a[0] * e[0], U * r)


def _relu(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return torch.where(r > 0, e[0], 0.0)


def _threshold_backward(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return torch.where(a[1] > a[2], e[0], 0.0)


def _exp(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(r * e[0], 2 * U * r)


def _tanh(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    return _together(e[0], 2 * U * r)  # its slope is 1 at most


def _tanh_backward(r: Tensor, a: Any, e: Any, kwargs: Any) -> Tensor:
    grad, y = a[0], a[1]
    return _together((1 - y * y) * e[0], 2 * grad * y * e[1], 2 * U * grad)


def _topk(r: Any, a: Any, e: Any, kwargs: Any) -> Any:
    return e[0].gather(-1, r[1]) if isinstance(e[0], Tensor) else 0.0


Rule = Callable[[Any, Any, Any, Any], Any]
RULES: dict[Any, Rule] = {
    aten.add: _add,
    aten.sub: _add,
    aten.mul: _mul,
    aten.div: _div,
    aten.mm: _mm,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.pow: _pow,
    aten.relu: _relu,
    aten.clamp_min: lambda r, a, e, kwargs: e[0],  # values are moved to the bound, never further apart
    aten.threshold_backward: _threshold_backward,
    aten.exp: _exp,
    aten.tanh: _tanh,
    aten.tanh_backward: _tanh_backward,
    aten.topk: _topk,
    aten.neg: lambda r, a, e, kwargs: e[0],
    aten.abs: lambda r, a, e, kwargs: e[0],
    aten.copy_: lambda r, a, e, kwargs: e[1],
}
COMPARISONS = {aten.gt, aten.lt, aten.ne}
# results without an error of their own
FRESH = {
    aten.ones_like,
    aten.zeros_like,
    aten.new_zeros,
    aten.new_empty_strided,
}
# entries go elsewhere, or are added to zeros: so do errors
SAME = {
    aten.t,
    aten.view,
    aten.expand,
    aten.unsqueeze,
    aten.squeeze,
    aten.select,
    aten.slice,
    aten.detach,
    aten.index,
    aten.gather,
    aten.stack,
    aten.slice_backward,
    aten.scatter,
    aten.scatter_add,
    aten.index_put,
    aten._to_copy,
}
