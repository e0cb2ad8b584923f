"""Lets transformers load an Endor checkpoint: `AutoModelForCausalLM.from_pretrained(directory)`.

Weights of Linear modules stay packed: the sections that transformers maps from the files become one
BitmapTensor in an unchanged `nn.Linear`. Everything else is dense: it is loaded as from any checkpoint, or
decoded at load where it was packed. docs/design/transformers-quantizer.md has the reasons.

Importing this module registers it. `endor.integrations.autoload` does that when transformers is imported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from endor.errors import LoadError, PlanError

# Whoever imports transformers imports this module: the rest of Endor is imported where it is used.
if TYPE_CHECKING:
    from endor.formats.entries import TensorEntry
    from endor.kernels.tensor import BitmapTensor

__all__ = ["EndorConfig", "EndorQuantizer"]

_METHOD = "endor"
_PADDING_PATTERN = r"^endor\.padding\."

logger = logging.get_logger(__name__)


class EndorConfig(QuantizationConfigMixin):
    """The `quantization_config` of an Endor checkpoint.

    Args:
        dequantize: decode every weight at load; the model is then a dense one like any other.
        format_version: of the checkpoint.
        matmul: `auto` multiplies straight from the packed weights where that is faster, which may change the
            last bits of the logits; `decode` gives those of the dense pruned model, bit for bit.
        information: what else config.json says; kept as it is.
    """

    def __init__(
        self, *, dequantize: bool = False, format_version: int = 1, matmul: str = "auto", **information: Any
    ) -> None:
        vars(self).update(information)
        self.quant_method = _METHOD  # type: ignore[assignment]  # not one that transformers ships
        self.dequantize = dequantize
        self.format_version = format_version
        self.matmul = matmul

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(quantization_config=...)` changes in the checkpoint's own config."""
        return {"dequantize": self.dequantize, "matmul": self.matmul}


