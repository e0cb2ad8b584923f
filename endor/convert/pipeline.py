"""The conversion: source tensors in the model's order, pruned, packed, checked and written shard by shard.

Reading, pruning, packing and checking of tensors run ahead on worker threads (numpy, torch and the kernels
release the interpreter lock) while this thread writes. A criterion that needs activations takes the blocks
one after another.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from endor import __version__
from endor.convert.calibrated import CalibratedBlocks, calibration_sequences
from endor.convert.memory import MemoryBudget, plan_memory
from endor.convert.modeltree import build_model_tree
from endor.convert.options import CalibrationOptions, ConvertOptions
from endor.convert.output import (
    bytes_of_ours,
    check_output,
    claim_output,
    copy_companions,
    finish_output,
    free_bytes,
)
from endor.convert.packing import pack, prune_linear_
from endor.convert.parallel import Job, run_in_order
from endor.convert.plan import BlockPlan, Packed, ShardPlan, TensorPlan, plan_conversion
from endor.convert.recipes import plan_recipes
from endor.convert.report import ConvertReport, Progress, ProgressCallback, summarize
from endor.convert.source import SourceCheckpoint, resolve_source
from endor.errors import ConvertError, FormatError
from endor.formats import FORMAT_VERSION, Header, read_header
from endor.formats.reader import QUANT_METHOD
from endor.formats.writer import CheckpointWriter, shard_name

__all__ = ["convert"]

DEFAULT_SHARD_BYTES = 4 << 30
_WORKERS = 2
_DISK_SLACK_BYTES = 64 << 20


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    values: str = "auto",
    calibration: str | os.PathLike[str] | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    device: str = "auto",
    memory: int | None = None,
    shard_size: int = DEFAULT_SHARD_BYTES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Convert the Hugging Face model in `source` to an Endor checkpoint in `out`.

    Args:
        source: a directory or a hub id; never changed.
        out: a directory; complete when it has a config.json.
        method: `wanda`, `magnitude`, or `none` to keep every weight.
        sparsity: share of the weights that go, 0.5 by default; fixed by an N:M pattern.
        pattern: `unstructured`, `2:4` or `4:8` along the input dimension.
        values: codec of what stays; `auto` takes the smallest lossless one. But for `raw`, Linear weights
            that are not pruned (a head that is not tied, what `exclude` names) are losslessly coded.
        calibration: text file (documents separated by blank lines) or .jsonl with `text`; default: the text
            that ships.
        samples: number of calibration sequences.
        sequence_length: tokens of each.
        seed: chooses the sequences.
        device: where the model runs on them.
        memory: bound on resident memory in bytes; default: largest tensor x 4 + 1 GiB.
        shard_size: bytes that a file does not exceed unless one block does.
        include: patterns of tensor names to prune instead of the Linear weights of the blocks.
        exclude: patterns of tensor names not to prune.
        resume: continue an interrupted conversion.
        overwrite: replace a checkpoint or an interrupted conversion in `out`.
        progress: called now and then from the calling thread.

    Raises:
        ConvertError: the source, the options or the machine do not allow it; the message says what to do.
    """
    started = time.perf_counter()
    if isinstance(include, str) or isinstance(exclude, str):
        raise ConvertError("include and exclude are lists of patterns; write include=[pattern]")
    options = ConvertOptions(
        method=method,
        sparsity=_default_sparsity(pattern) if sparsity is None else sparsity,
        pattern=pattern,
        values=values,
        calibration=CalibrationOptions(
            Path(calibration) if calibration is not None else None, samples, sequence_length, seed, device
        ),
        memory=memory,
        shard_bytes=shard_size,
        include=tuple(include),
        exclude=tuple(exclude),
    )
    directory, target = resolve_source(os.fspath(source)), Path(out).expanduser()
    state = check_output(target, directory, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(SourceCheckpoint(directory))
        conversion = _Conversion(checkpoint, target, options, progress or (lambda _: None), started)
        conversion.check_disk(replaces=overwrite)
        stack.enter_context(claim_output(target, state, conversion.fingerprint(), resume=resume))
        return conversion.run()


def _default_sparsity(pattern: str) -> float:
    n, _, m = pattern.partition(":")
    return 1 - int(n) / int(m) if n.isdecimal() and m.isdecimal() and int(m) else 0.5


class BlockSource(Protocol):
    """Where the tensors of a block come from, ready to be written."""

    needed_bytes: int
    """Memory it takes at least, beside the tensors under way."""
    disk_bytes: int
    """Room it may take in the output's directory for the time being."""

    def start(self, left: Sequence[ShardPlan], memory_bytes: int) -> None:
        """Say which shards are to be written, and what memory may be used beyond `needed_bytes`."""

    def jobs(self, block: BlockPlan) -> Iterator[Job[Packed]]:
        """Jobs that make, prune and pack the tensors of the next block, in order."""

    def skip(self, shard: ShardPlan, header: Header, path: Path) -> None:
        """Take note of a shard that an earlier run finished."""

    def close(self) -> None:
        """Give everything back."""


class _IndependentBlocks:
    """Tensors that are pruned without looking at any other."""

    needed_bytes = 0
    disk_bytes = 0

    def __init__(self, checkpoint: SourceCheckpoint, options: ConvertOptions) -> None:
        self._read = checkpoint.read
        self._options = options

    def start(self, left: Sequence[ShardPlan], memory_bytes: int) -> None:
        """Nothing is prepared."""

    def jobs(self, block: BlockPlan) -> Iterator[Job[Packed]]:
        for tensor in block.tensors:
            yield Job(partial(self._make, tensor), tensor.memory_bytes)

    def skip(self, shard: ShardPlan, header: Header, path: Path) -> None:
        """Nothing is carried from one tensor to the next."""

    def close(self) -> None:
        """Nothing is held."""

    def _make(self, tensor: TensorPlan) -> Packed:
        weight = tensor.recipe.make(self._read)
        criterion, rule = self._options.criterion, self._options.rule
        if tensor.linear is not None and criterion is not None:
            prune_linear_(weight, tensor.linear, criterion=criterion, pattern=rule, input_norms=None)
        return pack(tensor, weight, self._options.values)


class _Conversion:
    """One conversion under way: the plan and where it stands."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        out: Path,
        options: ConvertOptions,
        progress: ProgressCallback,
        started: float,
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._options = options
        self._progress = progress
        self._started = started
        self._progress(Progress("reading the model", 0, checkpoint.total_bytes))
        tree = build_model_tree(checkpoint.directory)
        self._plan = plan_conversion(tree, plan_recipes(tree, checkpoint.tensors, checkpoint.read), options)
        self._calibration_digest = ""
        self._blocks = self._block_source()
        self._memory = self._plan_memory()
        self._done_bytes = self._resumed_bytes = 0

    def fingerprint(self) -> dict[str, Any]:
        return {
            "endor": __version__,
            "source": self._checkpoint.fingerprint(),
            "options": self._options.identity(),
            "shards": len(self._plan.shards),
            "calibration": self._calibration_digest,
        }

    def _block_source(self) -> BlockSource:
        if not self._calibrates:
            return _IndependentBlocks(self._checkpoint, self._options)
        config = self._plan.tree.model.config
        sequences = calibration_sequences(self._checkpoint.directory, config, self._options)
        self._calibration_digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
        return CalibratedBlocks(
            self._checkpoint, self._plan, self._options, out=self._out, sequences=sequences
        )

    @property
    def _calibrates(self) -> bool:
        criterion = self._options.criterion
        return (
            criterion is not None
            and criterion.needs_activations
            and any(t.linear for t in self._plan.tensors)
        )

    def _plan_memory(self) -> MemoryBudget:
        largest = max((tensor.memory_bytes for tensor in self._plan.tensors), default=0)
        return plan_memory(
            self._options.memory,
            largest_tensor_bytes=self._plan.largest_tensor_bytes,
            needed_bytes=largest + self._blocks.needed_bytes + self._checkpoint.resident_bytes,
        )

    def check_disk(self, *, replaces: bool) -> None:
        """Compare what is to be written at most with what is free; what is replaced will be free.

        Raises ConvertError.
        """
        count = len(self._plan.shards)
        there = set() if replaces else {p.name for p in self._out.glob("model-*.safetensors")}
        left = [shard for shard in self._plan.shards if shard_name(shard.number, count) not in there]
        needed = sum(shard.stored_bytes for shard in left) + self._blocks.disk_bytes + _DISK_SLACK_BYTES
        free = free_bytes(self._out) + (bytes_of_ours(self._out) if replaces else 0)
        if free < needed:
            mib = 1 << 20
            raise ConvertError(
                f"{self._out}: the checkpoint needs up to {-(-needed // mib)} MiB, but only {free // mib} "
                "MiB are free there; free some space, or choose an OUT on another disk"
            )

    def run(self) -> ConvertReport:
        """Write what is not there yet. Raises ConvertError."""
        writer = CheckpointWriter(self._out, shards=len(self._plan.shards))
        there = [shard for shard in self._plan.shards if writer.shard_path(shard.number).exists()]
        finished = {shard.number: _finished_header(writer, shard) for shard in there}
        left = [shard for shard in self._plan.shards if shard.number not in finished]
        ahead = max(tensor.memory_bytes for tensor in self._plan.tensors)
        spare = self._memory.work_bytes - self._blocks.needed_bytes - ahead
        # Calibration has use for memory, to keep activations; tensors that wait to be written have little.
        self._blocks.start(left, spare)
        packed = run_in_order(
            self._jobs(writer, finished),
            workers=_WORKERS,
            memory_bytes=ahead if self._calibrates else ahead + spare,
        )
        try:
            for shard in left:
                self._write_shard(writer, shard, packed)
        finally:
            packed.close()
            self._blocks.close()
        return self._finish(writer)

    def _jobs(self, writer: CheckpointWriter, finished: Mapping[int, Header]) -> Iterator[Job[Packed]]:
        for shard in self._plan.shards:
            if shard.number in finished:
                self._blocks.skip(shard, finished[shard.number], writer.shard_path(shard.number))
                nbytes = sum(t.recipe.nbytes for b in shard.blocks for t in b.tensors)
                self._resumed_bytes += nbytes
                self._done_bytes += nbytes
            else:
                for block in shard.blocks:
                    yield from self._blocks.jobs(block)

    def _write_shard(self, writer: CheckpointWriter, shard: ShardPlan, packed: Iterator[Packed]) -> None:
        with writer.shard(shard.number, header_reserve_bytes=shard.header_bytes) as target:
            for block in shard.blocks:
                with target.block(block.name):
                    for expected in block.tensors:
                        self._report(f"converting {block.name}")
                        tensor, form = next(packed)
                        assert tensor is expected, "results come in the order of the plan"
                        target.add(tensor.name, form, aliases=tensor.aliases)
                        self._done_bytes += tensor.recipe.nbytes

    def _report(self, stage: str) -> None:
        self._progress(Progress(stage, self._done_bytes, self._plan.source_bytes, self._resumed_bytes))

    def _finish(self, writer: CheckpointWriter) -> ConvertReport:
        self._report("finishing")
        writer.finish()
        copy_companions(self._checkpoint.directory, self._out)
        report = summarize(
            self._out,
            [read_header(writer.shard_path(s.number))[0] for s in self._plan.shards],
            selected={tensor.name for tensor in self._plan.tensors if tensor.linear is not None},
            source_bytes=self._plan.source_bytes,
            seconds=time.perf_counter() - self._started,
        )
        finish_output(self._out, self._output_config())
        return report

    def _output_config(self) -> dict[str, Any]:
        options = self._options
        return {
            **self._checkpoint.config,
            "architectures": [type(self._plan.tree.model).__name__],
            "quantization_config": {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "method": options.method,
                "sparsity": options.sparsity if options.criterion is not None else 0.0,
                "pattern": options.pattern,
                "values": options.values,
            },
        }


def _finished_header(writer: CheckpointWriter, shard: ShardPlan) -> Header:
    """The header of a shard that an earlier run finished. Raises ConvertError if it is not what the plan
    says."""
    path = writer.shard_path(shard.number)
    try:
        header, _ = read_header(path)
    except FormatError as error:
        raise ConvertError(f"{error}. Delete the file and run again with --resume") from error
    found = [(b.name, [e.name for e in b.entries]) for b in header.blocks]
    if found != [(b.name, [t.name for t in b.tensors]) for b in shard.blocks]:
        raise ConvertError(
            f"{path} does not hold what this conversion puts there; start again with --overwrite"
        )
    return header
