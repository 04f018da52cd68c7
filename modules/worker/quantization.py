"""The quantization options as a quantization config, and the check that the model there is quantized as asked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AwqConfig, BitsAndBytesConfig, GgufConfig, GPTQConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import AwqBackend, AwqFormat

from modules import packages
from modules.checkpoint import refuse_quantization
from modules.errors import MissingPackage, OptionConflict, UnsupportedModel, WrongResult
from modules.options import LoadOptions
from modules.precision import UNPACKED
from modules.protocol import LoadOrder
from modules.worker.placement import DeviceFacts

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def on_the_fly(options: LoadOptions) -> bool:
    """Whether plain weights are quantized while loading."""
    return options.load_in_4bit or options.load_in_8bit


def compute_dtype(options: LoadOptions, device: DeviceFacts) -> torch.dtype:
    """The type in which 4-bit layers compute; ``auto``: bfloat16 where the device has it, else float16 on a GPU and
    float32 on a processor."""
    if options.compute_dtype != "auto":
        return DTYPES[options.compute_dtype]
    if device.gpus == 0:
        return torch.bfloat16 if device.cpu_bf16 else torch.float32
    return torch.bfloat16 if device.bf16 else torch.float16


def quantization_config(order: LoadOrder, stored: Mapping[str, Any], device: DeviceFacts, offloads: bool) -> Any | None:
    """What goes to from_pretrained as ``quantization_config``; None where nothing is asked for.

    ``stored`` is the checkpoint's own quantization config, empty for plain weights. ``offloads``: layers may go
    to RAM or disk beside a GPU, where bitsandbytes leaves them unquantized.
    """
    options = order.options
    if order.file_format == "gguf":
        # Blocks stay packed only with kernels fetched from a hub for the very device; unpacking works everywhere.
        return GgufConfig(dequantize=True)
    if on_the_fly(options):
        if stored:
            raise OptionConflict(
                f"{order.name} is already quantized ({order.quantization}), so it cannot be quantized while loading.",
                "Turn load-in-4bit and load-in-8bit off.",
                fix={"load_in_4bit": False, "load_in_8bit": False},
            )
        return _bitsandbytes(options, device, offloads)
    if order.quantization in ("gptq", "awq"):
        return _kernels(order, stored, device)
    if order.quantization in UNPACKED:
        return AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    return None


def _kernels(order: LoadOrder, stored: Mapping[str, Any], device: DeviceFacts) -> Any | None:
    """Which kernels GPTQ and AWQ layers compute with; None: those that gptqmodel takes by itself.

    On a GPU it takes some that have to be compiled first, and finds out too late that they cannot (7.6).
    """
    compiled = device.gpus == 0 or _compiles_for_gpus()
    if order.quantization == "gptq" and (order.options.disable_exllama or not compiled):
        return GPTQConfig(bits=stored["bits"], backend="auto_trainable")
    layout = str(stored.get("version") or stored.get("format") or AwqFormat.GEMM.value).lower()
    if order.quantization == "awq" and not compiled and layout == AwqFormat.GEMM and find_spec("triton"):
        return AwqConfig(backend=AwqBackend.GEMM_TRITON)
    return None


def _compiles_for_gpus() -> bool:
    """Whether CUDA's compiler is where torch looks for it."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc.exe" if sys.platform == "win32" else "nvcc").exists()


def _bitsandbytes(options: LoadOptions, device: DeviceFacts, offloads: bool) -> Any:
    # 8-bit layers say at every call that they compute in float16, a line a layer and token (bitsandbytes 0.50).
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # With this switch on a machine without a GPU, bitsandbytes would quantize nothing, silently.
    beside_gpu = {"llm_int8_enable_fp32_cpu_offload": True} if offloads else {}
    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, **beside_gpu)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_compute_dtype=compute_dtype(options, device),
        bnb_4bit_use_double_quant=options.use_double_quant,
        **beside_gpu,
    )


