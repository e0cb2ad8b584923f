"""What Endor asks of transformers' models: which class a config.json names, and which modules multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from endor.errors import EndorError

__all__ = ["is_linear", "read_model_class"]


def is_linear(module: object) -> bool:
    """Whether the module multiplies its input with its `weight` and does nothing else with it: `nn.Linear`,
    and GPT-2's `Conv1D`, which has it the other way round."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def read_model_class(directory: Path, *, error: type[EndorError]) -> tuple[Any, Any]:
    """The model class that config.json in `directory` names, and the config as transformers reads it.

    Raises `error` if transformers cannot read the config or does not know the class.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    file = directory / "config.json"
    try:
        config: Any = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise error(
            f"{file}: transformers {transformers.__version__} cannot read this model's config ({reason}). A "
            "newer transformers may know it"
        ) from problem
    return _find_class(file, config, error), config


def _find_class(file: Path, config: Any, error: type[EndorError]) -> Any:
    import transformers

    architectures = config.architectures or []
    if architectures:
        cls: Any = getattr(transformers, str(architectures[0]), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
        raise error(
            f"{file}: unknown model class {architectures[0]!r}; transformers {transformers.__version__} has "
            "no such model. A newer transformers may have it; models with code of their own are not supported"
        )
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            cls = mapping[type(config)]
            return cls[0] if isinstance(cls, tuple) else cls
    raise error(f"{file}: names no architectures, and none is known for {type(config).__name__}")
