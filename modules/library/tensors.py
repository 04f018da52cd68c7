"""The tensors of a checkpoint, by its headers: names, types and shapes; how many numbers they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.checkpoint import safetensors_header

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Beside packed weights lie scales, zero points and states, which are no parameters of the model.
_BESIDE = (
    ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB",
    ".weight_format", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
)  # fmt: skip
_PACKED = frozenset({"bitsandbytes", "gptq", "awq"})  # the methods whose packing is known here
_PACKED_ITEM_BITS = {"U8": 8, "I32": 32}  # bitsandbytes 4-bit; qweight of GPTQ and AWQ


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as the header names it: "BF16", "I32", "Q4_1"
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def safetensors_tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors of safetensors files by name. Raises BrokenCheckpoint."""
    tensors = {}
    for file in files:
        for name, entry in safetensors_header(file).items():
            if name != "__metadata__":
                tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    return tensors


def parameters(tensors: Mapping[str, TensorInfo], quantization: str, bits: int) -> int | None:
    """How many numbers the model has, packed ones counted singly; None where the headers do not tell."""
    if not tensors or quantization not in {"", *_PACKED}:
        return None
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BESIDE) or not quantization}
    return sum(_unpacked(tensor, bits if quantization else 0) for tensor in weights.values())


def _unpacked(tensor: TensorInfo, bits: int) -> int:
    item_bits = _PACKED_ITEM_BITS.get(tensor.dtype, 0)
    return tensor.elements * item_bits // bits if bits and item_bits else tensor.elements


def main_type(tensors: Mapping[str, TensorInfo]) -> str:
    """The type that most numbers are stored in, as the headers name it."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
    return max(counts, key=lambda name: counts[name]) if counts else ""


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The floating-point type that most numbers are stored in: ``bfloat16``; ``""`` without one."""
    return _DTYPES.get(main_type({name: t for name, t in tensors.items() if t.dtype in _DTYPES}), "")
