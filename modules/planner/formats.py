"""How many bytes a weight takes in each format, to the byte, as the libraries hold it in memory.

Measured on loaded models: transformers 5.23, bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from modules.options import LoadOptions
from modules.planner.checkpoint import Checkpoint
from modules.precision import DTYPE_BYTES, weights_dtype

Kind = Literal["linear", "kept", "embeddings", "head", "packed", "buffer", "adapter"]
_BLOCK_4BIT = 64  # numbers that share a scale
_BLOCK_SCALES = 256  # scales that share a scale, with double quantization
_CODE_4BIT_BYTES = 16 * 4  # the table of the 16 values, one a weight
_CODE_8BIT_BYTES = 256 * 4  # the table of the scales' values
_OFFSET_BYTES = 4  # the scales' mean


@dataclass(frozen=True)
class Part:
    """Tensors of one kind and shape. ``rows`` × ``columns`` numbers each (N × K of a Linear layer)."""

    kind: Kind
    rows: int
    columns: int = 1
    float32_with: tuple[str, ...] = ()  # the dtypes of the model with which these stay float32
    fixed_bytes: int = 0  # of one, where it does not follow the model's dtype
    fused: bool = False  # a part of a mixture's experts, which become one parameter
    stays: bool = False  # packed weights that are buffers of their module

    @property
    def is_buffer(self) -> bool:
        """Whether accelerate leaves it where its module computes, when the module's weights are kept elsewhere."""
        return self.stays or self.kind == "buffer"


@dataclass(frozen=True)
class Precision:
    """How weights are held. ``quantization``: "" | "int8" | "4bit", for the linear layers alone."""

    dtype: str
    quantization: str = ""
    double_quant: bool = False


@dataclass(frozen=True)
class Classes:
    """Bytes of weights by class."""

    quantized: int = 0
    kept: int = 0  # in 16 or 32 bit
    embeddings: int = 0
    head: int = 0
    buffers: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @staticmethod
    def sum(items: Iterable[Classes]) -> Classes:
        """Class by class."""
        held = list(items)
        return Classes(*(sum(getattr(item, field.name) for item in held) for field in fields(Classes)))


def precision_for(
    checkpoint: Checkpoint, options: LoadOptions, gpus: int, cpu_bf16: bool = True, gpu_bf16: bool = True
) -> Precision:
    """How the loader will hold the weights, where ``gpus`` GPUs may be touched."""
    dtype, _ = weights_dtype(
        options, stored=checkpoint.stored_dtype, prequantized=checkpoint.prequantized, gpus=gpus, cpu_bf16=cpu_bf16,
        gpu_bf16=gpu_bf16, unpacked=checkpoint.unpacked,
    )  # fmt: skip
    if checkpoint.quantization or not (options.load_in_4bit or options.load_in_8bit):
        return Precision(dtype)
    return Precision(dtype, "4bit" if options.load_in_4bit else "int8", options.use_double_quant)


def quantized_bytes(rows: int, columns: int, precision: Precision) -> int:
    """Of a linear layer's ``rows`` × ``columns`` weight with its scales, as bitsandbytes holds it."""
    count = rows * columns
    if precision.quantization == "int8":
        return count + 4 * rows
    blocks = -(-count // _BLOCK_4BIT)
    packed = -(-count // 2) + _CODE_4BIT_BYTES
    if precision.double_quant:
        return packed + blocks + 4 * -(-blocks // _BLOCK_SCALES) + _CODE_8BIT_BYTES + _OFFSET_BYTES
    return packed + 4 * blocks


def part_bytes(part: Part, precision: Precision) -> int:
    """Of one tensor of the part."""
    if part.fixed_bytes:
        return part.fixed_bytes
    if part.kind == "linear" and precision.quantization:
        return quantized_bytes(part.rows, part.columns, precision)
    size = 4 if precision.dtype in part.float32_with else DTYPE_BYTES[precision.dtype]
    return part.rows * part.columns * size


def classes(parts: Mapping[Part, int], precision: Precision) -> Classes:
    """The bytes of ``parts`` (part → how many) by class."""
    totals = {field.name: 0 for field in fields(Classes)}
    for part, count in parts.items():
        totals[_class_of(part, precision)] += count * part_bytes(part, precision)
    return Classes(**totals)


def _class_of(part: Part, precision: Precision) -> str:
    if part.kind == "linear":
        return "quantized" if precision.quantization else "kept"
    return {"packed": "quantized", "buffer": "buffers", "adapter": "adapters"}.get(part.kind, part.kind)
