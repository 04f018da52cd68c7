"""The header of a GGUF file: metadata and tensor shapes, without its weights and without an ML package.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. The package gguf reads the same by making
an object of every token of the vocabulary, which takes over a second; here arrays of texts are passed over.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from modules.errors import BrokenCheckpoint

# enum ggml_type of ggml.h → (name, elements of a block, bytes of a block). A type not here is only not measured.
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10
_ALIGNMENT = 32
_KEPT_ITEMS = 1024  # a longer array is a vocabulary
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_DIMENSIONS = 8
_BLOCK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 26  # the largest vocabularies take a fifth; more would only keep the page waiting
_MAX_NAME_BYTES = 65_535  # the format's own limit
_KEPT_TEXT_BYTES = 1 << 20  # of a longer text the beginning is kept


@dataclass(frozen=True)
class GgufHeader:
    """``metadata``: values, short arrays of numbers as tuples; ``arrays``: the lengths of all arrays.

    ``tensors``: name → (type, shape), the shape's last dimension the one that lies together, as torch has it.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> float:
        """A number under the architecture's prefix, of an array the largest; 0 where there is none."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        items = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in items if isinstance(item, int | float) and math.isfinite(item)]
        return max(numbers, default=0)


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at ``path``. Raises BrokenCheckpoint, also for tensors beyond the file's end."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except ValueError as error:
        raise BrokenCheckpoint(f"{path.name} is not a whole GGUF file: {error}.") from None


class _Reader:
    """Reads forward through a buffer. Raises ValueError where the bytes make no sense."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._buffer = b""
        self._start = 0  # of the buffer in the file
        self._at = 0  # in the buffer

    def header(self) -> GgufHeader:
        if self._read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar(_U32)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are known")
        tensor_count, pair_count = self._scalar(_U64), self._scalar(_U64)
        header = GgufHeader()
        for _ in range(pair_count):
            key, kind = self._name(), self._scalar(_U32)
            if kind == _ARRAY:
                header.arrays[key], items = self._array(_MAX_DEPTH)
                if items:
                    header.metadata[key] = items
            else:
                header.metadata[key] = self._text() if kind == _STRING else self._scalar(kind)
        self._tensors(tensor_count, header)
        return header

    def _tensors(self, count: int, header: GgufHeader) -> None:
        end = 0
        for _ in range(count):
            name, dimensions = self._name(), self._scalar(_U32)
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            shape = tuple(reversed([self._scalar(_U64) for _ in range(dimensions)]))
            kind, offset = self._scalar(_U32), self._scalar(_U64)
            type_name, block, block_bytes = GGML_TYPES.get(kind, (f"type {kind}", 1, 0))
            header.tensors[name] = (type_name, shape)
            end = max(end, offset + math.prod(shape) // block * block_bytes)
        alignment = header.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        header_end = self._start + self._at
        expected = -(-header_end // alignment) * alignment + end
        if end and self._size < expected:
            raise ValueError(f"it is cut short: {self._size:,} bytes of {expected:,}")

    def _need(self, length: int) -> None:
        """Have the next ``length`` bytes in the buffer."""
        if self._at + length <= len(self._buffer):
            return
        if self._start + self._at + length > self._size:
            raise ValueError("it is cut short")
        if self._start + self._at + length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than {_MAX_HEADER_BYTES:,} bytes")
        rest = self._buffer[self._at :]
        self._start, self._at = self._start + self._at, 0
        self._buffer = rest + self._file.read(max(_BLOCK_BYTES, length - len(rest)))
        if len(self._buffer) < length:
            raise ValueError("it is cut short")

    def _read(self, length: int) -> bytes:
        self._need(length)
        self._at += length
        return self._buffer[self._at - length : self._at]

    def _scalar(self, kind: int) -> Any:
        layout = _SCALARS.get(kind)
        if layout is None:
            raise ValueError(f"a value is of type {kind}")
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _name(self) -> str:
        length = self._scalar(_U64)
        if length > _MAX_NAME_BYTES:
            raise ValueError(f"a name has {length:,} bytes")
        return self._read(length).decode("utf-8", "replace")

    def _text(self) -> str:
        length = self._scalar(_U64)
        text = self._read(min(length, _KEPT_TEXT_BYTES)).decode("utf-8", "replace")
        self._skip(max(0, length - _KEPT_TEXT_BYTES))
        return text

    def _array(self, depth: int) -> tuple[int, tuple[Any, ...]]:
        """Pass over an array: its length, and its items where they are a few numbers."""
        kind, count = self._scalar(_U32), self._scalar(_U64)
        if kind == _STRING:
            self._pass_strings(count)
        elif kind == _ARRAY:
            if not depth:
                raise ValueError("arrays lie too deep in arrays")
            for _ in range(count):
                self._array(depth - 1)
        elif kind in _SCALARS and count > _KEPT_ITEMS:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        else:
            return count, tuple(self._scalar(kind) for _ in range(count))
        return count, ()

    def _pass_strings(self, count: int) -> None:
        for _ in range(count):  # a hundred thousand times and more: the common case calls nothing of its own
            at = self._at
            buffer = self._buffer
            end = at + 8 + int.from_bytes(buffer[at : at + 8], "little")
            if end <= len(buffer):
                self._at = end
            else:
                self._skip(self._scalar(_U64))

    def _skip(self, length: int) -> None:
        position = self._start + self._at + length
        if position > self._size:
            raise ValueError("it is cut short")
        if self._at + length <= len(self._buffer):
            self._at += length
            return
        self._file.seek(position)
        self._buffer, self._start, self._at = b"", position, 0
