"""Whether what was loaded is what was asked for: dtype, attention, rotary frequencies, layers, places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modules.errors import OutOfMemory, WrongResult
from modules.protocol import LoadOrder
from modules.worker import quantization, report, rope
from modules.worker.placement import DeviceFacts


def verify(model: Any, order: LoadOrder, device: DeviceFacts, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Check that what was asked for is what is there; notes on what is not obvious. Raises WrongResult, OutOfMemory.

    The libraries leave out, without a word, what a device or a model cannot do: so look.
    """
    options = order.options
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places and not options.disk:
        raise OutOfMemory(f"{order.name} fits into the allowed memory only with layers on disk.", fix={"disk": True})
    if order.device_map and (wrong := report.misplaced(model, order.device_map)):
        raise WrongResult(
            f"{len(wrong)} of the weights of {order.name} do not lie where the plan has them: {wrong[0]}, for one."
        )
    quantized = bool(order.quantization) and order.file_format != "gguf"
    wanted = str(kwargs["dtype"]).removeprefix("torch.")
    if not quantized and wanted not in (there := report.dtypes(model)):  # some modules may stay float32 by design
        raise WrongResult(f"The weights of {order.name} are {', '.join(there)} after loading, not {wanted}.")
    attention = model.config._attn_implementation
    if options.attn_implementation not in ("auto", attention):
        raise WrongResult(f"The attention of {order.name} is {attention}, not {options.attn_implementation}.")
    if rope.asked(options):
        _verify_rope(model, kwargs["config"], order)
    notes = quantization.verify(model, order, device)
    if device.gpus and "cpu" in places:
        notes = (*notes, "The model does not fit on the GPUs alone: some layers lie in RAM, which is slow.")
    return notes


def _verify_rope(model: Any, config: Any, order: LoadOrder) -> None:
    """Check the rotary frequencies of the loaded model against the formulas. Raises WrongResult."""
    text = config.get_text_config()
    buffers = {name.rsplit(".", 1)[-1]: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    checked = 0
    for layer_type, entry in rope.layers(text.rope_parameters).items():
        name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        expected = rope.inverse_frequencies(entry, rope.head_dim(text, layer_type))
        if name not in buffers or expected is None:
            continue
        checked += 1
        there = buffers[name].detach().float().cpu()
        if there.shape != (len(expected),) or not torch.allclose(there, torch.tensor(expected), rtol=1e-4):
            raise WrongResult(f"The rotary frequencies of {order.name} do not follow the RoPE options ({name}).")
    if not checked and model.config.get_text_config().rope_parameters != text.rope_parameters:
        raise WrongResult(f"{order.name} did not take the RoPE options.")
