"""Whether an adapter fits the loaded model, by module names and shapes: before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from modules.errors import AdapterError, AdapterMismatch
from modules.worker.adapters import packing
from modules.worker.adapters.files import PREFIX, AdapterFiles

# Which side of a LoRA's tensor is the module's: (dimension of the tensor, what it must be).
_SIDES = {"lora_A": (1, "inputs"), "lora_B": (0, "outputs"), "lora_embedding_A": (1, "inputs"),
          "lora_embedding_B": (0, "outputs")}  # fmt: skip


def check(adapter: AdapterFiles, model: Any, model_name: str) -> None:
    """Raise AdapterMismatch where a module of the adapter is not in ``model`` or has another shape, and AdapterError
    where the adapter brings tensors that are no adapter's."""
    modules = dict(model.named_modules())
    named = {tensor: _module_name(adapter, tensor) for tensor in adapter.shapes}
    if foreign := [tensor for tensor, name in named.items() if name is None]:
        raise AdapterError(
            f"{adapter.name} brings {len(foreign)} tensors of the base model itself, which could not be taken back: "
            f"{foreign[0]}."
        )
    missing = sorted({name for name in named.values() if name is not None and name not in modules})
    if missing and get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) is None:
        raise AdapterMismatch(
            f"{adapter.name} changes {len(missing)} modules that {model_name} does not have: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else '.'}{_trained_on(adapter)}"
        )
    for tensor, name in named.items():
        if name in modules:
            _check_shape(adapter, tensor, str(name), modules[str(name)], model_name)
    _check_dora(adapter, (modules[name] for name in named.values() if name in modules))


def _trained_on(adapter: AdapterFiles) -> str:
    base = adapter.config.base_model_name_or_path
    return f" It was trained on {base}." if base else ""


def _module_name(adapter: AdapterFiles, tensor: str) -> str | None:
    """The module that a tensor of the file belongs to; None for one that is no part of an adapter."""
    name = tensor.removeprefix(PREFIX)
    module, found, _ = name.partition(f".{PEFT_TYPE_TO_PREFIX_MAPPING[adapter.config.peft_type]}")
    if found:
        return module
    if ".token_adapter." in name:
        return name.partition(".token_adapter.")[0]
    saved = getattr(adapter.config, "modules_to_save", None) or ()
    parent = name.rpartition(".")[0]
    inside = [part for part in _parents(parent) if part.rpartition(".")[2] in saved or part in saved]
    return parent if inside else None


def _parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check_shape(adapter: AdapterFiles, tensor: str, name: str, module: Any, model_name: str) -> None:
    part = re.search(r"\.(lora_[A-Za-z_]+?)(\.weight)?$", tensor)
    shape = adapter.shapes[tensor]
    sizes = _sizes(module)
    if part is None or part[1] not in _SIDES or sizes is None or len(shape) != 2:
        return  # attaching compares the rest
    dimension, side = _SIDES[part[1]]
    wanted = sizes[0] if side == "inputs" else sizes[1]
    if shape[dimension] != wanted:
        raise AdapterMismatch(
            f"{adapter.name} was made for another shape of {name}: {part[1]} is {_times(shape)}, and {name} of "
            f"{model_name} has {wanted:,} {side}.{_trained_on(adapter)}"
        )


def _sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that a LoRA can adapt; None where its shape follows other rules."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "num_embeddings"):
        return int(module.num_embeddings), int(module.embedding_dim)
    if hasattr(module, "nf"):  # transformers' Conv1D, weight K×N
        return int(module.weight.shape[0]), int(module.nf)
    return None


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(f"{length:,}" for length in shape)


def _check_dora(adapter: AdapterFiles, modules: Iterator[Any]) -> None:
    if getattr(adapter.config, "use_dora", False) and any(packing.repacks(module) for module in modules):
        raise AdapterError(
            f"{adapter.name} is a DoRA, which reads the base model's weights, and 4-bit weights on this CPU are packed "
            "in a way that nothing but bitsandbytes can read.",
            "Load the model in 8-bit or 16-bit for this LoRA.",
        )
