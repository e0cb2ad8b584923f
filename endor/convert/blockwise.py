"""Runs a model block by block, so that the weights of one block are in memory at a time.

What a block receives beside the hidden states (masks, positions, rotary embeddings, an encoder's output) is
whatever the model's own forward passes: every block is replaced by one that notes its arguments and passes
its input on, and the model runs. Nothing here knows how an architecture makes its masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from endor.convert.activations import ActivationStore
from endor.convert.modeltree import ModelTree
from endor.errors import ConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockwiseModel"]


class _Stop(Exception):  # noqa: N818
    """Ends a forward whose rest is of no interest."""


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of a block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_name: bool
    """Whether the hidden states are the keyword argument `hidden_states`."""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        if self.by_name:
            return block(*self.args, **self.kwargs, hidden_states=hidden)
        return block(hidden, *self.args, **self.kwargs)


class BlockwiseModel:
    """A model that is run block by block over a fixed set of batches.

    Args:
        tree: which blocks there are.
        model: the model to run; buffers real, parameters on meta. It is changed.
        load: reads a tensor by its state-dict name.
        batches: token ids, int64 [sequences, length].
        device: where blocks run.
        dtype: what they compute in.
        new_store: makes the place for the hidden states of all batches, given their bytes.
    """

    def __init__(
        self,
        tree: ModelTree,
        model: PreTrainedModel,
        load: Callable[[str], torch.Tensor],
        *,
        batches: Sequence[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        new_store: Callable[[int], ActivationStore],
    ) -> None:
        self._model = model
        self._segments = dict(tree.segments)
        self._users = _users_of(tree)
        self._load = load
        self._batches = batches
        self._device, self._dtype = device, dtype
        self._new_store = new_store
        self._hidden: dict[str, ActivationStore] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._shape_of_output: dict[str, Any] = {}
        self._through: tuple[str, ...] = ()
        self._stores = ExitStack()
        self._model.config.use_cache = False
        for name, buffer in list(model.named_buffers()):
            if buffer.device.type != "meta":
                _put(model, name, buffer.to(device))

    def close(self) -> None:
        """Give the stored activations back."""
        self._stores.close()

    def module(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    @torch.no_grad()
    def begin(self, segment: str, first_block: Mapping[str, torch.Tensor]) -> None:
        """Run the model up to a block list, whose blocks come next in their order.

        Args:
            segment: name of the list; the lists before it are through.
            first_block: the tensors of its first block, which is run once to see what blocks return.
        """
        first = self._segments[segment][0]
        self._through = tuple(self._shape_of_output)
        with self._tensors_on_demand():
            hidden, call = self._first_call(segment)
            with self.installed(first_block):
                output = call.run(self.module(first), hidden.to(self._device))
            self._shape_of_output[segment] = _without_hidden(output, first)
            for number in range(len(self._batches)):
                self._capture(segment, number)

    @contextmanager
    def installed(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Have these tensors in the model, in its dtype and on its device."""
        for name, tensor in tensors.items():
            _put(self._model, name, self._placed(tensor))
        try:
            yield
        finally:
            for name in tensors:
                _put(self._model, name, torch.empty_like(tensors[name], device="meta"))

    @torch.no_grad()
    def run(self, block: str, *, advance: bool) -> None:
        """Run an installed block on all batches; with `advance` its outputs become the next block's
        inputs."""
        segment = block.rpartition(".")[0]
        hidden, module = self._hidden[segment], self.module(block)
        for number, call in enumerate(self._calls[block]):
            output = _hidden_of(call.run(module, hidden[number].to(self._device)), block)
            if advance:
                hidden[number] = output
        if advance:
            del self._calls[block]

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _first_call(self, segment: str) -> tuple[torch.Tensor, _Call]:
        seen: list[tuple[torch.Tensor, _Call]] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(_split(args, kwargs))
            raise _Stop

        with self._replaced({self._segments[segment][0]: stop}):
            self._forward(0)
        if not seen:
            raise ConvertError(
                f"{type(self._model).__name__} does not run {segment} on text, so its weights cannot be "
                f"calibrated; leave them out with --exclude '{segment}.*', or use --method magnitude"
            )
        return seen[0]

    def _capture(self, segment: str, number: int) -> None:
        """Run batch `number` and note what each block of the list is called with."""
        blocks = self._segments[segment]

        def catcher(block: str) -> Callable[..., Any]:
            def catch(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                if block == blocks[0]:
                    self._keep(segment, number, hidden)
                calls = self._calls.setdefault(block, [])
                calls.append(_shared(call, calls[0]) if calls else call)
                if block == blocks[-1]:
                    raise _Stop
                return _with_hidden(self._shape_of_output[segment], hidden)

            return catch

        with self._replaced({block: catcher(block) for block in blocks}):
            self._forward(number)

    def _keep(self, segment: str, number: int, hidden: torch.Tensor) -> None:
        if segment not in self._hidden:
            per_token = hidden[0, 0].numel() * hidden.element_size()
            store = self._new_store(per_token * sum(batch.numel() for batch in self._batches))
            self._hidden[segment] = self._stores.enter_context(store)
        self._hidden[segment][number] = hidden

    @contextmanager
    def _replaced(self, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Have these forwards instead of the blocks' own."""
        for block, forward in forwards.items():
            self.module(block).forward = forward
        try:
            yield
        finally:
            for block in forwards:
                del self.module(block).forward

    def _forward(self, number: int) -> None:
        """Run the model on a batch; block lists that are through give their final hidden states."""
        finals: dict[str, Callable[..., Any]] = {}
        for segment in self._through:
            hidden = self._hidden[segment][number].to(self._device)
            final = _with_hidden(self._shape_of_output[segment], hidden)
            finals |= {block: partial(_constant, final) for block in self._segments[segment]}
        inputs = {"input_ids": self._batches[number].to(self._device), "use_cache": False}
        if self._model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with self._replaced(finals), suppress(_Stop):
            self._model(**inputs)

    @contextmanager
    def _tensors_on_demand(self) -> Iterator[None]:
        """Load the tensors of modules outside the block lists when those are first called; drop them at
        the end."""
        loaded: dict[str, torch.Tensor] = {}
        placed: dict[str, torch.Tensor] = {}

        def provide(wanted: Sequence[tuple[str, str]], *_: Any) -> None:
            for name, stored in wanted:
                if name not in placed:
                    if stored not in loaded:
                        loaded[stored] = self._placed(self._load(stored))
                    placed[name] = loaded[stored]
                    _put(self._model, name, loaded[stored])

        handles = [
            self.module(path).register_forward_pre_hook(partial(provide, wanted))
            for path, wanted in self._users.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, tensor in placed.items():
                _put(self._model, name, torch.empty_like(tensor, device="meta"))


def _users_of(tree: ModelTree) -> dict[str, list[tuple[str, str]]]:
    """Modules outside the block lists -> (name in the module tree, name under which it is stored) of their
    tensors."""
    repeated = {name for block in tree.blocks if block.repeated for name in block.tensors}
    users: dict[str, list[tuple[str, str]]] = {}
    for name in tree.shapes:
        if name not in repeated:
            users.setdefault(name.rpartition(".")[0], []).append((name, tree.ties.get(name, name)))
    return users


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
    else:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, _Call]:
    """Separate the hidden states from the other arguments of a block."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], _Call(args[1:], kwargs, by_name=False)
    rest = dict(kwargs)
    hidden = rest.pop("hidden_states", None)
    if not isinstance(hidden, torch.Tensor):
        raise ConvertError("a block is called without hidden states; use --method magnitude for this model")
    return hidden, _Call(args, rest, by_name=True)


def _hidden_of(output: Any, block: str) -> torch.Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, torch.Tensor):
        raise ConvertError(
            f"{block} returns a {type(output).__name__}, so the model cannot be run block by block; use "
            "--method magnitude"
        )
    return hidden


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _without_hidden(output: Any, block: str) -> Any:
    """What a block returned, its hidden states left out: None, or a tuple of what follows them."""
    _hidden_of(output, block)
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else None


def _with_hidden(rest: Any, hidden: torch.Tensor) -> Any:
    return hidden if rest is None else (hidden, *rest)


def _shared(value: Any, reference: Any) -> Any:
    """`value` with every tensor replaced by the equal one in `reference`: batches mostly get the same
    masks."""
    if isinstance(value, torch.Tensor) and isinstance(reference, torch.Tensor):
        same = (
            value.shape == reference.shape
            and value.dtype == reference.dtype
            and torch.equal(value, reference)
        )
        return reference if same else value
    if isinstance(value, _Call) and isinstance(reference, _Call):
        args, kwargs = _shared(value.args, reference.args), _shared(value.kwargs, reference.kwargs)
        return _Call(args, kwargs, value.by_name)
    if isinstance(value, dict) and isinstance(reference, dict):
        return {key: _shared(v, reference.get(key)) for key, v in value.items()}
    if type(value) is tuple and type(reference) is tuple and len(value) == len(reference):
        return tuple(_shared(v, r) for v, r in zip(value, reference, strict=True))
    return value
