"""What the data path needs of a device with memory of its own: memory, a stream for copies, and events.

Two orders matter. *Copies* to the device go to a stream of their own, one after the other. *Work* goes to the
stream that is current in the thread that calls: the kernels of a model. An event is a point in one of them;
the other one, or a thread, can wait for it. Nothing here waits for the whole device but `settle`, which is
for closing and for what follows an interrupt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Protocol

import torch

from endor.errors import PlanError

__all__ = ["Accelerator", "BlockingAccelerator", "Copied", "CudaAccelerator", "Event", "accelerator_for"]

_PAGE_BYTES: Final = 4096
"""Slots begin on such a boundary of device memory: GPUDirect Storage asks for it."""
_PORTABLE: Final = 1
"""`cudaHostRegisterPortable`: pinned for every device of the process."""


class Event(Protocol):
    """A point in the order of copies or of work."""

    @property
    def is_done(self) -> bool:
        """Whether everything before it has happened; does not wait."""
        ...

    def wait(self) -> None:
        """Block the calling thread, without the interpreter's lock, until everything before it has
        happened."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Time of the device between two events that are done."""
        ...


@dataclass(frozen=True)
class Copied:
    """A copy on its way: when the device began it, and when its bytes are there."""

    began: Event
    ended: Event


class Accelerator(Protocol):
    """Drives one device. Safe to use from several threads."""

    @property
    def device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """For people."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of device memory, on a 4096-byte boundary. Raises PlanError where there is not so
        much."""
        ...

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Make host memory such that the device copies from it by itself; what is returned undoes that.

        Raises PlanError where the system does not allow it.
        """
        ...

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: Sequence[Event]) -> Copied:
        """Copy to each first tensor from the second, in the order of copies and not before `after`.

        Returns at once. Whoever calls keeps both sides alive and unchanged until `Copied.ended` is done.
        """
        ...

    def mark(self) -> Event:
        """An event behind the work that this thread has started so far."""
        ...

    def follow(self, event: Event) -> None:
        """What this thread starts from now on begins after `event`. Returns at once."""
        ...

    def settle(self) -> None:
        """Block until the device has nothing left to do."""
        ...

    def free_bytes(self) -> int:
        """Device memory that could still be taken."""
        ...

    def peak_bytes(self) -> int:
        """Most device memory that this process had at a time."""
        ...


def accelerator_for(device: torch.device) -> Accelerator | None:
    """What drives `device`; None for the CPU, which uses bytes where they are.

    Raises PlanError for a device that is not there, or that nothing here drives.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise PlanError(f"device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        built = "" if torch.version.cuda or torch.version.hip else f"; torch {torch.__version__} has no CUDA"
        raise PlanError(f"there is no CUDA device on this machine{built}; use device cpu")
    if (device.index or 0) >= count:
        raise PlanError(f"there is no device {device}: this machine has {count}, cuda:0 to cuda:{count - 1}")
    return CudaAccelerator(device)


# CUDA, and ROCm, which torch calls by the same names.


class _CudaEvent:
    __slots__ = ("event",)

    def __init__(self, stream: Any) -> None:
        # Blocking: a thread that waits for the link must not keep a core busy that reads or launches need.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    @property
    def is_done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Any) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaAccelerator:
    """A CUDA (or ROCm) device, through torch."""

    def __init__(self, device: torch.device) -> None:
        index: int | None = device.index  # torch's types say that it never is None
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._copies = torch.cuda.Stream(self.device)

    @property
    def name(self) -> str:
        return str(torch.cuda.get_device_name(self.device))

    def empty(self, nbytes: int) -> torch.Tensor:
        try:
            # Not an inference tensor, whatever the caller is in: a thread that is not writes to it.
            with torch.inference_mode(mode=False):
                memory = torch.empty(nbytes + _PAGE_BYTES, dtype=torch.uint8, device=self.device)
            # It may be memory that queued work of this thread still uses, in whose stream alone it is free.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        except torch.cuda.OutOfMemoryError as error:
            raise PlanError(
                f"{nbytes} bytes of memory of {self.device} are needed, {self.free_bytes()} are free: lower "
                "device_memory, context_length or depth"
            ) from error
        return memory.narrow(0, -memory.data_ptr() % _PAGE_BYTES, nbytes)

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        address, nbytes = memory.data_ptr(), memory.numel()
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            failed = int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))
        if failed:
            # The binding leaves CUDA's error where it is, and the next check of any kernel would report it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device)
            raise PlanError(
                f"{nbytes} bytes of host memory cannot be pinned (CUDA error {failed}): lower host_memory "
                "or raise the limit of locked memory (ulimit -l)"
            )

        def unpin() -> None:
            with torch.cuda.device(self.device):
                runtime.cudaHostUnregister(address)

        return unpin

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: Sequence[Event]) -> Copied:
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies), torch.no_grad():
            for event in after:
                self._copies.wait_event(_torch_event(event))
            began = _CudaEvent(self._copies)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return Copied(began, _CudaEvent(self._copies))

    def mark(self) -> Event:
        return _CudaEvent(torch.cuda.current_stream(self.device))

    def follow(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(_torch_event(event))

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free) + int(cached)

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))


def _torch_event(event: Event) -> Any:
    assert isinstance(event, _CudaEvent)
    return event.event


# Anything else that torch has memory on.


@dataclass(frozen=True)
class _Moment:
    at_s: float

    @property
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Any) -> float:
        return self.at_s - float(earlier.at_s)


class BlockingAccelerator:
    """A device that is only driven synchronously: a copy is over when the call returns.

    For devices of torch without a driver of their own here. Slow, and right.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        return str(self.device)

    def empty(self, nbytes: int) -> torch.Tensor:
        try:
            with torch.inference_mode(mode=False):
                memory = torch.empty(nbytes + _PAGE_BYTES, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise PlanError(f"{nbytes} bytes of memory of {self.device} are needed: {error}") from error
        return memory.narrow(0, -memory.data_ptr() % _PAGE_BYTES, nbytes)

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:  # noqa: ARG002 - nothing to do
        return lambda: None

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: Sequence[Event]) -> Copied:  # noqa: ARG002 - it is over
        began = _Moment(perf_counter())
        with torch.no_grad():
            for target, source in pairs:
                target.copy_(source)
        self.settle()
        return Copied(began, _Moment(perf_counter()))

    def mark(self) -> Event:
        self.settle()
        return _Moment(perf_counter())

    def follow(self, event: Event) -> None:
        event.wait()

    def settle(self) -> None:
        synchronize = getattr(_module_of(self.device), "synchronize", None)
        if synchronize is not None:
            synchronize()

    def free_bytes(self) -> int:
        """As far as the device says; otherwise as much as anybody could want."""
        info = getattr(_module_of(self.device), "mem_get_info", None)
        return int(info(self.device)[0]) if info is not None else 1 << 62

    def peak_bytes(self) -> int:
        peak = getattr(_module_of(self.device), "max_memory_allocated", None)
        return int(peak(self.device)) if peak is not None else 0


def _module_of(device: torch.device) -> Any:
    """`torch.cuda` for cuda, and so on; None for the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device)
