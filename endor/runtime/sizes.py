"""What the planner is told: how large a model's parts are, and how much memory they may take. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from endor.errors import PlanError

__all__ = ["BlockSize", "Budgets", "ExpertSize", "ModelSizes", "Piece", "TableSize"]


@dataclass(frozen=True)
class Piece:
    """What is read and used as one: a block, a tile of a head, an expert.

    Attributes:
        nbytes: that are read, and that the work goes through.
        span_bytes: staging memory, in whole pages.
        stored_bytes: dense, of the largest part that is decoded at a time; 0 if nothing is.
        cast_bytes: the same in the dtype that is computed in, where that is another one.
        kinds: bytes by kind of weight (`bitmap/exponent`), since kinds are multiplied at different rates.
    """

    nbytes: int
    span_bytes: int
    stored_bytes: int = 0
    cast_bytes: int = 0
    kinds: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class BlockSize:
    """A block, and the tiles it is read in if it is a head that does not stay."""

    name: str
    whole: Piece
    tiles: tuple[Piece, ...] = ()

    @property
    def streamed(self) -> tuple[Piece, ...]:
        return self.tiles or (self.whole,)


@dataclass(frozen=True)
class TableSize:
    """An embedding: dense in memory, or read by rows.

    Attributes:
        nbytes: on disk.
        dense_bytes: in memory, in the dtype that is computed in.
        row_bytes: read for each token.
        tiles: if it is a head as well.
    """

    name: str
    nbytes: int
    dense_bytes: int
    row_bytes: int
    tiles: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class ExpertSize:
    """The experts of one layer, of which every token takes `routed`.

    Attributes:
        expert: the usual one; its `span_bytes` are those of the largest.
        spans: `span_bytes` of each; empty if all take the same.
    """

    count: int
    routed: int
    expert: Piece
    spans: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.routed <= self.count:
            raise PlanError(f"of {self.count} experts a token takes 1 to {self.count}, found {self.routed}")
        if self.spans and len(self.spans) != self.count:
            raise PlanError(f"of {self.count} experts each has a span, found {len(self.spans)} of them")

    def span_bytes(self, number: int) -> int:
        """Staging memory of one of them, in whole pages."""
        return self.spans[number] if self.spans else self.expert.span_bytes


@dataclass(frozen=True)
class ModelSizes:
    """What a checkpoint has.

    Attributes:
        blocks: in execution order.
        tables: in any order.
        experts: one for each layer that has them.
        dense_bytes: parameters that are dense and stay in any case.
        cache_bytes_per_token: keys and values that attention keeps of each token of the context; 0 if the
            config does not say.
        activation_bytes_per_token: an estimate of what a forward holds at a time of each token of a prompt.
        logits_bytes: of the logits of one position, in float32.
    """

    blocks: tuple[BlockSize, ...]
    tables: tuple[TableSize, ...] = ()
    experts: tuple[ExpertSize, ...] = ()
    dense_bytes: int = 0
    cache_bytes_per_token: int = 0
    activation_bytes_per_token: int = 0
    logits_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of everything that a budget can keep in memory."""
        blocks = sum(block.whole.nbytes for block in self.blocks)
        experts = sum(layer.count * layer.expert.span_bytes for layer in self.experts)
        return blocks + sum(table.nbytes for table in self.tables) + experts


@dataclass(frozen=True)
class Budgets:
    """Bytes of compressed weights that may stay, on top of everything else that memory is needed for.

    Attributes:
        host_bytes: in host memory.
        device_bytes: in a device's own memory; None on a CPU, which computes where blocks are.
    """

    host_bytes: int
    device_bytes: int | None = None
