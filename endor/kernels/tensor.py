"""`BitmapTensor`: a packed weight that any PyTorch code can use as if it were the dense tensor.

It is a wrapper subclass, as torchao's quantised tensors are: shape, dtype and device are those of the dense
tensor, the storage is the packed sections. `F.linear` decodes into a scratch buffer that its owner lends, or
multiplies straight from the sections where that was asked for (`use_matmul`); every other operation decodes
into fresh memory. A weight that is streamed has its sections only while its block runs (`attach`, `detach`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F

from endor.errors import KernelError
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout
from endor.kernels.dispatch import decode as decode_packed
from endor.kernels.linear import RowScratch, check_matmul, packed_linear
from endor.kernels.smallest import encode_smallest

__all__ = ["BitmapTensor", "Scratch", "decode", "encode"]

_aten = torch.ops.aten
_READ_STORAGE = frozenset(
    {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__}
)
"""What reads a tensor's memory itself; a wrapper has none there."""
_SHARE_STORAGE = frozenset({torch.Tensor.share_memory_})
"""What hands a tensor's memory to others."""


class Scratch(RowScratch, Protocol):
    """Lends memory to decode into; what it lent before may be overwritten by the next call."""

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the next call."""


class BitmapTensor(torch.Tensor):
    """A weight as bitmap and values (or another mask and codec), usable wherever a dense tensor is.

    Args:
        layout: what the tensor is.
        packed: its sections, or None for a weight whose sections are attached while it is needed.
        dtype: the dtype it shows and decodes to; the stored one by default.
        scratch: lends the memory that `F.linear` decodes into; fresh memory without one.
        device: it shows; that of the sections by default.
        matmul: how `F.linear` multiplies, see `use_matmul`.
    """

    packed_layout: TensorLayout
    _packed: PackedTensor | None
    _scratch: Scratch | None
    _matmul: str

    def __new__(
        cls,
        layout: TensorLayout,
        packed: PackedTensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        scratch: Scratch | None = None,
        device: torch.device | None = None,
        matmul: str = "decode",
    ) -> Self:
        if device is None:
            device = packed.device if packed is not None else torch.device("cpu")
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, dtype=dtype or layout.dtype, device=device, requires_grad=False
        )
        self.packed_layout = layout
        self._packed = packed
        self._scratch = scratch
        self._matmul = check_matmul(matmul)
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:  # noqa: ARG002 - __new__ has used them
        super().__init__()

    @property
    def packed(self) -> PackedTensor:
        """The sections. Raises KernelError if the weight is streamed and its block is not running."""
        if self._packed is None:
            raise KernelError(
                f"a streamed weight of shape {list(self.shape)} was used while its block is not running. "
                "Its bytes are in memory only during the block's forward; load the model with a larger "
                "host_memory to keep them there"
            )
        return self._packed

    @property
    def is_attached(self) -> bool:
        """Whether the sections are in memory."""
        return self._packed is not None

    def attach(self, packed: PackedTensor) -> None:
        """Give the weight its sections."""
        self._packed = packed

    def detach_sections(self) -> None:
        """Take the sections away."""
        self._packed = None

    def use_scratch(self, scratch: Scratch) -> None:
        """Decode into `scratch` where one use is enough."""
        self._scratch = scratch

    def use_matmul(self, matmul: str) -> None:
        """Choose how `F.linear` multiplies.

        `decode`, as a new tensor does, multiplies with the dense weight: the result has the bits that the
        dense weight gives. `auto` takes the fastest way, which adds in another order: the last bits may
        differ. Raises PlanError for anything else.
        """
        self._matmul = check_matmul(matmul)

    @property
    def nnz(self) -> int:
        """Number of kept values."""
        return self.packed_layout.nnz

    @property
    def mask(self) -> str:
        return self.packed_layout.mask

    @property
    def codec(self) -> str:
        return self.packed_layout.codec

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed sections."""
        return self.packed_layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the packed sections per element."""
        return self.packed_layout.bits_per_weight

    def to_dense(self, *args: object, **kwargs: object) -> torch.Tensor:  # noqa: ARG002 - torch's signature
        """The dense tensor in this tensor's dtype, in memory of its own."""
        dense = decode_packed(self.packed)
        return dense if dense.dtype == self.dtype else dense.to(self.dtype)

    def _for_matmul(self) -> torch.Tensor:
        """The dense tensor for one use: perhaps a view of the sections or of the scratch."""
        packed = self.packed
        if packed.layout.is_plain and packed.layout.dtype == self.dtype:
            return packed.sections[DENSE_SECTION]
        return self.to_dense() if self._scratch is None else self._scratch.decode(packed, self.dtype)

    def _like(self, packed: PackedTensor | None, *, dtype: torch.dtype) -> BitmapTensor:
        device = packed.device if packed is not None else self.device
        scratch, matmul = self._scratch, self._matmul
        return BitmapTensor(
            self.packed_layout, packed, dtype=dtype, scratch=scratch, device=device, matmul=matmul
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"BitmapTensor(shape={list(self.shape)}, dtype={self.dtype}, mask={self.mask!r}, "
            f"codec={self.codec!r}, nnz={self.nnz}, bits_per_weight={self.bits_per_weight:.3f})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        packed = self._packed
        if packed is not None:
            packed = PackedTensor(packed.layout, {k: v.clone() for k, v in packed.sections.items()})
        copy: torch.Tensor = self._like(packed, dtype=self.dtype)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=False)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (
            self.packed_layout,
            dict(self.packed.sections),
            self.dtype,
            isinstance(self, torch.nn.Parameter),
            self._matmul,
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[TensorLayout, torch.dtype]]:
        names = [f"section_{name}" for name in self.packed.sections]
        for name, section in self.packed.sections.items():
            setattr(self, f"section_{name}", section)
        return names, (self.packed_layout, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: Mapping[str, torch.Tensor],
        context: tuple[TensorLayout, torch.dtype],
        size: object,
        stride: object,
    ) -> BitmapTensor:
        layout, dtype = context
        sections = {name.removeprefix("section_"): tensor for name, tensor in inner.items()}
        return cls(layout, PackedTensor(layout, sections), dtype=dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], BitmapTensor):
            return _linear(args[0], args[1], *args[2:], **kwargs)
        if func in _READ_STORAGE:
            return func(*_dense(args), **kwargs)
        if func in _SHARE_STORAGE:
            raise KernelError(
                f"{getattr(func, '__name__', func)}: a BitmapTensor has no storage of its own to share; "
                "share the checkpoint, or the tensor that endor.decode gives"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            # torch counts the versions of what views a tensor made outside inference mode; one made inside
            # has no counter.
            with torch.inference_mode(mode=False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        overload = func.overloadpacket
        if overload in (_aten.detach, _aten.alias) and isinstance(args[0], BitmapTensor):
            return args[0]._like(args[0]._packed, dtype=args[0].dtype)
        if overload is _aten._to_copy and isinstance(args[0], BitmapTensor):
            return _to_copy(args[0], kwargs)
        if any(isinstance(written, BitmapTensor) for written in _written(func, args, kwargs)):
            raise KernelError(
                f"{func} would write to a BitmapTensor, which is read-only; use endor.decode first"
            )
        return func(*_dense(args), **_dense(kwargs))


def _linear(x: torch.Tensor, weight: BitmapTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        with torch._C._DisableFuncTorch():  # it would wrap what is decoded; kernels need addresses
            dense = weight.to_dense()
        return F.linear(x, dense, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        # Backward needs the weight after the scratch has moved on.
        return F.linear(x, weight.to_dense(), bias)
    if weight._matmul == "auto":
        y = packed_linear(x, weight.packed, bias, dtype=weight.dtype, scratch=weight._scratch)
        if y is not None:
            return y
    # torch folds leading dimensions only for weights that require grad. For others a sliced x, such as the
    # last token of a prompt, becomes a batched product that first copies the weight: 131 MB and 50 times the
    # time for a head of 32000 x 2048.
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 2 and x.numel() else x
    return F.linear(rows, weight._for_matmul(), bias).reshape(*x.shape[:-1], weight.shape[0])


def _to_copy(tensor: BitmapTensor, kwargs: Mapping[str, Any]) -> BitmapTensor:
    device = kwargs.get("device")
    dtype = kwargs.get("dtype") or tensor.dtype
    packed = tensor._packed
    if packed is not None and device is not None:
        packed = packed.to(torch.device(device), non_blocking=bool(kwargs.get("non_blocking")))
    return tensor._like(packed, dtype=dtype)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operation writes to, by its schema."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += list(value) if isinstance(value, (list, tuple)) else [value]
    return written


def _dense(value: Any) -> Any:
    if isinstance(value, BitmapTensor):
        return value.to_dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


def _rebuild(
    layout: TensorLayout,
    sections: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    parameter: bool,
    matmul: str = "decode",
) -> torch.Tensor:
    tensor = BitmapTensor(layout, PackedTensor(layout, sections), dtype=dtype, matmul=matmul)
    return torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def encode(
    weight: torch.Tensor, *, values: str = "auto", mask: str = "auto", backend: str | None = None
) -> BitmapTensor:
    """Pack a weight: bit-exactly, unless a lossy codec is named.

    Every element whose bits are not all zero is kept, -0.0 included. `F.linear` with the result gives the
    bits that it gives with the dense weight; `use_matmul("auto")` makes it faster, see there.

    Args:
        weight: bf16, fp16, fp32 or float8_e4m3fn of any rank >= 1, zero-size dimensions included; other
            dtypes can only be stored as they are.
        values: a values codec, or `auto` for the smallest lossless one.
        mask: `bitmap`, `dense`, or `auto` for the smaller.
        backend: a kernel backend by name; the fastest by default.

    Raises KernelError for a dtype, codec or mask that do not go together.
    """
    packed = encode_smallest(weight, values=values, mask=mask, backend=backend)
    return BitmapTensor(packed.layout, packed)


def decode(
    packed: BitmapTensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """The dense tensor, in its stored dtype and bit-exact.

    Args:
        packed: what `encode` returned.
        out: contiguous tensor of the same shape, dtype and device to decode into; fresh memory by default.
        backend: a kernel backend by name; the fastest by default.
    """
    return decode_packed(packed.packed, out=out, backend=backend)
