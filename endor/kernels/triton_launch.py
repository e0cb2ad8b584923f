"""Launching the Triton kernels: what a packed tensor becomes as arguments, alone or in a table of many.

Nothing here waits for the device. What is wrong with the sections lands in a status tensor; whoever wants to
know reads it (`raise_for`), which does wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.native_backend import RULES
from endor.kernels.triton_kernels import elements as te
from endor.kernels.triton_kernels.decode import FIELDS, decode_group_kernel, decode_kernel
from endor.kernels.triton_launcher import Launcher
from endor.kernels.triton_operand import (
    OPTIONS,
    TILE_LANES,
    Launch,
    Sections,
    operand_of,
    tile_options,
)

__all__ = [
    "MAX_BLOCK_ELEMENTS",
    "OPTIONS",
    "DecodeGroup",
    "Launch",
    "Sections",
    "group_types",
    "launch_decode",
    "launch_is_impossible",
    "new_status",
    "on_device",
    "raise_for",
    "table_row",
    "tile_options",
]

MAX_BLOCK_ELEMENTS = 1 << 26
"""A row block with more elements is left to the reference backend: positions in one are 32-bit numbers, and
only a matrix with rows of this many columns has such blocks."""
_NOWHERE_ELSE = nullcontext()
_TRITON = {torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}


def new_status(device: torch.device, entries: int = 1) -> Tensor:
    """int64 [entries] that says that nothing is wrong."""
    return torch.full((entries,), te.NOTHING.value, dtype=torch.int64, device=device)


def raise_for(status: Tensor, names: Sequence[str] = ()) -> None:
    """Raise FormatError for the first entry in which something was wrong. Waits for the device."""
    for index, code in enumerate(status.tolist()):
        if code != te.NOTHING.value:
            name = f"{names[index]}: " if names else ""
            raise FormatError(f"{name}row block {code // 4}: {RULES[code % 4]}")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the device of `tensor`; Triton takes the current one, whatever it is given."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(device)


def launch_decode(
    packed: PackedTensor, start_block: int, stop_block: int, out: Tensor, status: Tensor
) -> None:
    """Start decoding row blocks [start_block, stop_block) to `out`; int64 `status` gets what is wrong."""
    operand = operand_of(packed)
    with on_device(out):
        launcher = operand.decoder
        if launcher is None:
            launcher = operand.decoder = Launcher(decode_kernel, operand.decode_options)
        arguments = (*operand.sections, out.view(operand.element), status, *operand.sizes, start_block)
        launcher(stop_block - start_block, arguments, out, status)


class DecodeGroup:
    """Decodes the same tensors to the same memory again and again, in as few launches as their codecs allow.

    Made once per set of addresses (a slot of a ring, a resident block). `launch` then starts one kernel for
    all matrices that share codec, mask, dtype and levels, copies nothing to the device and waits for nothing.

    Args:
        jobs: packed tensors, none of them plain, and for each the contiguous memory of its shape and dtype to
            decode to. Sections and outputs must stay where they are, 16-byte aligned as in a checkpoint.

    Raises KernelError for tensors that cannot be decoded so.
    """

    def __init__(self, jobs: Sequence[tuple[PackedTensor, Tensor]]) -> None:
        self._keep = tuple(jobs)
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for number, (packed, out) in enumerate(jobs):
            _check_job(packed, out)
            if packed.layout.geometry.numel:
                grouped.setdefault(_kind_of(packed), []).append(number)
        self._launches = tuple(self._plan(numbers) for numbers in grouped.values())

    @property
    def launches(self) -> int:
        """Kernels that one `launch` starts."""
        return len(self._launches)

    def launch(self) -> None:
        """Start decoding on the current stream."""
        for planned in self._launches:
            planned.start()

    def raise_for(self) -> None:
        """Raise FormatError for the first tensor so far that was damaged. Waits for the device."""
        for planned in self._launches:
            raise_for(planned.status, [f"entry {number}" for number in planned.numbers])

    def _plan(self, numbers: list[int]) -> _GroupLaunch:
        rows, program = [], 0
        for number in numbers:
            packed, out = self._keep[number]
            rows.append(table_row(packed, out, first_program=program))
            program += packed.layout.geometry.row_blocks
        device = self._keep[numbers[0]][1].device
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        return _GroupLaunch(
            tuple(numbers), program, table, new_status(device, len(numbers)), self._keep[numbers[0]][0]
        )


@dataclass(frozen=True)
class _GroupLaunch:
    """One launch of many matrices that are alike."""

    numbers: tuple[int, ...]
    programs: int
    table: Tensor
    status: Tensor
    example: PackedTensor

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Everything that the kernel is compiled for."""
        return {
            **Launch(self.example.layout).constants,
            **group_types(self.example),
            "ENTRIES": 1 << (len(self.numbers) - 1).bit_length(),
            **tile_options(TILE_LANES),
        }

    @cached_property
    def launcher(self) -> Launcher:
        return Launcher(decode_group_kernel, self.constants)

    def start(self) -> None:
        with on_device(self.table):
            self.launcher(self.programs, (self.table, self.status, len(self.numbers)))


def group_types(packed: PackedTensor) -> dict[str, Any]:
    """The types behind the addresses of a table, and what the compiler may know about its columns."""
    sections = packed.sections
    return {
        "ALIGNED": packed.layout.geometry.cols % 16 == 0,
        "ELEMENT": _TRITON[Launch(packed.layout).element],
        "OFFSET": _TRITON[sections["row_offsets"].dtype] if "row_offsets" in sections else tl.int32,
        "RECORD_OFFSET": _TRITON[sections["exponent_offsets"].dtype]
        if "exponent_offsets" in sections
        else tl.int32,
    }


def table_row(packed: PackedTensor, out: Tensor, *, first_program: int, start_block: int = 0) -> list[int]:
    """What the table of a grouped launch says about one tensor; see FIELDS."""
    layout, g = packed.layout, packed.layout.geometry
    sizes = [first_program, start_block, g.rows, g.cols, g.row_block, layout.nnz]
    sizes += [layout.params.get("exponent_bytes", 0), layout.params.get("group_columns", 1)]
    addresses = [0 if section is None else section.data_ptr() for section in Sections(packed).all]
    row = [*sizes, *addresses, out.data_ptr()]
    assert len(row) == len(FIELDS)
    return row


def _kind_of(packed: PackedTensor) -> tuple[Any, ...]:
    """What tensors that are decoded in one launch have in common."""
    launch = Launch(packed.layout)
    types = tuple(str(kind) for kind in group_types(packed).values())
    return (*launch.constants.values(), *types)


def _check_job(packed: PackedTensor, out: Tensor) -> None:
    layout = packed.layout
    if layout.is_plain or launch_is_impossible(layout):
        raise KernelError(f"a {layout.codec} tensor of shape {list(layout.shape)} cannot be in a DecodeGroup")
    if out.shape != layout.shape or out.dtype != layout.dtype or not out.is_contiguous():
        raise KernelError(
            f"expected a contiguous {layout.dtype}{list(layout.shape)} to decode to, found "
            f"{out.dtype}{list(out.shape)} with strides {list(out.stride())}"
        )
    if any(tensor.data_ptr() % 16 for tensor in (out, *packed.sections.values())):
        raise KernelError("sections and output of a DecodeGroup must be aligned to 16 bytes")


def launch_is_impossible(layout: TensorLayout) -> bool:
    """Whether positions within a row block do not fit the kernels' 32-bit numbers."""
    g = layout.geometry
    return min(g.row_block, max(g.rows, 1)) * g.words_per_row * 64 > MAX_BLOCK_ELEMENTS
