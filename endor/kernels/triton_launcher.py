"""Launching one compiled kernel again and again, without Triton looking at every argument each time.

What Triton does in Python for a launch (which arguments are aligned, which kernel is compiled for that) takes
longer than all the rest of a product does. A `Launcher` keeps the compiled kernel for as long as what it was
compiled for holds: everything but a few addresses stays as it is between its calls.
"""

from __future__ import annotations

from typing import Any, Final

import triton
from torch import Tensor

__all__ = ["Launcher"]

_KNOWN_VERSION: Final = (3, 9)
"""From here on compiled kernels are known to take the same arguments as the function they come from."""
_ALIGNMENT_BYTES: Final = 16  # what Triton asks of addresses


class Launcher:
    """One kernel with its compile-time arguments.

    Args:
        kernel: a function with `triton.jit` whose compile-time arguments are its last ones.
        options: all compile-time arguments, and the compiler's options.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self._kernel = kernel
        self._options = options
        self._constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self._compiled: Any = None

    def __call__(self, programs: int, arguments: tuple[Any, ...], *varying: Tensor | None) -> None:
        """Start so many programs on the current stream of the current device.

        Args:
            programs: size of the grid.
            arguments: all that are not compile-time; the same in every call, but for numbers that Triton does
                not specialise and for `varying`.
            varying: the tensors among the arguments that may lie elsewhere in the next call.
        """
        aligned = not any(t.data_ptr() % _ALIGNMENT_BYTES for t in varying if t is not None)
        if aligned and self._compiled is not None:
            self._compiled[programs, 1, 1](*arguments, *self._constants)
            return
        compiled = self._kernel[(programs,)](*arguments, **self._options)
        if aligned and _is_known():
            self._compiled = compiled


def _is_known() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _KNOWN_VERSION
