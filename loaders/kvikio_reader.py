"""Reads files with kvikio: into GPU memory, by GPUDirect Storage where it works, and into host memory.

kvikio's own splitting is not used: every chunk is one task of kvikio's pool, and one thread of ours waits
for it. So an error has an offset, a read that failed has no siblings still writing, a cancelled one stops,
and the buffer is kept alive, which kvikio's futures do not do.

kvikio's settings belong to the process. What is changed when the first reader opens stays: its pool gets as
many threads as ours has (its default is one), files opened for direct reads are read directly, and with
GPUDirect Storage short reads take it too.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from endor.errors import LoadError, PlanError
from endor.loaders.chunks import ChunkedReader
from endor.loaders.files import FileIdentity, SourceFile, whole_pages
from endor.loaders.plan import ReadOp
from endor.loaders.reader import Destination, DeviceMemory, DirectMode, Moved

__all__ = ["KvikioReader"]

DEFAULT_THREADS: Final = 2
DEFAULT_CHUNK_BYTES: Final = 16 << 20

_settings_lock = threading.Lock()
_ERRNO_OF: Final = {os.strerror(number): number for number in errno.errorcode}


class _KvikioFile(SourceFile):
    """One file, opened by kvikio once per path: through the page cache, directly, and by GPUDirect Storage.

    Which path a read takes is fixed when kvikio opens the file, so each has its own handle.
    """

    def __init__(self, path: Path, *, direct: DirectMode, gds: bool) -> None:
        self._policy: DirectMode = direct
        self._wants_gds = gds
        self._handles: dict[str, Any] = {}
        super().__init__(path)

    def _open(self) -> None:
        self._handles["buffered"] = self._open_handle("ON", direct=False)
        if self._policy:
            direct = self._open_handle("ON", direct=True)
            self._handles["direct"] = direct
            if direct.is_direct_io_supported():
                self.advise(random=True)
            else:
                self._policy = False
        if self._wants_gds:
            self._handles["gds"] = self._open_handle("OFF", direct=True)

    def _open_handle(self, compat_mode: str, *, direct: bool) -> Any:
        import kvikio.defaults

        settings = {
            "compat_mode": kvikio.CompatMode[compat_mode],
            "auto_direct_io_read": direct,
            "auto_direct_io_write": False,  # it, too, would have the file opened for direct reads
        }
        with _settings_lock:
            try:
                with kvikio.defaults.set(settings):
                    handle = kvikio.CuFile(self.path, "r")
            except RuntimeError as error:
                raise self._load_error("cannot be opened by kvikio", error) from error
        if FileIdentity.of(os.fstat(handle.fileno())) != self.identity:
            handle.close()
            raise OSError(errno.ESTALE, "it was replaced at this moment")
        return handle

    def wants_direct(self, op: ReadOp, address: int) -> bool:
        return self.suits_direct(op, address, self._policy)

    def read(self, destination: Destination, offset_bytes: int, *, direct: bool) -> Moved:
        if not isinstance(destination, memoryview) and self._wants_gds:
            return self._read_by_gds(destination, offset_bytes)
        length = len(destination) if isinstance(destination, memoryview) else _length_of(destination)
        if direct and self._policy:
            try:
                self._read("direct", destination, offset_bytes, length)
            except LoadError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._policy = False  # it opens files for direct reads and then does not do them
                self.advise(random=False)
            else:
                start, end = whole_pages(offset_bytes, length)
                return Moved(bytes_direct=end - start, bytes_buffered=length - (end - start))
        self._read("buffered", destination, offset_bytes, length)
        return Moved(bytes_buffered=length)

    def _read_by_gds(self, destination: Destination, offset_bytes: int) -> Moved:
        """Whole pages by GPUDirect; cuFile would read the rest of an unaligned range some other way."""
        assert not isinstance(destination, memoryview)
        length = _length_of(destination)
        start, end = whole_pages(offset_bytes, length)
        if end > start:
            self._read("gds", destination[start:end], offset_bytes + start, end - start)
        for first, last in ((0, start), (end, length)):
            if last > first:
                self._read("buffered", destination[first:last], offset_bytes + first, last - first)
        return Moved(bytes_gds=end - start, bytes_buffered=length - (end - start))

    def _read(self, handle: str, destination: Destination, offset_bytes: int, length_bytes: int) -> None:
        try:
            # One task: with `task_size` of the whole, kvikio does not split.
            future = self._handles[handle].pread(
                destination, length_bytes, file_offset=offset_bytes, task_size=length_bytes
            )
            got = future.get()
        except RuntimeError as error:
            if "EOF" in str(error):
                size = os.fstat(self.descriptor).st_size
                raise self.ends_early(size, offset_bytes + length_bytes) from error
            what = f"reading {length_bytes} bytes at offset {offset_bytes} failed"
            raise self._load_error(what, error) from error
        if got != length_bytes:
            raise self.error(f"kvikio read {got} bytes at offset {offset_bytes}, expected {length_bytes}")

    def _load_error(self, what: str, error: RuntimeError) -> LoadError:
        """kvikio's errors are text only; the system's number is found by its words."""
        reason = re.sub(r"^KvikIO failure at: \S+: ", "", " ".join(str(error).split()))
        number = next((number for text, number in _ERRNO_OF.items() if reason.endswith(text)), None)
        return LoadError(f"{self.path}: {what}: {reason}", errno=number)

    def close(self) -> None:
        super().close()
        while self._handles:
            self._handles.popitem()[1].close()


def _length_of(destination: Destination) -> int:
    assert not isinstance(destination, memoryview)
    return int(destination.__cuda_array_interface__["shape"][0])


class KvikioReader(ChunkedReader):
    """A `Reader` of local files into host or GPU memory.

    Ask `endor.loaders.probe_kvikio` first: without a CUDA driver every read fails, and with a broken one a
    read can hang. `gds=True` reads into GPU memory by GPUDirect Storage, for which the probe must have found
    that it works; otherwise such bytes take the way over a host buffer of kvikio's ("compatibility mode").
    """

    name = "kvikio"
    takes_device_memory = True

    def __init__(
        self,
        *,
        direct: DirectMode = "auto",
        gds: bool = False,
        threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        try:
            _prepare_kvikio(threads, gds=gds)
        except ImportError as error:
            raise PlanError(
                f"reader kvikio needs the package kvikio ({error}): pip install 'endor-offload[kvikio]'"
            ) from error
        self.device_path = "GDS" if gds else "compatibility mode"
        self.serves_device = gds
        super().__init__(
            partial(_KvikioFile, direct=direct, gds=gds), threads=threads, chunk_bytes=chunk_bytes
        )

    def register(self, memory: DeviceMemory) -> Callable[[], None]:
        """Register device memory with cuFile, once for all reads into it; what is returned undoes that.

        Where cuFile refuses (two arenas in one allocation, or memory that is mapped piece by piece) there is
        a warning, and reads go through buffers of its own on the device.
        """
        import kvikio

        try:
            kvikio.memory_register(memory)
        except RuntimeError as error:
            warnings.warn(
                f"cuFile cannot register {_length_of(memory)} bytes of device memory ({error}): "
                "GPUDirect reads are copied once more on the device",
                RuntimeWarning,
                stacklevel=2,
            )
            return lambda: None
        return lambda: kvikio.memory_deregister(memory)


def _prepare_kvikio(threads: int, *, gds: bool) -> None:
    import kvikio.defaults

    with _settings_lock:
        kvikio.defaults.set("auto_direct_io_read", True)
        if gds:  # by default short reads go over a host buffer
            kvikio.defaults.set("gds_threshold", 0)
        if kvikio.defaults.get("num_threads") < threads:
            kvikio.defaults.set("num_threads", threads)
