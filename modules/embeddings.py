"""The messages of embedding texts, beside those of :mod:`modules.protocol`.

``POST /embed`` with an :class:`EmbedOrder` is answered by lines of JSON: Progress …, then one :class:`Embedded` or
Failed. Closing the connection stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

from modules.protocol import AdapterChoice, message

EMBED = "/embed"


@message()
@dataclass(frozen=True)
class Input:
    """One thing to embed: a text, or the ids of its tokens."""

    text: str = ""
    ids: tuple[int, ...] = ()


@message(inputs=Input, adapters=AdapterChoice)
@dataclass(frozen=True)
class EmbedOrder:
    """What to embed, each by itself."""

    inputs: tuple[Input, ...]
    adapters: tuple[AdapterChoice, ...] | None = None  # as a GenerateOrder's


@message()
@dataclass(frozen=True)
class Embedded:
    """``vectors``: float32, little-endian, one after another in the order of the inputs, as base64; each of
    ``dimensions`` numbers and of length 1. ``tokens``: how many each input has.
    """

    vectors: str
    dimensions: int
    tokens: tuple[int, ...]
