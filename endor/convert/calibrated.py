"""Pruning with activations: each block is run on calibration text, pruned by what it saw, and run again.

The second run, with the pruned weights, makes the inputs of the next block, so that every block is pruned
for the inputs it will have in the pruned model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from endor.convert.activations import ActivationStore
from endor.convert.blockwise import BlockwiseModel
from endor.convert.memory import give_back_freed
from endor.convert.modeltree import runnable_copy
from endor.convert.options import ConvertOptions
from endor.convert.output import ACTIVATIONS_NAME
from endor.convert.packing import pack, prune_linear_
from endor.convert.parallel import Job
from endor.convert.plan import BlockPlan, ConversionPlan, Packed, ShardPlan, TensorPlan
from endor.convert.source import SourceCheckpoint
from endor.errors import ConvertError
from endor.formats import Header
from endor.formats.checksums import verify_block
from endor.kernels import decode
from endor.pruning.calibration import read_documents, sample_sequences
from endor.pruning.observe import InputNorms

__all__ = ["CalibratedBlocks", "calibration_sequences"]

_BATCH_TOKENS = 2048
"""Enough for matrix products to run at full speed; more only costs memory."""
_SCORES_BYTES = 96 << 20
"""What pruning a chunk of rows takes beside the weight."""


def calibration_sequences(directory: Path, config: Any, options: ConvertOptions) -> torch.Tensor:
    """Token ids, int64 [sequences, length]. Raises ConvertError without a tokenizer or text."""
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConvertError(
            f"{directory}: method {options.method} needs the model's tokenizer, which cannot be loaded "
            f"({reason}). Put its files there, or use --method magnitude"
        ) from error
    chosen = options.calibration
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or chosen.sequence_length
    ids = sample_sequences(
        read_documents(chosen.file),
        partial(tokenizer, verbose=False),
        samples=chosen.samples,
        sequence_length=min(chosen.sequence_length, limit),
        seed=chosen.seed,
    )
    vocabulary = config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise ConvertError(
            f"{directory}: the tokenizer makes token {int(ids.max())}, the model has a vocabulary of "
            f"{vocabulary}; they do not belong together"
        )
    return ids


class CalibratedBlocks:
    """The blocks of a conversion whose criterion needs activations, one after another.

    Args:
        checkpoint: the source.
        plan: of the conversion.
        options: of the conversion.
        out: directory of the output; activations that do not fit in memory go there for the time being.
        sequences: token ids, int64 [sequences, length].
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        plan: ConversionPlan,
        options: ConvertOptions,
        *,
        out: Path,
        sequences: torch.Tensor,
    ) -> None:
        self._checkpoint = checkpoint
        self._plans = {tensor.name: tensor for tensor in plan.tensors}
        self._blocks = {block.name: block for shard in plan.shards for block in shard.blocks}
        self._options = options
        self._out = out
        self._device = _device(options.calibration.device)
        self._dtype = _compute_dtype(plan, self._device)
        self._memory_bytes = 0
        self._last = ""
        self._begun: set[str] = set()
        self._unseen: list[str] = []
        batch = max(1, _BATCH_TOKENS // sequences.shape[1])
        self._batches = sequences.split(batch)
        hidden = getattr(plan.tree.model.config.get_text_config(), "hidden_size", 0)
        self.disk_bytes = sequences.numel() * hidden * self._dtype.itemsize
        self.needed_bytes = _needed_bytes(plan, self._dtype, tokens=self._batches[0].numel())
        self._model = BlockwiseModel(
            plan.tree,
            runnable_copy(plan.tree, dtype=self._dtype),
            lambda name: self._plans[name].recipe.make(checkpoint.read),
            batches=self._batches,
            device=self._device,
            dtype=self._dtype,
            new_store=self._new_store,
        )

    def start(self, left: Sequence[ShardPlan], memory_bytes: int) -> None:
        """Say which shards are still to be written and what may be used beyond `needed_bytes`."""
        blocks = [block.name for shard in left for block in shard.blocks if block.repeated]
        self._last = blocks[-1] if blocks else ""
        self._memory_bytes = memory_bytes

    def close(self) -> None:
        self._model.close()
        if self._unseen:
            names, self._unseen = self._unseen, []
            warnings.warn(
                f"{len(names)} tensors saw no activations and were pruned by magnitude: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}",
                stacklevel=2,
            )

    def jobs(self, block: BlockPlan) -> Iterator[Job[Packed]]:
        """Jobs that pack the tensors of the next block, pruned."""
        if not block.repeated or not self._last:
            for tensor in block.tensors:
                yield Job(partial(self._single, tensor), tensor.memory_bytes)
            return
        tensors = self._read(block)
        self._begin(block.name, tensors)
        self._prune(block, tensors)
        for tensor in block.tensors:
            yield Job(
                partial(pack, tensor, tensors.pop(tensor.name), self._options.values), tensor.memory_bytes
            )

    def skip(self, shard: ShardPlan, header: Header, path: Path) -> None:
        """Run the blocks of a finished shard with the pruned weights it holds, for the inputs of what
        follows."""
        for block in shard.blocks:
            if block.repeated and self._last and block.name != self._last:
                if block.name.rpartition(".")[0] not in self._begun:
                    self._begin(block.name, self._read(block))
                with self._model.installed(_read_back(block, header, path)):
                    self._advance(block.name)
                give_back_freed()

    def _read(self, block: BlockPlan) -> dict[str, torch.Tensor]:
        return {tensor.name: tensor.recipe.make(self._checkpoint.read) for tensor in block.tensors}

    def _begin(self, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
        segment = block.rpartition(".")[0]
        if segment not in self._begun:
            self._model.begin(segment, tensors)
            self._begun.add(segment)

    def _prune(self, block: BlockPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        selected = [tensor for tensor in block.tensors if tensor.linear is not None]
        modules = {
            t.name: self._model.module(t.linear.module) for t in selected if t.linear and not t.linear.fused
        }
        with self._model.installed(tensors), InputNorms(modules) as seen:
            self._model.run(block.name, advance=False)
        for tensor in selected:
            self._prune_one(tensor, tensors[tensor.name], seen.norms(tensor.name))
        with self._model.installed(tensors):
            self._advance(block.name)
        give_back_freed()

    def _advance(self, block: str) -> None:
        if block != self._last:
            self._model.run(block, advance=True)

    def _prune_one(self, tensor: TensorPlan, weight: torch.Tensor, norms: torch.Tensor | None) -> None:
        criterion, linear = self._options.criterion, tensor.linear
        assert criterion is not None, "calibration has a criterion"
        assert linear is not None, "only selected tensors are pruned"
        if norms is None:
            self._unseen.append(tensor.name)
        elif not bool(norms.isfinite().all()):
            raise ConvertError(
                f"{tensor.name}: its inputs overflow or are not numbers on the calibration text (computed in "
                f"{self._dtype}). Check the source weights for NaN, or use --method magnitude"
            )
        prune_linear_(weight, linear, criterion=criterion, pattern=self._options.rule, input_norms=norms)

    def _single(self, tensor: TensorPlan) -> Packed:
        weight = tensor.recipe.make(self._checkpoint.read)
        if tensor.linear is not None:
            self._prune_one(tensor, weight, None)
        return pack(tensor, weight, self._options.values)

    def _new_store(self, total_bytes: int) -> ActivationStore:
        directory = self._out / ACTIVATIONS_NAME
        store = ActivationStore(directory, memory_bytes=self._memory_bytes, total_bytes=total_bytes)
        if not store.on_disk:
            self._memory_bytes -= total_bytes
        return store


def _read_back(block: BlockPlan, header: Header, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a finished block, decoded. Raises ConvertError if the file is damaged."""
    home = next(b for b in header.blocks if b.name == block.name)
    with path.open("rb") as file:
        file.seek(header.payload_begin + home.begin)
        memory = torch.frombuffer(bytearray(file.read(home.nbytes)), dtype=torch.uint8)
    verify_block(home, memory.numpy().data, file=str(path))
    return {name: decode(packed) for name, packed in home.unpack(memory).items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConvertError(f"device {name!r} cannot be used ({reason}); use --device cpu") from error
    return device


def _compute_dtype(plan: ConversionPlan, device: torch.device) -> torch.dtype:
    """What most of the model is stored in; float32 where the CPU would be slow or overflow (float16)."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in plan.tensors:
        if tensor.recipe.dtype.is_floating_point:
            sizes[tensor.recipe.dtype] = sizes.get(tensor.recipe.dtype, 0) + tensor.recipe.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default=torch.float32)
    fast = (
        (torch.bfloat16, torch.float32)
        if device.type == "cpu"
        else (torch.bfloat16, torch.float16, torch.float32)
    )
    return dtype if dtype in fast else torch.float32


def _needed_bytes(plan: ConversionPlan, dtype: torch.dtype, *, tokens: int) -> int:
    """Weights of the largest block, as stored and as computed with, or of what runs before the blocks; and
    the activations inside a block."""
    held = [0]
    features = [0]
    outside = 0
    for block in (block for shard in plan.shards for block in shard.blocks):
        own = sum(
            tensor.recipe.nbytes + tensor.recipe.source_bytes * bool(tensor.recipe.merge)
            for tensor in block.tensors
        )
        cast = sum(
            torch.Size(t.recipe.shape).numel() * dtype.itemsize
            for t in block.tensors
            if t.recipe.dtype != dtype
        )
        if block.repeated:
            held.append(own + cast)
            features.append(sum(sum(t.recipe.shape[-2:]) for t in block.tensors if t.linear is not None))
        else:
            outside = max(outside, own + cast)
    return max(held) + outside + 2 * tokens * max(features) * dtype.itemsize + _SCORES_BYTES
