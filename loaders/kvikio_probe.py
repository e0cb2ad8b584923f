"""What kvikio can really do here: run as a process of its own, because it can hang, and because loading it
changes the process it is loaded into.

    python -P kvikio_probe.py FILE

reads the beginning of FILE into host memory, and into GPU memory where there is a GPU, and compares bytes.
Prints one line per step as it begins, so that a hang has a name, and last a JSON object. Imports nothing of
Endor: it is run by its path.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

PROBED_BYTES = (1 << 20) + 100  # ragged: whole pages one way, the rest another
NVIDIA_FS = Path("/proc/driver/nvidia-fs/stats")


def step(name: str) -> None:
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()


def probe(path: Path) -> dict[str, Any]:
    step("importing kvikio")
    import kvikio.defaults

    found: dict[str, Any] = {"version": kvikio.__version__, "host": False, "device": False, "gds": False}
    expected = _head(path)
    kvikio.defaults.set({"compat_mode": kvikio.CompatMode.ON, "auto_direct_io_read": True})
    step(f"opening {path}")
    with kvikio.CuFile(str(path), "r") as file:
        step("reading into host memory")
        memory = bytearray(len(expected))
        file.read(memory)
        found["host"] = bytes(memory) == expected
        step("looking for a GPU")
        device = _Device.first(len(expected))
        if device is None:
            return found
        step("reading into GPU memory")
        file.read(device)
        found["device"] = device.content() == expected
    found["gds"] = found["device"] and _reads_by_gds(kvikio, path, device, expected)
    return found


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(PROBED_BYTES)


def _reads_by_gds(kvikio: Any, path: Path, device: _Device, expected: bytes) -> bool:
    """Whether the kernel's own count of GPUDirect reads grows: cuFile would do the same reads without it."""
    before = _gds_reads()
    if before is None:
        return False
    step("reading by GPUDirect Storage")
    device.clear()
    with (
        kvikio.defaults.set({"compat_mode": kvikio.CompatMode.OFF, "gds_threshold": 0}),
        kvikio.CuFile(str(path), "r") as file,
    ):
        file.read(device)
    after = _gds_reads()
    return after is not None and after > before and device.content() == expected


def _gds_reads() -> int | None:
    """Reads that nvidia-fs has done since it was loaded; None where it is not loaded or does not say."""
    try:
        found = re.search(r"^Reads\s*:.*?\bn=(\d+)", NVIDIA_FS.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


class _Device:
    """Memory of the first GPU, through the driver alone: torch would take seconds to import."""

    def __init__(self, driver: ctypes.CDLL, address: int, length_bytes: int) -> None:
        self._driver = driver
        self._address = address
        self._length_bytes = length_bytes

    @classmethod
    def first(cls, length_bytes: int) -> _Device | None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            context, address, device = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
            failed = (
                driver.cuInit(0)
                or driver.cuDeviceGet(ctypes.byref(device), 0)
                or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
                or driver.cuCtxSetCurrent(context)
                or driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(length_bytes))
            )
        except (OSError, AttributeError):
            return None
        return None if failed else cls(driver, address.value, length_bytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self._address, False),
            "shape": (self._length_bytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }

    def clear(self) -> None:
        self._driver.cuMemsetD8_v2(
            ctypes.c_uint64(self._address), ctypes.c_ubyte(0), ctypes.c_size_t(self._length_bytes)
        )

    def content(self) -> bytes:
        copy = ctypes.create_string_buffer(self._length_bytes)
        if self._driver.cuMemcpyDtoH_v2(
            copy, ctypes.c_uint64(self._address), ctypes.c_size_t(self._length_bytes)
        ):
            return b""
        return copy.raw


if __name__ == "__main__":
    try:
        result = probe(Path(sys.argv[1]))
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as error:
        result = {"error": " ".join(str(error).split())}
    step(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # its libraries' own clean-up is not what is asked
