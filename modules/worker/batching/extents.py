"""How much of a sequence each layer keeps, and what that is of the memory that was planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from modules.options import LoadOptions, kept_tokens


@dataclass(frozen=True)
class Extents:
    """By layer: ``windows``, the most tokens that it sees (0: all of them); ``planned``, for how many tokens there is
    memory for its keys and values; ``numbers``, how many those of one token are.

    ``room``: for how many tokens there is memory in a layer that sees all. Memory is counted in as many slots.
    """

    room: int
    windows: tuple[int, ...]
    planned: tuple[int, ...]
    numbers: tuple[int, ...]

    def size(self, layer: int, tokens: int) -> int:
        """How many tokens the layer keeps of so many."""
        window = self.windows[layer]
        return min(tokens, window) if window else tokens

    def slots(self, tokens: int) -> int:
        """How many slots a sequence of so many tokens takes: the tokens themselves where all layers keep all."""
        if not any(self._kinds):
            return tokens
        kept = sum(count * (min(tokens, window) if window else tokens) for window, count in self._kinds.items())
        return -(-kept * self.room // self._planned_numbers)

    @cached_property
    def _kinds(self) -> Mapping[int, int]:
        """Window → numbers of one token in all layers that have it."""
        kinds: Counter[int] = Counter()
        for window, count in zip(self.windows, self.numbers, strict=True):
            kinds[window] += count
        return kinds

    @cached_property
    def _planned_numbers(self) -> int:
        return sum(count * most for count, most in zip(self.numbers, self.planned, strict=True))

    def counting(self, numbers: Iterable[int]) -> Extents:
        """With what one token takes in each layer, as its tensors say."""
        return replace(self, numbers=tuple(numbers))


def extents(layers: Iterable[Any], options: LoadOptions, ctx_tokens: int) -> Extents:
    """Of the layers of an empty DynamicCache. All tokens count alike until :meth:`Extents.counting`."""
    windows = tuple(int(getattr(layer, "sliding_window", 0) or 0) for layer in layers)
    planned = tuple(kept_tokens(options, ctx_tokens, window) for window in windows)
    return Extents(kept_tokens(options, ctx_tokens), windows, planned, (1,) * len(windows))
