"""How LoRAs are named in options: ``pirate``, or ``pirate:0.5`` with a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable

LEAST_WEIGHT, MOST_WEIGHT = -2.0, 2.0  # 1: as trained; 0: without effect; below 0: the opposite


def split_adapter(text: str) -> tuple[str, float]:
    """The name and the weight of ``name`` or ``name:weight``; what follows the last colon counts if it is a number.

    Raises ValueError for no name, and for a weight that is out of bounds.
    """
    name, colon, number = text.strip().rpartition(":")
    weight = _number(number) if colon else None
    if weight is None:
        name, weight = text.strip(), 1.0
    if not name or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise ValueError(text)
    return name, weight


def adapter_text(name: str, weight: float) -> str:
    """What :func:`split_adapter` splits into these two."""
    if weight == 1 and not (":" in name and _number(name.rpartition(":")[2]) is not None):
        return name
    return f"{name}:{weight:g}"


def adapters_in_words(adapters: Iterable[tuple[str, float]]) -> str:
    """``pirate 0.8 + cheese 0.5``; a weight of 1 is left out."""
    return " + ".join(name if weight == 1 else f"{name} {weight:g}" for name, weight in adapters)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
