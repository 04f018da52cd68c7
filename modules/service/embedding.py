"""Texts as vectors, by the model that a request names."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from modules.embeddings import EMBED, Embedded, EmbedOrder, Input
from modules.errors import Cancelled, InternalError
from modules.protocol import AdapterChoice, Progress
from modules.supervisor import Use


@dataclass(frozen=True)
class Vectors:
    """``data``: each vector's float32, little-endian; ``tokens``: of each input."""

    data: tuple[bytes, ...]
    tokens: tuple[int, ...]

    def floats(self, place: int) -> list[float]:
        """One vector as numbers."""
        return [number for (number,) in struct.iter_unpack("<f", self.data[place])]


class Embedder:
    """One request's; :meth:`stop` ends it from any thread."""

    def __init__(self, use: Use, inputs: Sequence[Input], adapters: tuple[AdapterChoice, ...] | None) -> None:
        self._told = use.supervisor.tell(EMBED, EmbedOrder(tuple(inputs), adapters))

    def run(self) -> Vectors:
        """The vectors, in the order of the inputs. Raises what the worker refuses or fails with, and Cancelled."""
        for message in self._told.messages():
            if isinstance(message, Embedded):
                size = 4 * message.dimensions
                data = base64.b64decode(message.vectors)
                parts = tuple(data[begin : begin + size] for begin in range(0, len(data), size))
                return Vectors(parts, message.tokens)
            if not isinstance(message, Progress):
                raise InternalError(f"The model's process answered with {type(message).__name__}.")
        raise Cancelled("The embedding was stopped.")

    def stop(self) -> None:
        """Returns at once; may be called again."""
        self._told.stop()
