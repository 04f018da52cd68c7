"""Every language model that transformers knows, built on the meta device, against the planner's rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from modules.library.tensors import TensorInfo
from modules.options import LoadOptions
from modules.planner import Checkpoint
from modules.planner.architectures import APPROXIMATE, EAGER
from modules.planner.formats import Precision, classes
from modules.planner.layout import Layout, build
from modules.protocol import LoadOrder

# Without attention, or with one that keeps no score of each token for each.
_NO_SCORES = frozenset({"big_bird", "deepseek_v4", "falcon_mamba", "hy_v4", "mamba", "mamba2", "rwkv", "xlstm"})
_HEADER_NAMES = {"torch.float32": "F32", "torch.int64": "I64", "torch.bfloat16": "BF16"}


@dataclass
class Differences:
    """``unexpected``: architecture → what differs, for those that are not listed as approximate."""

    compared: int = 0
    unexpected: dict[str, list[str]] = field(default_factory=dict)


def differences() -> Differences:
    """Build each architecture in its default size, without memory, and compare."""
    found = Differences()
    for name, task, config, model in _models():
        found.compared += 1
        tensors = _saved(model)
        as_json = json.loads(config.to_json_string(use_diff=False))
        layout = build(Checkpoint(name, as_json, tensors, task=task, stored_dtype="float32"))  # type: ignore[arg-type]
        problems = list(_problems(model, layout)) if name not in APPROXIMATE else []
        problems += _attention_problems(name, task, model)
        if problems:
            found.unexpected[f"{task} {name}"] = problems
    return found


def _attention_problems(name: str, task: str, model: Any) -> list[str]:
    """Whether the attention that a causal model has where nobody chooses one is the one that is planned."""
    from modules.worker.batching.suitable import obstacle

    if task == "seq2seq" or name in _NO_SCORES:
        return []
    always = model.config.get_text_config(decoder=True)._attn_implementation == "eager"
    if always != (name in EAGER):
        return [f"its attention is {'' if always else 'not '}eager"]
    order = LoadOrder(name, "", "safetensors", "causal", "", LoadOptions(), 2048, "", "")
    return ["it answers many at once, or no longer"] if EAGER.get(name) and obstacle(model, order) else []


def _models() -> Iterator[tuple[str, str, Any, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import configuration_auto, modeling_auto

    for task, names, auto in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
    ):
        for name in names:
            try:
                config = configuration_auto.CONFIG_MAPPING[name]()
                with torch.device("meta"):
                    model = auto.from_config(config)
            except Exception:  # some defaults make no model, or need a package
                continue
            yield name, task, config, model


def _saved(model: Any) -> dict[str, TensorInfo]:
    """The tensors that a file of the model would hold."""
    held = dict(model.named_parameters())
    kept = model.state_dict()
    held |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {n: TensorInfo(_HEADER_NAMES.get(str(t.dtype), "F32"), tuple(t.shape)) for n, t in held.items()}


def _problems(model: Any, layout: Layout) -> Iterator[str]:
    parts = [(part, count) for block in layout.blocks for part, count in block.parts.items()]
    linear = sum(part.rows * part.columns * count for part, count in parts if part.kind == "linear")
    if linear != (real := _converted(model)):
        yield f"{linear - real:+,} numbers in linear layers"
    held = sum(p.numel() * 4 for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    planned = sum(classes(block.parts, Precision("float32")).total for block in layout.blocks)
    if held != planned:
        yield f"{planned - held:+,} bytes"
    yield from _map_problems(model, layout)
    real_kept = (set(model._keep_in_fp32_modules or ()), set(model._keep_in_fp32_modules_strict or ()))
    yield from _dtype_problems(model, layout, *real_kept)


def _converted(model: Any) -> int:
    """The numbers in weights that bitsandbytes would convert."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    )


def _map_problems(model: Any, layout: Layout) -> Iterator[str]:
    keys = [key for block in layout.blocks for key in block.modules]
    there = {name for name, _ in model.named_modules()} | set(model.state_dict())
    if unknown := [key for key in keys if key not in there]:
        yield f"no such modules: {unknown[:3]}"
    if twice := [key for key in keys if keys.count(key) > 1 or any(key.startswith(f"{k}.") for k in keys)]:
        yield f"placed twice: {twice[:3]}"
    if left := [n for n in model.state_dict() if not any(n == key or n.startswith(f"{key}.") for key in keys)]:
        yield f"placed nowhere: {left[:3]}"


def _dtype_problems(model: Any, layout: Layout, kept: set[str], strict: set[str]) -> Iterator[str]:
    """Whether float32 is kept where transformers keeps it, in float16 and in bfloat16."""
    import re

    for dtype, names in (("float16", kept | strict), ("bfloat16", strict)):
        pattern = re.compile("|".join(name.replace("*", ".*") for name in sorted(names)) or r"$^")
        tensors = {
            **dict(model.named_parameters()),
            **{n: b for n, b in model.named_buffers() if n in model.state_dict()},
        }
        real = sum(t.numel() for n, t in tensors.items() if t.is_floating_point() and pattern.search(n))
        planned = sum(
            part.rows * part.columns * count
            for block in layout.blocks
            for part, count in block.parts.items()
            if dtype in part.float32_with
        )
        if real != planned:
            yield f"{planned - real:+,} numbers kept in float32 beside {dtype}"
