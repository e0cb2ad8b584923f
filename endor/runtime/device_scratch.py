"""The decode scratch of a device with its own memory, where nobody waits to hear that a weight is damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.dispatch import decode, decode_rows
from endor.kernels.linear import has_triton
from endor.kernels.scratch import ThreadScratch
from endor.loaders import Accelerator, Event
from endor.runtime.scratch import most_decoded
from endor.runtime.stats import StatsRecorder

__all__ = ["DeviceScratch"]


class DeviceScratch(ThreadScratch):
    """Decodes whole weights into device memory that is reused, one buffer for all threads, which take turns.

    It is overwritten in the order of the work in one stream, so no kernel waits for a host; forwards in
    several streams wait for one another (`Runtime`), calls of single layers in several streams do not. What
    is wrong with the contents of a weight lands in a status on the device, one number per block. It is copied
    to the host behind each forward (`watch`) and looked at when it is there (`check`).

    Args:
        weights: layouts of all weights that will be decoded, with the dtype each is wanted in.
        stats: where decode time is counted.
        matmul: how they are multiplied: `auto` straight from the sections where that is faster, or `decode`.
        accelerator: of the device.
        blocks: names of what has weights, for messages.

    Raises PlanError where there is not so much memory.
    """

    def __init__(
        self,
        weights: Iterable[tuple[TensorLayout, torch.dtype]],
        stats: StatsRecorder,
        *,
        matmul: str,
        accelerator: Accelerator,
        blocks: Sequence[str],
    ) -> None:
        super().__init__()
        self.matmul = matmul
        self._stats = stats
        self._accelerator = accelerator
        self._buffers: Any = SimpleNamespace()  # in place of one for each thread
        self._checking = threading.RLock()
        self._names = [*dict.fromkeys(blocks), "a weight"]
        self._all: torch.Tensor | None = None
        self._each: list[torch.Tensor] = []
        self._seen = torch.empty(0, 2, dtype=torch.int64)
        self._seen_at: Event | None = None
        self._current = len(self._names) - 1
        for use, nbytes in most_decoded(weights, matmul="decode").items():
            if nbytes:
                self._reserve(use, nbytes)
        if has_triton(accelerator.device):
            with torch.inference_mode(mode=False):  # who loads may be in it, and who runs the model not
                self._start_status()

    @property
    def status(self) -> torch.Tensor | None:  # type: ignore[override]
        """That of the block that runs; None where no kernel here has one."""
        return self._each[self._current] if self._each else None

    @property
    def nbytes(self) -> int:
        return sum(memory.numel() for memory in vars(self._buffers).values())

    def enter(self, block: str) -> None:
        """What is decoded and multiplied from now on belongs to `block`."""
        self._current = self._numbers.get(block, len(self._names) - 1) if self._each else self._current

    def watch(self) -> None:
        """Have the status copied to the host when this thread's work so far is done. Returns at once."""
        if self._all is not None:
            self._seen.copy_(self._all, non_blocking=True)
            self._seen_at = self._accelerator.mark()

    def check(self, *, wait: bool) -> None:
        """Raise FormatError if a weight was found to be damaged.

        Args:
            wait: for the device to have done what this thread gave it; otherwise only what is known is looked
                at.
        """
        with self._checking:  # statistics may be asked for in another thread
            if wait:
                self.watch()
            if self._seen_at is None or self._all is None:
                return
            if wait:
                self._seen_at.wait()
            elif not self._seen_at.is_done:
                return
            self._seen_at = None
            self._raise(self._all)

    def _raise(self, status: torch.Tensor) -> None:
        from endor.kernels import triton_launch

        try:
            triton_launch.raise_for(self._seen[:, 0], self._names)
        except BaseException:
            status.copy_(self._nothing_wrong())
            raise

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the thread's next call."""
        layout = packed.layout
        with self._stats.decoding():
            out = self._shaped("stored", layout.shape, layout.dtype)
            if not self._launch(packed, out):
                decode(packed, out=out)
            return self._cast(out, dtype)

    def decode_rows(
        self, packed: PackedTensor, start_block: int, stop_block: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Some row blocks in `dtype`, valid until the thread's next call. Raises FormatError for damage."""
        with self._stats.decoding():
            rows = self._rows(packed, start_block, stop_block)
            return self._cast(decode_rows(packed, start_block, stop_block, rows), dtype)

    def close(self) -> None:
        """Give the memory back; the device has to be done with it."""
        vars(self._buffers).clear()
        self._all, self._seen_at = None, None
        self._each.clear()

    def _start_status(self) -> None:
        device = self._accelerator.device
        self._all = self._nothing_wrong()
        self._each = [entry[:1] for entry in self._all]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._seen = torch.empty(self._all.shape, dtype=torch.int64, pin_memory=device.type == "cuda")

    def _nothing_wrong(self) -> torch.Tensor:
        """int64 [blocks, 2], of which only the first column is used: every entry then lies on 16 bytes, for
        which kernels are compiled and remembered."""
        from endor.kernels import triton_launch

        count = 2 * len(self._names)
        return triton_launch.new_status(self._accelerator.device, count).view(-1, 2)

    def _launch(self, packed: PackedTensor, out: torch.Tensor) -> bool:
        """Start decoding by a kernel that reports to the status; False where there is none for this."""
        layout, status = packed.layout, self.status
        if status is None or layout.is_plain or not layout.geometry.numel:
            return False
        from endor.kernels import triton_launch

        if triton_launch.launch_is_impossible(layout):
            return False
        triton_launch.launch_decode(packed, 0, layout.geometry.row_blocks, out, status)
        return True

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return self._accelerator.empty(nbytes)
