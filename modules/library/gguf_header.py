"""The header of a GGUF file: metadata and tensor shapes, without its weights and without an ML package.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from modules.errors import BrokenCheckpoint

_MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 32  # no count in a header is larger than this


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` without its arrays; ``arrays``: their lengths; ``tensors``: name → (ggml type, shape)."""

    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's prefix: ``value("context_length")``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at ``path``. Raises BrokenCheckpoint."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise BrokenCheckpoint(f"{path.name} is not a whole GGUF file: {error}.") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def header(self) -> GgufHeader:
        if self._file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._scalar(4)
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        tensor_count, pair_count = self._count(), self._count()
        header = GgufHeader()
        for _ in range(pair_count):
            key, kind = self._string(), self._scalar(4)
            if kind == _ARRAY:
                header.arrays[key] = self._skip_array()
            else:
                header.metadata[key] = self._string() if kind == _STRING else self._scalar(kind)
        for _ in range(tensor_count):
            name = self._string()
            shape = tuple(self._scalar(10) for _ in range(self._bounded(self._scalar(4), 8)))
            header.tensors[name] = (self._scalar(4), shape)
            self._scalar(10)  # the offset
        return header

    def _read(self, length: int) -> bytes:
        data = self._file.read(self._bounded(length, self._size))
        if len(data) < length:
            raise ValueError("it is cut short")
        return data

    def _bounded(self, count: int, most: int) -> int:
        if count > most:
            raise ValueError("a count is larger than the file")
        return count

    def _scalar(self, kind: int) -> Any:
        layout = _SCALARS[kind]
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _count(self) -> int:
        return self._bounded(int(self._scalar(10)), min(self._size, _MOST))

    def _string(self) -> str:
        return self._read(self._count()).decode("utf-8", "replace")

    def _skip_array(self) -> int:
        """Pass over an array without making its items; its length."""
        kind, count = self._scalar(4), self._count()
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._count())
        elif kind == _ARRAY:
            for _ in range(count):
                self._skip_array()
        else:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        return count

    def _skip(self, length: int) -> None:
        self._file.seek(self._bounded(length, self._size), 1)
        if self._file.tell() > self._size:
            raise ValueError("it is cut short")
