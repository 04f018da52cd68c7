"""From the names in files to the modules of the loaded model, and from names and shapes to what a tensor is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from modules.library import config as reading
from modules.library.tensors import TensorInfo
from modules.planner.architectures import (
    BUFFERS,
    CONV1D,
    HEADS,
    IGNORED,
    KEPT_FP32,
    LINEAR_ROUTERS,
    NOT_LINEAR,
    PREFIXES,
    STRICT_FP32,
)
from modules.planner.checkpoint import Checkpoint
from modules.planner.formats import Kind, Part

_BASE_MODEL_ONLY = re.compile(r"(layers?|h|blocks?|embed_tokens|wte|wpe|word_embeddings|embed_in|norm|ln_f|encoder)\.")
_LAYER = re.compile(r"(.*?\.\d+)\.(.+)$")
_EMBEDDING = re.compile(
    r"(^|.*_)(embed\w*|wte|wpe|shared|relative_attention_bias|bias_values|rel_pos_emb|\w+_embed(ding)?s?)$"
)
_NO_EMBEDDING = re.compile(
    r"proj|mapping|^embed_out$|^vision_embed|^embeddings_project$|^shared_|relative_pos_embeddings"
)
_HEAD = re.compile(
    r"(.*\.)?(lm_head(\.decoder|\.out_proj)?|embed_out|output_projection|proj_out|lm_loss|generator_lm_head|"
    r"cls\.predictions\.decoder|pred_layer\.proj)$|^(head|output|decoder)$"
)
_GGUF_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def loaded_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that the loaded model has, under its names; what it leaves aside is left out."""
    if checkpoint.file_format == "gguf":
        yield from _gguf(checkpoint)
        return
    layers = reading.attention(reading.text_part(checkpoint.config))[0]
    draft = re.compile(rf"^(model|language_model\.model|model\.language_model)\.layers\.({layers}|{layers + 1})\.")
    renames = _renames(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        if IGNORED.search(name) and not (name.endswith(".bias") and len(tensor.shape) == 1):
            continue
        if layers and draft.match(name):
            continue
        for old, new in renames:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        yield name, tensor


def _renames(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Beginnings of names and what transformers makes of them, the first that fits counts."""
    model_type = str(checkpoint.config.get("model_type", ""))
    prefix = PREFIXES.get(model_type, "model")
    names = checkpoint.tensors
    if model_type == "gpt_neox":
        return [("embed_out.", "lm_head.")]
    if any(name.startswith("language_model.model.") for name in names):  # multimodal models as saved before 5.0
        towers = {name.split(".", 1)[0] for name in names} - {"language_model", "lm_head", "model"}
        return [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            *((f"{tower}.", f"model.{tower}.") for tower in sorted(towers)),
        ]
    if not prefix or any(name.startswith(f"{prefix}.") for name in names):
        return []
    firsts = sorted({name.split(".", 1)[0] + "." for name in names if _BASE_MODEL_ONLY.match(name)})
    return [(first, f"{prefix}.{first}") for first in firsts]


def _gguf(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    for name, tensor in checkpoint.tensors.items():
        first, _, rest = name.partition(".")
        if first == "blk":
            yield f"model.layers.{rest}", tensor
        elif not name.startswith("rope_"):
            yield f"{_GGUF_MODULES.get(first, 'model.' + first)}.{rest}", tensor


def split_layer(name: str) -> tuple[str, str]:
    """(module of the layer, rest) for a tensor in a list of layers; ("", name) outside of any."""
    match = _LAYER.match(name)
    return (match[1], match[2]) if match else ("", name)


def head_module(checkpoint: Checkpoint) -> str:
    """The output embedding's module, where no file names it because it is tied."""
    return HEADS.get(str(checkpoint.config.get("model_type", "")), "lm_head")


class Classifier:
    """Says what each tensor of a checkpoint is. Repeated layers cost a look-up each."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
        text = reading.text_part(checkpoint.config)
        types = [str(config.get("model_type", "")) for config in (text, checkpoint.config)]
        self._types = frozenset(types)
        self._unpacks = checkpoint.file_format == "gguf"
        self._fused_experts = "auto_map" not in checkpoint.config
        kept = [pattern for name in dict.fromkeys(types) for pattern in KEPT_FP32.get(name, ())]
        strict = [pattern for name in dict.fromkeys(types) for pattern in STRICT_FP32.get(name, ())]
        self._kept_names = tuple(kept)
        self._fp32 = (
            (_any(kept), ("float16",)),
            (_any(strict), ("float16", "bfloat16")),
        )
        self._not_linear = [NOT_LINEAR[name] for name in self._types if name in NOT_LINEAR]
        self._attention_pairs = {name.rpartition(".")[0] for name in tensors if name.endswith("in_proj_weight")}
        self._packed = _packed_modules(checkpoint, tensors)
        self._packed_as_buffers = checkpoint.quantization in ("awq", "gptq")
        self._kernel_bytes = _kernel_bytes(checkpoint)
        self._known: dict[tuple[str, str, tuple[int, ...]], Part | None] = {}

    def part(self, name: str, rest: str, tensor: TensorInfo) -> Part | None:
        """What ``name`` is; ``rest`` is the part of it within its layer. None for what no memory is kept for."""
        if self._packed and (module := _packed_module(name)) in self._packed:
            key = (f"{module in self._packed}:{name.rpartition('.')[2]}:{rest}", tensor.dtype, tensor.shape)
            if key not in self._known:
                self._known[key] = self._packed_part(name, rest, tensor)
            return self._known[key]
        key = (rest, "" if tensor.dtype in _FLOATS else tensor.dtype, tensor.shape)
        if key not in self._known:
            self._known[key] = (
                self._plain_part(name, tensor.shape) if not key[1] or self._unpacks else _as_stored(tensor)
            )
        return self._known[key]

    def _plain_part(self, name: str, shape: tuple[int, ...]) -> Part:
        float32_with = next((dtypes for pattern, dtypes in self._fp32 if pattern and pattern.search(name)), ())
        owner, _, leaf = name.rpartition(".")
        numbers = 1
        for length in shape:
            numbers *= length
        if leaf in BUFFERS and (len(shape) != 2 or leaf == "final_logits_bias"):
            return Part("buffer", numbers, 1, float32_with)
        experts = self._fused_experts and ".experts." in name and len(shape) >= 2
        if len(shape) != 2 or leaf != "weight":
            kind: Kind = "head" if _HEAD.match(owner) else "kept"
            return Part(kind, numbers, 1, float32_with, fused=experts)
        own_name = next((word for word in reversed(owner.split(".")) if not word.isdigit()), "")
        if _HEAD.match(owner):
            return Part("head", numbers, 1, float32_with)
        if own_name == "w" or (_EMBEDDING.match(own_name) and not _NO_EMBEDDING.search(own_name)):
            return Part("embeddings", numbers, 1, float32_with)
        if self._is_linear(owner, own_name):
            rows, columns = reversed(shape) if self._types & CONV1D else shape
            return Part("linear", rows, columns, float32_with)
        return Part("kept", numbers, 1, float32_with, fused=experts)

    def _is_linear(self, owner: str, own_name: str) -> bool:
        """Whether a 2-D weight's module is one that bitsandbytes converts."""
        if self._unpacks:
            return False
        if own_name in ("gate", "router") and not self._types & LINEAR_ROUTERS:
            return False  # a mixture's router is a module of its own, with a parameter
        if self._fused_experts and re.search(r"\.experts\.\d+\.", owner + "."):
            return False  # becomes one 3-D parameter for all experts
        if own_name == "out_proj" and owner.rpartition(".")[0] in self._attention_pairs:
            return False  # torch's MultiheadAttention keeps a subclass
        if owner.endswith(self._kept_names) if self._kept_names else False:
            return False
        return not any(pattern.search(owner) for pattern in self._not_linear)

    def _packed_part(self, name: str, rest: str, tensor: TensorInfo) -> Part | None:
        """A tensor of a module whose weight is packed: as stored, but for what describes the packing."""
        leaf = name.rpartition(".")[2]
        if "quant_state." in rest:
            nested = any(other.endswith("nested_absmax") for other in self._packed[_packed_module(name)])
            return Part("packed", 1, 1, fixed_bytes=_OFFSET_BYTES) if nested else None
        if leaf == "weight_format":
            return None
        if leaf == "bias":
            return self._plain_part(name, tensor.shape)
        part = replace(_as_stored(tensor, "packed"), stays=self._packed_as_buffers)
        return replace(part, fixed_bytes=part.fixed_bytes + self._kernel_bytes) if leaf == "qweight" else part


def _kernel_bytes(checkpoint: Checkpoint) -> int:
    """What gptqmodel 7.6 keeps beside each packed weight: a table of shifts, one int32 for each number in an int32."""
    stored = checkpoint.config.get("quantization_config")
    bits = reading.number(stored, "bits") if isinstance(stored, Mapping) else 0
    return 4 * (32 // bits) if checkpoint.quantization == "gptq" and bits else 0


def _as_stored(tensor: TensorInfo, kind: Kind = "kept") -> Part:
    return Part(kind, tensor.elements, 1, fixed_bytes=tensor.elements * _ITEM_BYTES.get(tensor.dtype, 1))


_OFFSET_BYTES = 4  # the mean of the scales that double quantization takes off
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def _any(patterns: list[str]) -> re.Pattern[str] | None:
    """As transformers reads them: anywhere in the name, ``*`` for any text."""
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns)) if patterns else None


def _packed_module(name: str) -> str:
    owner, _, _ = name.partition(".weight.")  # bitsandbytes: q_proj.weight.absmax
    return owner if owner != name else name.rpartition(".")[0]


def _packed_modules(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """Module → names of its tensors, for modules with a tensor that is not of a floating-point type."""
    if not checkpoint.prequantized:
        return {}
    packed = {_packed_module(name) for name, tensor in tensors.items() if tensor.dtype not in _FLOATS}
    found: dict[str, list[str]] = {module: [] for module in packed}
    for name in tensors:
        if (module := _packed_module(name)) in found:
            found[module].append(name)
    return {module: tuple(names) for module, names in found.items()}