def stored_config(config: Any) -> dict[str, Any]:
    """The checkpoint's own quantization config as plain data; empty for plain weights."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    return dict(stored) if isinstance(stored, Mapping) else dict(stored.to_dict())


def check_available(order: LoadOrder, stored: Mapping[str, Any]) -> None:
    """Raise MissingPackage or UnsupportedModel where the checkpoint's quantization cannot be read here.

    transformers ignores a method it does not know with a warning, and would load noise.
    """
    if not stored:
        return
    refuse_quantization(order.name, order.quantization)
    require(order.quantization or str(stored.get("quant_method", "")), f"{order.name} is quantized with")
    # It raises a ValueError where nothing is named, as older GPTQ and AWQ files do.
    named = any(stored.get(key) for key in ("quant_method", "load_in_4bit", "load_in_8bit"))
    if not named or not AutoHfQuantizer.supports_quant_method(dict(stored)):
        raise UnsupportedModel(
            f"{order.name} is quantized with {stored.get('quant_method')!r}, which transformers does not know."
        )


def require(feature: str, why: str) -> None:
    """Raise MissingPackage with the pip line where a package for ``feature`` is missing."""
    if needed := packages.missing(feature):
        raise MissingPackage(
            f"{why} {feature}, which needs {' and '.join(needed)}.",
            f"Run: {packages.install_line(*needed)}",
        )


def verify(model: Any, order: LoadOrder, device: DeviceFacts) -> tuple[str, ...]:
    """Check the loaded model's layers against what was asked for, and return notes. Raises WrongResult."""
    options = order.options
    if on_the_fly(options) or order.quantization == "bitsandbytes":
        return _verify_bitsandbytes(model, order, device)
    if order.quantization in ("gptq", "awq"):
        layers = [module for module in model.modules() if isinstance(getattr(module, "qweight", None), torch.Tensor)]
        if not layers:
            raise WrongResult(f"No layer of {order.name} is a {order.quantization.upper()} layer after loading.")
        if order.quantization == "gptq" and options.disable_exllama:
            _verify_trainable(layers)
    if order.quantization in UNPACKED and not stored_config(model.config):
        held = next((str(one.dtype) for one in model.parameters() if one.ndim > 1), "").removeprefix("torch.")
        return (
            f"The {order.quantization.upper()} weights were unpacked to {held}: nothing here multiplies them packed.",
        )
    return ()


def _verify_trainable(layers: list[Any]) -> None:
    for layer in layers:
        if not getattr(layer, "SUPPORTS_TRAINING", False):
            raise WrongResult(f"disable_exllama was asked for, but the layers are {type(layer).__name__}.")


def _verify_bitsandbytes(model: Any, order: LoadOrder, device: DeviceFacts) -> tuple[str, ...]:
    import bitsandbytes as bnb

    options = order.options
    four_bit = options.load_in_4bit or (not options.load_in_8bit and bool(stored_config(model.config)["load_in_4bit"]))
    wanted = bnb.nn.Linear4bit if four_bit else bnb.nn.Linear8bitLt
    layers = {name: module for name, module in model.named_modules() if isinstance(module, wanted)}
    left = sorted(_unconverted(model))
    if not layers or left:
        raise WrongResult(
            f"{order.name} was to be loaded in {4 if four_bit else 8}-bit, but {len(left)} of "
            f"{len(layers) + len(left)} layers are not quantized{': ' + ', '.join(left[:3]) if left else ''}."
        )
    for name, layer in layers.items():
        _verify_weight(name, layer.weight, four_bit)
    if options.load_in_4bit:
        _verify_4bit(layers, options, device)
    return _notes(model)


def _verify_weight(name: str, weight: Any, four_bit: bool) -> None:
    wanted = torch.uint8 if four_bit else torch.int8
    if weight.dtype != wanted:
        raise WrongResult(f"The weight of {name} is {weight.dtype} after loading, not {wanted}.")


def _verify_4bit(layers: Mapping[str, Any], options: LoadOptions, device: DeviceFacts) -> None:
    wanted = (options.quant_type, compute_dtype(options, device), options.use_double_quant)
    for name, layer in layers.items():
        state = layer.weight.quant_state
        there = (state.quant_type, layer.compute_dtype, bool(state.nested)) if state is not None else None
        if there != wanted:
            raise WrongResult(f"{name} has (quant_type, compute_dtype, use_double_quant) {there}, not {wanted}.")


def _unconverted(model: Any) -> Iterator[str]:
    """Names of linear layers that bitsandbytes should have converted and did not."""
    keep = model.hf_quantizer.modules_to_not_convert
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep):
            yield name


def _notes(model: Any) -> tuple[str, ...]:
    notes = []
    # bitsandbytes converts linear layers alone: a mixture's experts, fused into 3-D parameters, stay as they are.
    fused = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    if fused:
        notes.append(f"{fused:,} parameters of fused experts stay unquantized: bitsandbytes converts linear layers.")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if places & {"cpu", "disk"} and places - {"cpu", "disk"}:
        notes.append("Layers that lie in RAM or on disk stay unquantized: bitsandbytes converts those on a GPU.")
    return tuple(notes)
