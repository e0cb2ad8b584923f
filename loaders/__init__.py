"""How bytes reach memory: byte ranges of files, read ahead of use into page-aligned buffers that are lent.

    plan = LoadPlan(units=(Unit("layer.0", (ReadOp(path, offset_bytes, length_bytes),)), ...), depth=2)
    with PosixReader() as reader, Prefetcher(plan, reader) as prefetcher:
        with prefetcher.acquire(0) as lease:
            lease.tensor()          # the bytes of layer.0, while those of the next two are being read

This package knows byte ranges, never what they mean.
"""

from __future__ import annotations

from endor.loaders.accelerator import (
    Accelerator,
    BlockingAccelerator,
    Copied,
    CudaAccelerator,
    Event,
    accelerator_for,
)
from endor.loaders.choice import READER_NAMES, KvikioProbe, ReaderChoice, choose_reader, probe_kvikio
from endor.loaders.feed import DiskFeed, feed_bytes_of
from endor.loaders.flight import OnRead, Source
from endor.loaders.held import HeldUnits, MemoryReader
from endor.loaders.kvikio_reader import KvikioReader
from endor.loaders.mapped import MmapReader
from endor.loaders.memory import available_bytes
from endor.loaders.pagecache import cached_fraction, drop_from_page_cache
from endor.loaders.plan import PAGE_BYTES, LoadPlan, ReadOp, Unit
from endor.loaders.pool import Buffer, Pool
from endor.loaders.posix import PosixReader
from endor.loaders.prefetch import Lease, Prefetcher, PrefetchStats
from endor.loaders.reader import (
    Destination,
    DeviceMemory,
    DeviceReader,
    DirectMode,
    Reader,
    ReadReport,
    Ticket,
    device_reader,
    read_unit,
)
from endor.loaders.slots import SlotBuffer, SlotPool
from endor.loaders.staging import StagingBuffer, StagingPool

__all__ = [
    "PAGE_BYTES",
    "READER_NAMES",
    "Accelerator",
    "BlockingAccelerator",
    "Buffer",
    "Copied",
    "CudaAccelerator",
    "Destination",
    "DeviceMemory",
    "DeviceReader",
    "DirectMode",
    "DiskFeed",
    "Event",
    "HeldUnits",
    "KvikioProbe",
    "KvikioReader",
    "Lease",
    "LoadPlan",
    "MemoryReader",
    "MmapReader",
    "OnRead",
    "Pool",
    "PosixReader",
    "PrefetchStats",
    "Prefetcher",
    "ReadOp",
    "ReadReport",
    "Reader",
    "ReaderChoice",
    "SlotBuffer",
    "SlotPool",
    "Source",
    "StagingBuffer",
    "StagingPool",
    "Ticket",
    "Unit",
    "accelerator_for",
    "available_bytes",
    "cached_fraction",
    "choose_reader",
    "device_reader",
    "drop_from_page_cache",
    "feed_bytes_of",
    "probe_kvikio",
    "read_unit",
]