class EndorQuantizer(HfQuantizer):
    """What transformers asks while it loads an Endor checkpoint.

    Raises PlanError for a dense checkpoint (pruning and packing is not done while loading) and for an unknown
    `matmul`.
    """

    requires_calibration = True
    quantization_config: EndorConfig

    def __init__(self, quantization_config: EndorConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise PlanError(
                "EndorConfig was given for a dense checkpoint, which from_pretrained cannot prune and pack. "
                "Convert it first with `convert-model SOURCE OUT`, then load OUT"
            )
        super().__init__(quantization_config, **kwargs)
        _check_matmul(quantization_config.matmul)
        self._directory = Path()
        self._packed: dict[str, TensorEntry] = {}  # by the name the weight has in the model
        self._loaded: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - transformers' signature
        """Refuse a device map with "disk" in it. Raises PlanError."""
        _refuse_disk(kwargs.get("device_map"))

    def is_serializable(self) -> bool:
        """No; the reason is logged, where the error that transformers raises sends the reader."""
        logger.warning(
            "save_pretrained cannot write an Endor checkpoint. Copy the directory this model was loaded "
            "from, or load it with quantization_config=EndorConfig(dequantize=True) and save that dense model"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element in memory, by which `device_map="auto"` plans."""
        if param_name not in self._packed or not self._stays_packed(model, param_name):
            return param.element_size()
        return self._packed[param_name].layout.bits_per_weight / 8

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        from endor.integrations.preflight import preflight

        if not checkpoint_files:
            raise LoadError(
                "an Endor checkpoint is loaded by name, without a state_dict: from_pretrained(directory)"
            )
        self._directory = Path(checkpoint_files[0]).parent
        homes = preflight(model, self._directory)
        self._packed = {name: entry for name, entry in homes.items() if not entry.layout.is_plain}
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = list if ignored is None else type(ignored)  # transformers 5.0 has a list, later ones a set
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), _PADDING_PATTERN])

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:  # noqa: ARG002
        """Ours only: an Endor checkpoint has the names of the model's modules, not those of its source."""
        return self.get_weight_conversions()

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One converter, which collects for each packed weight whatever sections its entry has."""
        names = sorted({section.name for entry in self._packed.values() for section in entry.sections})
        if not names:
            return []
        patterns = [rf"^(.+)\.{re.escape(name)}$" for name in names]
        return [WeightConverter(patterns, r"\1", operations=[_Unpack(self, names)])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for a section, which is loaded as it is; `_Unpack` keeps the dtype its weight will have."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Unpack):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def unpack(
        self, name: str, sections: Mapping[str, torch.Tensor], model: nn.Module, dtype: torch.dtype | None
    ) -> torch.Tensor:
        """The weight `name` of the model, packed if it may stay so, else dense."""
        from endor.formats.packed import PackedTensor
        from endor.kernels.tensor import BitmapTensor

        packed = PackedTensor(self._packed[name].layout, sections)
        weight = BitmapTensor(packed.layout, packed, dtype=dtype or model.get_parameter(name).dtype)
        self._loaded.add(name)
        if not self._stays_packed(model, name):
            return weight.to_dense()
        return nn.Parameter(weight, requires_grad=False)

    def _stays_packed(self, model: nn.Module, name: str) -> bool:
        """Whether a Linear or Conv1D has the weight, as where endor.load streams one: any other module would
        decode all of it for each use."""
        from endor.models import is_linear

        parent, _, leaf = name.rpartition(".")
        linear = leaf == "weight" and is_linear(model.get_submodule(parent))
        return linear and not self.quantization_config.dequantize

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        from endor.kernels.scratch import ThreadScratch

        if left := sorted(self._packed.keys() - self._loaded):
            raise LoadError(
                f"{self._directory}: transformers loaded all but {len(left)} packed weights, the first is "
                f"{left[0]!r}; use endor.load, and report this with the version of transformers"
            )
        _refuse_disk(getattr(model, "hf_device_map", None))
        scratch = ThreadScratch()
        for _, weight in _packed_weights(model):
            weight.use_scratch(scratch)
            weight.use_matmul(self.quantization_config.matmul)
        self._packed.clear()  # neither a copy nor a pickle of the model needs them
        # save_pretrained would undo these. A dense model has nothing to undo, and a packed one is not saved.
        vars(model).pop("_weight_conversions", None)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Decode what is packed, to `dtype` if that is not the model's."""
        for name, weight in list(_packed_weights(model)):
            dense = weight.to_dense()
            if dtype not in (None, model.config.dtype):
                dense = dense.to(dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(dense, requires_grad=False))
        return model


class _Unpack(ConversionOps):
    """Makes one weight of its sections; transformers deep-copies it for each."""

    def __init__(self, quantizer: EndorQuantizer, section_names: list[str]) -> None:
        self._quantizer = quantizer
        self._section_names = section_names
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpack:
        return copy.copy(self)  # with the same quantizer, which is all headers

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],  # noqa: ARG002 - transformers' signature
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        names = dict(zip(source_patterns, self._section_names, strict=True))
        sections = {names[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        home = kwargs["full_layer_name"]
        return {home: [self._quantizer.unpack(home, sections, kwargs["model"], self.dtype)]}


def _check_matmul(matmul: object) -> None:
    from endor.kernels.linear import check_matmul

    check_matmul(matmul)


def _refuse_disk(device_map: Any) -> None:
    """Raise PlanError for a device map with "disk": accelerate would write the weights there, decoded."""
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise PlanError(
            "from_pretrained cannot stream packed weights (the device map has 'disk'). Use "
            "endor.load(directory, host_memory=...), which does, or allow more memory"
        )


def _packed_weights(model: nn.Module) -> Iterator[tuple[str, BitmapTensor]]:
    from endor.kernels.tensor import BitmapTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, BitmapTensor):
            yield name, parameter


def _register() -> None:
    """Make transformers know Endor checkpoints; nothing if it does."""
    if _METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(_METHOD)(EndorConfig)
    auto.register_quantizer(_METHOD)(EndorQuantizer)
    # from_pretrained heeds a config beside the checkpoint's own for these classes only. transformers 5.0 has
    # no such tuple: there the checkpoint's config is used, with a warning.
    if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
        types: tuple[type[QuantizationConfigMixin], ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, EndorConfig)  # type: ignore[assignment]


_register()
