"""Where the keys and values of many answers lie while they decode together.

A slab holds sequences of about the same length, one row each, in one tensor a layer for keys and one for values, so
that a layer attends to all of them in one call. Lengths are rounded up to a few sizes, each at most half as long
again as the one before: so much is lost to a single long answer among short ones, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from modules.worker.batching.row import Sequence, Set

_LEAST = 64
Layers: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]  # of one sequence: kv heads × tokens × head size


def capacity_for(tokens: int, most: int) -> int:
    """How many tokens the slab has room for that takes a sequence of ``tokens``; none has more than ``most``."""
    size = _LEAST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)


class Slab:
    """Sequences with room for ``capacity`` tokens each. Row i of every tensor is that of ``rows[i]``."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[Sequence] = []
        self.keys: list[torch.Tensor] = []  # by layer: places × kv heads × capacity × head size
        self.values: list[torch.Tensor] = []

    @property
    def places(self) -> int:
        """How many rows there is memory for."""
        return self.keys[0].shape[0] if self.keys else 0

    @property
    def slots(self) -> int:
        """How many tokens there is memory for."""
        return self.places * self.capacity

    def resize(self, places: int, like: Layers) -> None:
        """Make room for so many rows; one layer at a time exists twice meanwhile."""
        if not self.keys:
            self.keys = [_empty(places, self.capacity, keys) for keys, _ in like]
            self.values = [_empty(places, self.capacity, values) for _, values in like]
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros and not just any memory: what is masked is multiplied with 0 all the same, and NaN stays NaN.
                tensors[layer] = old.new_zeros(places, *old.shape[1:])
                kept = min(places, len(self.rows))
                tensors[layer][:kept] = old[:kept]

    def put(self, row: Sequence, layers: Layers) -> None:
        """Add a row at the end, where there is a place for it."""
        place = len(self.rows)
        for layer, (keys, values) in enumerate(layers):
            self.keys[layer][place, :, : keys.shape[1]] = keys
            self.values[layer][place, :, : values.shape[1]] = values
        self.rows.append(row)
        row.slab = self

    def of(self, row: Sequence) -> Layers:
        """What one row holds, as views."""
        place, length = self.rows.index(row), row.read
        pairs = zip(self.keys, self.values, strict=True)
        return [(keys[place, :, :length], values[place, :, :length]) for keys, values in pairs]

    def drop(self, row: Sequence) -> None:
        """Take a row out; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            for tensor in (*self.keys, *self.values):
                tensor[place] = tensor[last]
            self.rows[place] = self.rows[last]
        self.rows.pop()
        row.slab = None


def _empty(places: int, capacity: int, like: torch.Tensor) -> torch.Tensor:
    heads, _, size = like.shape
    return like.new_zeros(places, heads, capacity, size)


class Slabs:
    """All slabs, within a bound of ``tokens`` slots together. ``longest``: the most tokens of one sequence."""

    def __init__(self, tokens: int, longest: int) -> None:
        self.tokens = tokens
        self._longest = longest
        self._slabs: dict[tuple[Set, int], Slab] = {}

    def need(self, tokens: int) -> int:
        """How many slots a sequence of so many tokens takes."""
        return capacity_for(tokens, self._longest)

    def with_adapters(self, adapters: Set) -> list[Slab]:
        """The slabs whose sequences belong to this set of LoRAs."""
        return [slab for key, slab in self._slabs.items() if key[0] == adapters and slab.rows]

    def add(self, row: Sequence) -> None:
        """Move a sequence from a cache of its own to the others."""
        layers = [(layer.keys[0], layer.values[0]) for layer in row.cache.layers]
        self._place(row, layers)
        row.cache = None

    def grow(self, row: Sequence) -> None:
        """Move a sequence whose slab is full to one where there is room for a token more."""
        old = row.slab
        assert old is not None
        layers = old.of(row)
        self._place(row, layers)
        new, row.slab = row.slab, None
        old.drop(row)
        row.slab = new
        self._forget_empty()

    def remove(self, row: Sequence) -> None:
        """Forget what a sequence holds here."""
        if row.slab is not None:
            row.slab.drop(row)
            self._forget_empty()

    def take_out(self, row: Sequence) -> Layers:
        """Forget what a sequence holds here, and return it."""
        assert row.slab is not None
        layers = [(keys.clone(), values.clone()) for keys, values in row.slab.of(row)]
        self.remove(row)
        return layers

    def _place(self, row: Sequence, layers: Layers) -> None:
        slab = self._slabs.setdefault((row.adapters, self.need(len(row.ids))), Slab(self.need(len(row.ids))))
        if len(slab.rows) == slab.places:
            self._extend(slab, layers)
        slab.put(row, layers)

    def _extend(self, slab: Slab, like: Layers) -> None:
        """Make room for one row more; for half as many again where the bound allows it, since copying takes time."""
        rows = len(slab.rows)
        for places in (rows + 1 + rows // 2, rows + 1):
            if self._slots(self._slabs.values()) + (places - slab.places) * slab.capacity <= self.tokens:
                break
        else:
            for other in self._slabs.values():
                if other is not slab and other.places > len(other.rows):
                    other.resize(len(other.rows), like)
        slab.resize(places, like)

    @staticmethod
    def _slots(slabs: Iterable[Slab]) -> int:
        return sum(slab.slots for slab in slabs)

    def _forget_empty(self) -> None:
        self._slabs = {key: slab for key, slab in self._slabs.items() if slab.rows}

    def clear(self) -> None:
        """Forget all."""
        for slab in self._slabs.values():
            for row in slab.rows:
                row.slab = None
        self._slabs = {}


def own_cache(empty: Any, layers: Layers) -> Any:
    """An ``empty`` DynamicCache, filled with what one sequence holds."""
    for index, (keys, values) in enumerate(layers):
        empty.update(keys[None], values[None], index)
    return empty
