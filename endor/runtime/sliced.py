"""Weights of which only some rows are in memory at a time: embeddings, large heads, the experts of a layer.

A `SlicedWeight` looks like the whole tensor. An embedding lookup reads the rows it needs, a linear layer goes
through the weight tile by tile, an index gives one matrix of a stack; a `SliceSource` brings what these read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from endor.errors import KernelError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.tensor import BitmapTensor

__all__ = ["SliceSource", "SlicedWeight", "as_matrix"]

_AS_MATRIX = "_as_matrix"
_GET_ITEM = torch.Tensor.__getitem__
_BY_PARTS = frozenset({F.embedding, F.linear, _GET_ITEM})


class SliceSource(ABC):
    """Brings a weight into memory, in parts where somebody needs only parts."""

    has_rows = False
    has_tiles = False
    has_matrices = False

    @abstractmethod
    def whole(self) -> PackedTensor:
        """Everything, in memory of its own: for whatever does not go by parts."""

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Dense rows in the stored dtype, [len(indices), cols], in host memory; indices are int64 [n] there,
        inside the weight."""
        raise NotImplementedError

    def tiles(self) -> Iterator[tuple[int, PackedTensor]]:
        """Runs of rows, from the first to the last, each with its first row and valid until the next."""
        raise NotImplementedError

    def matrix(self, index: int) -> PackedTensor:
        """One matrix of a stack, [1, rows, cols], valid until another one of the same layer is asked for."""
        raise NotImplementedError

    def lend(self, index: int, part: BitmapTensor) -> None:
        """Remember that `part` has the sections of `matrix(index)`, to detach it when they become others."""
        raise NotImplementedError


class SlicedWeight(BitmapTensor):
    """A weight that a source brings in parts, unless it is attached as a whole."""

    _source: SliceSource | None = None

    def use_source(self, source: SliceSource | None) -> None:
        """Take the parts from `source` from now on."""
        self._source = source

    @property
    def source(self) -> SliceSource:
        """Raises KernelError after the runtime that owned it is closed."""
        if self._source is None:
            raise KernelError(
                f"a streamed weight of shape {list(self.shape)} was used after its runtime was closed; "
                "load the model again"
            )
        return self._source

    @property
    def packed(self) -> PackedTensor:
        if self._packed is not None:
            return self._packed
        whole = self.source.whole()
        return whole if whole.device == self.device else whole.to(self.device)

    def part(self, packed: PackedTensor) -> BitmapTensor:
        """A part of this weight as a weight of its own."""
        scratch, matmul = self._scratch, self._matmul
        return BitmapTensor(packed.layout, packed, dtype=self.dtype, scratch=scratch, matmul=matmul)

    def _like(self, packed: PackedTensor | None, *, dtype: torch.dtype) -> BitmapTensor:
        if packed is not None:
            return super()._like(packed, dtype=dtype)
        scratch, matmul = self._scratch, self._matmul
        like = SlicedWeight(
            self.packed_layout, dtype=dtype, scratch=scratch, matmul=matmul, device=self.device
        )
        like.use_source(self._source)
        return like

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weight = _weight_of(func, args)
        if weight is not None and not (torch.is_grad_enabled() and _requires_grad(args)):
            done = _by_parts(func, weight, args, kwargs)  # pyright: ignore - it does not see through the decorator
            if done is not None:
                return done
        return super().__torch_function__(func, types, args, kwargs)


def _weight_of(func: Callable[..., Any], args: tuple[Any, ...]) -> SlicedWeight | None:
    position = 0 if func is _GET_ITEM else 1
    found = args[position] if func in _BY_PARTS and len(args) > position else None
    return found if isinstance(found, SlicedWeight) and not found.is_attached else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_parts(
    func: Callable[..., Any], weight: SlicedWeight, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """What `func` gives, or None where the weight's source has no such parts."""
    source = weight.source
    if func is F.embedding and source.has_rows:
        return _embedding(weight, *args, **kwargs)
    if func is F.linear and source.has_tiles:
        return _linear(args[0], weight, *args[2:], **kwargs)
    if func is _GET_ITEM and source.has_matrices and (index := _as_index(args[1])) is not None:
        return _matrix(weight, index)
    return None


def _requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)


def _as_index(index: Any) -> int | None:
    """The matrix that `weight[index]` is, or None if that is something else."""
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
        return None if index.dtype == torch.bool else int(index)
    return None


def _embedding(
    weight: SlicedWeight, indices: torch.Tensor, _: SlicedWeight, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Look up in a table of only the rows that are needed; a padding index matters to gradients alone."""
    max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
    if max_norm is not None:
        raise KernelError(
            "an embedding with max_norm would rewrite its rows, which are streamed and read-only"
        )
    count = weight.shape[0]
    # On the host: rows are read from files. A device has done the token before by then, so nothing is lost.
    wanted, places = torch.unique(indices.cpu(), return_inverse=True)
    if len(wanted) and not (int(wanted[0]) >= 0 and int(wanted[-1]) < count):
        raise IndexError(
            f"index out of range in an embedding of {count} rows: {int(wanted[0])} to {int(wanted[-1])}"
        )
    table = weight.source.rows(wanted.to(torch.int64)).to(indices.device, weight.dtype)
    return F.embedding(places.to(indices.device), table)


def _linear(x: torch.Tensor, weight: SlicedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for first, packed in weight.source.tiles():
        part = slice(first, first + packed.layout.shape[0])
        out[:, part] = F.linear(rows, weight.part(packed), None if bias is None else bias[part])
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _matrix(weight: SlicedWeight, index: int) -> torch.Tensor:
    count = weight.shape[0]
    if not -count <= index < count:
        raise IndexError(f"index {index} is out of range for a stack of {count} matrices")
    packed = weight.source.matrix(index % count)
    matrix = as_matrix(packed)
    if matrix is None:
        return weight.part(packed).to_dense()[0]
    part = weight.part(matrix)
    weight.source.lend(index % count, part)
    return part


def as_matrix(packed: PackedTensor) -> PackedTensor | None:
    """The one matrix of a stack as a matrix, the same object each time, since kernels remember what they
    found out about it; None where its rows would form other row blocks."""
    kept: dict[str, Any] = vars(packed)
    if _AS_MATRIX not in kept:
        kept[_AS_MATRIX] = _as_matrix(packed)
    matrix: PackedTensor | None = kept[_AS_MATRIX]
    return matrix


def _as_matrix(packed: PackedTensor) -> PackedTensor | None:
    layout = packed.layout
    rows, cols = layout.shape[1:]
    matrix = TensorLayout((rows, cols), layout.dtype, layout.mask, layout.codec, layout.nnz, layout.params)
    if matrix.geometry.row_blocks != layout.geometry.row_blocks:
        return None
    shapes = {spec.name: spec.shape for spec in matrix.sections}
    return PackedTensor(matrix, {name: t.view(shapes[name]) for name, t in packed.sections.items()})
