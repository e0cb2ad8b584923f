"""Compile the Triton kernels ahead of time, without a GPU, and show the registers and spills of each.

    python scripts/triton_resources.py [--targets sm_80 sm_90 sm_120 gfx942] [--kernels ...] [--json FILE]

Registers are per thread and decide how many programs a multiprocessor holds at once; a spill is a register
that did not fit and lives in memory. `instructions` is the length of the compiled program, loops counted
once; `per weight` is the length of its loop over tiles, divided by the 32 weights that a thread has in a tile
(for NVIDIA; what few tiles enter, for exponents that no level names, is in it). What is compiled is what
`endor.kernels` launches for the weights of a language model: 16-byte aligned sections, columns a multiple of
64, offsets of 32 bits.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Triton reads this when it is imported; the interpreter compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench_common import print_table, write_json
from endor.kernels.triton_kernels import elements as te
from endor.kernels.triton_kernels.decode import decode_group_kernel, decode_kernel
from endor.kernels.triton_kernels.matmul import matmul_kernel
from endor.kernels.triton_launch import OPTIONS

COLUMNS = 32
"""Weights of a tile that a thread has."""
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for: codec, mask, dtype and levels."""

    codec: str
    dtype: str = "bf16"
    masked: bool = True
    pairs: int = 0
    singles: int = 0

    @property
    def constants(self) -> dict[str, Any]:
        codecs = {"raw": te.RAW, "exponent": te.EXPONENT, "int8": te.INT8, "int4": te.INT4}
        kinds = {"bf16": te.BFLOAT16, "f16": te.FLOAT16, "f32": te.FLOAT32, "f8": te.BITS}
        return {
            "WHOLE": True,
            "MASKED": self.masked,
            "CODEC": codecs[self.codec].value,
            "PAIRS": self.pairs,
            "SINGLES": self.singles,
            "KIND": kinds[self.dtype].value,
        }

    @property
    def element(self) -> str:
        return {"bf16": "i16", "f16": "i16", "f32": "i32", "f8": "u8"}[self.dtype]

    @property
    def sections(self) -> dict[str, str | None]:
        """Type of each section's pointer; None for sections that the codec does not have."""
        exponent = self.codec == "exponent"
        values = {"raw": f"*{self.element}", "exponent": "*u8", "int8": "*i8", "int4": "*u8"}
        scaled = self.codec in {"int8", "int4"}
        return {
            "bitmap": "*u8" if self.masked else None,
            "row_offsets": "*i32" if self.masked else None,
            "values": values[self.codec],
            "exponent_offsets": "*i32" if exponent else None,
            "exponents": "*u8" if exponent else None,
            "extra": "*i16" if scaled else "*u8" if exponent and self.dtype == "f16" else None,
            "codebook": "*i8" if self.codec == "int4" else None,
        }

    def __str__(self) -> str:
        levels = f" {self.pairs}+{self.singles}" if self.codec == "exponent" else ""
        return f"{self.codec} {self.dtype}{levels}{'' if self.masked else ', mask dense'}"


RAW, PRUNED, UNPRUNED = (
    Kind("raw"),
    Kind("exponent", singles=3),
    Kind("exponent", masked=False, pairs=2, singles=1),
)
KINDS = (
    RAW,
    Kind("raw", "f8"),
    Kind("raw", "f32"),
    PRUNED,
    Kind("exponent", "f16", singles=3),
    UNPRUNED,
    Kind("int8"),
    Kind("int4"),
    Kind("int4", "f16", masked=False),
)


@dataclass(frozen=True)
class Program:
    """One kernel with everything that it is compiled for; T, if it is not named, is one lane per thread."""

    name: str
    kernel: Any
    arguments: dict[str, str | None]
    constants: dict[str, Any]
    warps: int

    def compile(self, target: GPUTarget) -> Any:
        types = {name: kind or "constexpr" for name, kind in self.arguments.items()}
        absent = {name: None for name, kind in self.arguments.items() if kind is None}
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, (name, kind) in enumerate(self.arguments.items())
            if (kind or "").startswith("*") or name in {"cols", "group_columns"}
        }
        constants = {"T": self.warps * target.warp_size} | self.constants
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, signature, absent | constants, aligned)
        return triton.compile(source, target=target, options={"num_warps": self.warps, **OPTIONS})


