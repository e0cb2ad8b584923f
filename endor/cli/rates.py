"""Bandwidths for `endor plan`: given, measured, or guessed, and said to be so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from endor.cli.options import say
from endor.errors import EndorError, LoadError

if TYPE_CHECKING:
    from endor.loaders import Accelerator
    from endor.runtime.bandwidth import Bandwidth, Bandwidths
    from endor.runtime.planner import Rates
    from endor.runtime.survey import Parts

__all__ = ["Given", "Links", "find_links"]

_GUESSED_DISK: Final = 2e9
_GUESSED_LINK: Final = 20e9
_GUESSED_DEVICE: Final = 400e9


@dataclass(frozen=True)
class Given:
    """Bytes per second that somebody says; None where nobody does."""

    disk: int | None = None
    memory: int | None = None
    link: int | None = None


@dataclass(frozen=True)
class Links:
    """Rates, and in words where each is from: `disk`, `work` and, for a device, `copy`."""

    rates: Rates
    sources: dict[str, str]

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        rates = self.rates
        work = ", ".join(f"{rate / 1e9:.2f} GB/s {kind}" for kind, rate in sorted(rates.kinds.items()))
        rows = [
            ("disk", f"{rates.disk_bytes_per_s / 1e9:.2f} GB/s, {self.sources['disk']}"),
            (
                "decode and compute",
                f"{work or f'{rates.work_bytes_per_s / 1e9:.2f} GB/s'}, {self.sources['work']}",
            ),
        ]
        if "copy" in self.sources:
            rows.append(("to the device", f"{rates.copy_bytes_per_s / 1e9:.2f} GB/s, {self.sources['copy']}"))
        return rows


def find_links(
    model: Path,
    parts: Parts,
    given: Given,
    *,
    own_memory: bool,
    accelerator: Accelerator | None,
    quiet: bool,
) -> Links:
    """The rates to plan `model` with.

    Args:
        model: directory, on the disk in question.
        parts: of it, some of which are multiplied on a CPU.
        given: take precedence.
        own_memory: whether to plan for a device with its own memory.
        accelerator: that device, if it is here.
        quiet: say nothing.
    """
    from endor.runtime.planner import USUAL, USUAL_DEVICE, Rates

    links = _Measured(model, accelerator, quiet=quiet)
    disk, disk_source = _disk(links, given.disk)
    sources = {"disk": disk_source}
    if not own_memory:
        work, kinds, sources["work"] = _cpu_work(parts, given.memory, quiet=quiet)
        return Links(Rates(disk, work, kinds=kinds, overheads=USUAL), sources)
    copy, sources["copy"] = _link(links, given.link)
    work, sources["work"] = _device_work(links, given.memory)
    return Links(Rates(disk, work, copy_bytes_per_s=copy, overheads=USUAL_DEVICE), sources)


class _Measured:
    """What was measured before, or is now; nothing is if nobody asks."""

    def __init__(self, model: Path, accelerator: Accelerator | None, *, quiet: bool) -> None:
        self._model = model
        self._quiet = quiet
        self.accelerator = accelerator

    @cached_property
    def host(self) -> Bandwidths:
        """Disk and memory. Raises LoadError where they cannot be measured."""
        from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths

        found = cached_bandwidths(self._model)
        if found is None:
            say(f"measuring memory and the disk of {self._model}", quiet=self._quiet)
            found = machine_bandwidths(self._model)
        return found

    @cached_property
    def device(self) -> tuple[Bandwidth, Bandwidth]:
        """The link to the device that is here, and copying within it. Raises EndorError where they cannot be
        measured."""
        from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths, measure_device

        assert self.accelerator is not None
        found = cached_bandwidths(self._model, accelerator=self.accelerator)
        if found is None or found.link is None:
            say(f"measuring the link to {self.accelerator.name}", quiet=self._quiet)
            try:
                found = machine_bandwidths(self._model, accelerator=self.accelerator)
            except LoadError:  # of the disk, which does not matter here
                return measure_device(self.accelerator)
        assert found.link is not None
        assert found.device is not None
        return found.link, found.device


def _disk(links: _Measured, given: int | None) -> tuple[float, str]:
    if given is not None:
        return float(given), "given"
    try:
        found = links.host.disk
    except LoadError as error:
        return _GUESSED_DISK, f"guessed, as it cannot be measured ({error}); give --disk-bandwidth"
    return found.bytes_per_s, f"measured {found.measured}"


def _cpu_work(parts: Parts, given: int | None, *, quiet: bool) -> tuple[float, dict[str, float], str]:
    from endor.runtime.work import measure_work

    if given is not None:
        return float(given), {}, "given"
    say("measuring how fast weights of this model are multiplied", quiet=quiet)
    kinds = measure_work(parts, matmul="auto")
    return min(kinds.values(), default=_GUESSED_LINK), kinds, "measured now on weights of this model"


def _link(links: _Measured, given: int | None) -> tuple[float, str]:
    if given is not None:
        return float(given), "given"
    if links.accelerator is None:
        return _GUESSED_LINK, "guessed: PCI Express 4.0 with 16 lanes; give --link-bandwidth"
    try:
        found, _ = links.device
    except EndorError as error:
        return _GUESSED_LINK, f"guessed, as it cannot be measured ({error}); give --link-bandwidth"
    return found.bytes_per_s, f"measured {found.measured}"


def _device_work(links: _Measured, given: int | None) -> tuple[float, str]:
    """Compressed bytes are taken to be worked on as fast as a device copies: kernels are not measured."""
    if given is not None:
        return float(given), "given"
    common = "guessed: a common GPU; give --memory-bandwidth"
    if links.accelerator is None:
        return _GUESSED_DEVICE, common
    try:
        _, found = links.device
    except EndorError:
        return _GUESSED_DEVICE, common
    return found.bytes_per_s, f"guessed: as fast as the device copies, measured {found.measured}"
