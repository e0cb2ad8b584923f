"""What stands in a module for a weight that is offloaded: a tensor on meta that refuses to be computed with.

torch computes with a meta weight and CPU inputs without complaint in several operations (`F.linear` without
bias, `matmul`, `conv1d`) and returns memory that nobody has written. A placeholder raises instead, and says
which weight it is and what helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from endor.errors import KernelError

__all__ = ["OffloadedParameter", "OffloadedTensor", "placeholder"]

_META = torch.device("meta")


class OffloadedTensor(torch.Tensor):
    """A meta tensor that may be looked at, but not mixed with tensors that have data."""

    endor_name: str = ""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            tensors = list(_tensors((args, kwargs.values())))
            if any(tensor.device != _META and tensor.dim() for tensor in tensors):
                raise KernelError(_message(tensors, func))
            result = func(*args, **kwargs)
            return _marked(result, tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = memo[id(self)] = placeholder(self, name=self.endor_name)
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parameter = isinstance(self, nn.Parameter)
        return _rebuild, (tuple(self.shape), self.dtype, self.requires_grad, parameter, self.endor_name)


class OffloadedParameter(OffloadedTensor, nn.Parameter):
    """The placeholder of a parameter. Made from a tensor with data, it is an ordinary parameter: that is how
    others, who keep the class of what they replace, put a weight in its place."""

    def __new__(cls, data: torch.Tensor | None = None, requires_grad: bool = True) -> Self:
        if data is None or data.device != _META:
            return nn.Parameter(data, requires_grad)  # type: ignore[return-value, arg-type]
        plain = data.detach().as_subclass(torch.Tensor)
        return torch.Tensor._make_subclass(cls, plain, requires_grad)


def placeholder(tensor: torch.Tensor, *, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What stands for `tensor`, a parameter or a buffer, while it is offloaded."""
    return _make(
        tuple(tensor.shape),
        dtype or tensor.dtype,
        requires_grad=tensor.requires_grad,
        parameter=isinstance(tensor, nn.Parameter),
        name=name,
    )


def _make(
    shape: tuple[int, ...], dtype: torch.dtype, *, requires_grad: bool, parameter: bool, name: str
) -> torch.Tensor:
    empty = torch.empty(shape, dtype=dtype, device=_META)
    made = OffloadedParameter(empty, requires_grad) if parameter else empty.as_subclass(OffloadedTensor)
    made.endor_name = name
    return made


def _rebuild(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    parameter: bool,
    name: str,
) -> torch.Tensor:
    return _make(shape, dtype, requires_grad=requires_grad, parameter=parameter, name=name)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "dict_values":
            yield from _tensors(value)


def _marked(result: Any, operands: Sequence[torch.Tensor]) -> Any:
    """What came of placeholders alone is one too: `weight.t()` is as little there as `weight`."""
    if isinstance(result, torch.Tensor) and result.device == _META and type(result) is torch.Tensor:
        marked = result.as_subclass(OffloadedTensor)
        marked.endor_name = _name_of(operands)
        return marked
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_marked(item, operands) for item in result)
    return result


def _name_of(tensors: Sequence[torch.Tensor]) -> str:
    return next((t.endor_name for t in tensors if isinstance(t, OffloadedTensor) and t.endor_name), "")


def _message(tensors: Sequence[torch.Tensor], func: Callable[..., Any]) -> str:
    name = _name_of(tensors)
    operation = getattr(func, "__name__", str(func))
    return (
        f"{operation}: the weight {name!r} is offloaded and was used while it is not in memory. A weight is "
        "there during its own module's forward only; where another module uses it directly, name that "
        "module's class in preload_module_classes"
    )