def programs() -> Iterator[Program]:
    """Every kernel, for every kind of weight that it is used for."""
    numbers = dict.fromkeys(("rows", "cols", "row_block", "nnz", "exponent_bytes", "group_columns"), "i32")
    for kind in KINDS:
        outputs = {"out": f"*{kind.element}", "status": "*i64"}
        arguments = {**kind.sections, **outputs, **numbers, "start_block": "i32"}
        yield Program(f"decode {kind}", decode_kernel, arguments, kind.constants, 1)
    for kind in (RAW, PRUNED):
        table: dict[str, str | None] = {"table": "*i64", "status": "*i64", "entries": "i32"}
        types = {
            "ALIGNED": True,
            "ENTRIES": 8,
            "ELEMENT": tl.int16,
            "OFFSET": tl.int32,
            "RECORD_OFFSET": tl.int32,
        }
        constants = {**types, **kind.constants}
        yield Program(f"decode group {kind}", decode_group_kernel, table, constants, 1)
    for rows, blocks, words, warps in ((1, 1, 32, 1), (16, 16, 8, 4)):
        for kind in (RAW, PRUNED, UNPRUNED, Kind("int8"), Kind("int4", "f16")):
            tensors = {"bias": "*i16", "y": "*i16", "status": "*i64", "x_rows": "i32"}
            arguments = {"x": "*i16", **kind.sections, **tensors, **numbers}
            tile = {"M": rows, "B": blocks, "T": words, "EXACT_DOT": False}
            name = f"matmul {rows} row{'s' * (rows > 1)} {kind}"
            yield Program(name, matmul_kernel, arguments, {**kind.constants, **tile}, warps)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    per_weight: float


def measure(program: Program, target: str) -> Resources:
    compiled = program.compile(TARGETS[target])
    if target.startswith("sm_"):
        nested = program.kernel is matmul_kernel  # in the loop over rows
        registers, spilled, instructions, per_weight = _of_cubin(compiled.asm["cubin"], nested=nested)
    else:
        registers, spilled, instructions = _of_amdgcn(compiled.asm["amdgcn"])
        per_weight = 0.0
    shared = compiled.metadata.shared
    return Resources(program.name, target, registers, spilled, shared, instructions, per_weight)


def _of_cubin(cubin: bytes, *, nested: bool) -> tuple[int, int, int, float]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tool), "-res-usage", file.name)
        listing = _output(str(tool), "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?!NOP)(\S.*)"
    lines = [(int(at, 16), text) for at, text in re.findall(pattern, listing, re.MULTILINE)]
    return int(found[1]), int(found[2]) + int(found[3]), len(lines), _loop(lines, nested=nested) / COLUMNS


def _loop(lines: list[tuple[int, str]], *, nested: bool) -> int:
    """Instructions of the largest loop, or of the largest one inside it."""
    jumps = [(at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    outer = max(loops, key=lambda loop: loop[1] - loop[0])
    inside = [loop for loop in loops if loop != outer and outer[0] <= loop[0] and loop[1] <= outer[1]]
    start, stop = max(inside, key=lambda loop: loop[1] - loop[0]) if nested else outer
    return sum(start <= at <= stop for at, _ in lines)


def _of_amdgcn(assembly: str) -> tuple[int, int, int]:
    numbers = {name: int(value) for name, value in re.findall(r"\.(vgpr_\w+|private_\w+):\s+(\d+)", assembly)}
    lines = re.findall(r"^\t[vsgbd]\w+_", assembly, re.MULTILINE)
    spilled = numbers.get("private_segment_fixed_size", 0)
    return numbers["vgpr_count"], spilled, len(lines)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", metavar="WORD", help="only kernels whose names begin so")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    chosen = [p for p in programs() if not args.kernels or p.name.startswith(tuple(args.kernels))]
    if not chosen:
        parser.error(f"no kernel's name begins so; there are {', '.join(p.name for p in programs())}")
    results = [measure(program, target) for program in chosen for target in args.targets]
    print(f"triton {triton.__version__}")
    print_table(
        ["kernel", "target", "registers", "spilled bytes", "shared bytes", "instructions", "per weight"],
        [(r.kernel, r.target, *(f"{n:.4g}" for n in list(vars(r).values())[2:])) for r in results],
    )
    if args.json:
        write_json(args.json, {"triton": triton.__version__, "kernels": [vars(r) for r in results]})


if __name__ == "__main__":
    main()
