"""accelerate's functions for models larger than memory, faster and without its traps: change one import.

    from endor.integrations.accelerate import disk_offload, dispatch_model, load_checkpoint_and_dispatch

Names, arguments and visible effects are accelerate's. docs/migrating-from-accelerate.md says what differs;
docs/design/dispatch.md how it works. What accelerate does well is re-exported as it is.
"""

from __future__ import annotations

from accelerate.big_modeling import attach_layerwise_casting_hooks, init_empty_weights, init_on_device
from accelerate.utils import PrefixedDataset, extract_submodules_state_dict
from accelerate.utils.modeling import (
    align_module_device,
    check_device_map,
    compute_module_sizes,
    find_tied_parameters,
    get_balanced_memory,
    get_max_memory,
    has_offloaded_params,
    infer_auto_device_map,
    load_state_dict,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)
from accelerate.utils.offload import (
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)

from endor.integrations.accelerate.attach import (
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
)
from endor.integrations.accelerate.checkpoint import load_checkpoint_and_dispatch, load_checkpoint_in_model
from endor.integrations.accelerate.dispatch import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    offload_stats,
)
from endor.integrations.accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    LayerwiseCastingHook,
    ModelHook,
    SequentialHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from endor.integrations.accelerate.install import Installation, install
from endor.integrations.accelerate.weights import OffloadedWeightsLoader
from endor.runtime.offload import OffloadStats

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "Installation",
    "LayerwiseCastingHook",
    "ModelHook",
    "OffloadStats",
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "align_module_device",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "attach_layerwise_casting_hooks",
    "check_device_map",
    "compute_module_sizes",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "extract_submodules_state_dict",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_memory",
    "has_offloaded_params",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "install",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "load_offloaded_weight",
    "load_state_dict",
    "named_module_tensors",
    "offload_state_dict",
    "offload_stats",
    "offload_weight",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
    "retie_parameters",
    "save_offload_index",
    "set_module_tensor_to_device",
]
