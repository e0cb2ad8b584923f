"""Builds a transformers model without weights and puts tensors into it by name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from endor.errors import FormatError, LoadError
from endor.models import read_model_class

__all__ = ["build_skeleton", "check_complete", "find_module", "install"]


def build_skeleton(
    directory: Path, *, dtype: torch.dtype | None, stored: torch.dtype
) -> transformers.PreTrainedModel:
    """The model that config.json in `directory` describes, its parameters on meta, its buffers real.

    Args:
        directory: of the checkpoint.
        dtype: of the model; that of the config by default.
        stored: dtype for a config that names none.

    Raises:
        LoadError: transformers cannot read the config, or does not know the model.
    """
    model_class, config = read_model_class(directory, error=LoadError)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=dtype or config.dtype or stored)
    if (directory / "generation_config.json").exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule called `name`, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def install(model: nn.Module, name: str, tensor: torch.Tensor | nn.Parameter) -> None:
    """Make `tensor` the parameter or buffer called `name`. Raises FormatError if the model has none of that
    shape."""
    parent, _, leaf = name.rpartition(".")
    module = find_module(model, parent)
    current = None if module is None else module._parameters.get(leaf, module._buffers.get(leaf))
    if module is None or current is None:
        raise FormatError(f"the checkpoint has a tensor {name!r}, the model {type(model).__name__} does not")
    if current.shape != tensor.shape:
        raise FormatError(
            f"{name}: the model expects shape {list(current.shape)}, found {list(tensor.shape)}"
        )
    if leaf in module._parameters:
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = parameter
    else:
        module._buffers[leaf] = tensor.data


def check_complete(model: nn.Module, directory: Path, *, unread: Collection[str] = ()) -> None:
    """Raise FormatError if a parameter or buffer of the model is still without a value.

    Args:
        model: with everything in it that the checkpoint has.
        directory: of the checkpoint, for the message.
        unread: names whose values are left out on purpose.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    missing = [name for name, tensor in named if tensor.device.type == "meta" and name not in unread]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FormatError(
            f"{directory}: the checkpoint has no {', '.join(missing[:3])}{more}, which the model needs"
        )
