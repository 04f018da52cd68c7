"""The LoadReport: everything counted on the model that is there, nothing taken from what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from modules.options import LoadOptions, stretched_context
from modules.protocol import LoadOrder, LoadReport

_NOWHERE = "meta"  # what no entry of a device map covers


def make_report(
    model: Any,
    tokenizer: Any,
    order: LoadOrder,
    *,
    context_limit: int,
    kwargs: Mapping[str, str],
    load_seconds: float,
    notes: tuple[str, ...],
    from_copy: bool = False,
) -> LoadReport:
    """The report on a loaded model."""
    by_device = device_bytes(model)
    return LoadReport(
        architecture=type(model).__name__,
        parameters=count_parameters(model),
        footprint_bytes=sum(by_device.values()),
        device_bytes=by_device,
        dtype=next(iter(dtypes(model)), ""),
        layer_classes=layer_classes(model),
        device_map=device_map(model),
        context_limit=context_limit,
        tokenizer_class=type(tokenizer).__name__,
        tokenizer_is_fast=bool(tokenizer.is_fast),
        has_chat_template=bool(tokenizer.chat_template),
        attn_implementation=str(model.config._attn_implementation),
        kwargs=dict(kwargs),
        load_seconds=round(load_seconds, 3),
        notes=notes,
        from_copy=from_copy,
    )


def context_limit(config: Any, options: LoadOptions) -> int:
    """The model's limit in tokens after the RoPE options, from its unchanged configuration; 0 = not known."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if limit := getattr(text, name, 0):
            return stretched_context(options, int(limit))
    return 0


def device_bytes(model: Any) -> dict[str, int]:
    """Bytes of parameters, buffers and quantization scales by device; what is tied counts once.

    Offloaded tensors are on torch's meta device: the device map says whether they lie in "cpu" or on "disk".
    """
    places = device_map(model)
    seen: set[Any] = set()
    total: Counter[str] = Counter()
    for name, tensor in _tensors(model):
        key = id(tensor) if tensor.is_meta else (str(tensor.device), tensor.data_ptr(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        device = _place(name, places) if tensor.is_meta else str(tensor.device)
        total[device] += tensor.numel() * tensor.element_size()
    return dict(total)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        yield from ((name, scale) for scale in _scales(parameter))
    yield from model.named_buffers()


def _scales(parameter: Any) -> Iterator[torch.Tensor]:
    """The tensors that a bitsandbytes parameter keeps beside its data."""
    if isinstance(getattr(parameter, "SCB", None), torch.Tensor):
        yield parameter.SCB
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (item for item in (state.absmax, state.code, state.offset) if isinstance(item, torch.Tensor))
        state = getattr(state, "state2", None)


def misplaced(model: Any, places: Mapping[str, str]) -> list[str]:
    """The parameters that do not lie where a device map, module → "cpu", "disk" or the GPU's number, puts them.

    What is kept on disk, or in RAM beside a GPU, is on torch's meta device until it is computed.
    """
    on_gpus = any(place.isdigit() for place in places.values())
    wrong = []
    for name, parameter in model.named_parameters():
        place, there = _place(name, places), str(parameter.device)
        kept = place == "disk" or (place == "cpu" and on_gpus)
        if place != _NOWHERE and there != place and not (kept and parameter.is_meta):
            wrong.append(name)
    return wrong


def _place(name: str, places: Mapping[str, str]) -> str:
    """The device of the longest entry of the device map that ``name`` lies under."""
    fitting = [key for key in places if not key or name == key or name.startswith(key + ".")]
    place = places[max(fitting, key=len)] if fitting else _NOWHERE
    return f"cuda:{place}" if place.isdigit() else place


def device_map(model: Any) -> dict[str, str]:
    """Module → "cpu", "disk" or the GPU's number; one entry ``""`` where all is on one device."""
    given = getattr(model, "hf_device_map", None) or {"": model.device}
    places = {name: _device_name(place) for name, place in given.items()}
    return {"": next(iter(places.values()))} if len(set(places.values())) == 1 else places


def _device_name(place: Any) -> str:
    if isinstance(place, torch.device):
        return str(place.index or 0) if place.type == "cuda" else place.type
    return str(place).removeprefix("cuda:")


def count_parameters(model: Any) -> int:
    """The number of weights, those packed by a quantization counted as what they stand for; tied ones once."""
    packed = [module for module in model.modules() if isinstance(getattr(module, "qweight", None), torch.Tensor)]
    theirs = {id(parameter) for module in packed for parameter in module.parameters(recurse=False)}
    total = sum(int(module.in_features) * int(module.out_features) for module in packed)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numbers = state.shape.numel() if state is not None else parameter.numel()
        total += 0 if id(parameter) in theirs else numbers
    return total


def dtypes(model: Any) -> dict[str, int]:
    """How many of the weights that are not quantized have each dtype, most first: ``{"bfloat16": 28325184}``."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(counts.most_common())


def layer_classes(model: Any) -> dict[str, int]:
    """Linear layers by class, quantized or not: ``{"Linear4bit": 210, "Linear": 1}``."""
    return dict(Counter(type(module).__name__ for module in model.modules() if _is_linear(module)))


def _is_linear(module: Any) -> bool:
    packed = isinstance(getattr(module, "qweight", None), torch.Tensor)
    return packed or isinstance(module, torch.nn.Linear | Conv1D)
