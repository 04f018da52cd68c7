"""Where the keys and values of many answers lie while they decode together.

A slab holds sequences of about the same length, one row each, in one tensor a layer for keys and one for values, so
that a layer attends to all of them in one call. Lengths are rounded up to a few sizes, each at most half as long
again as the one before: so much is lost to a single long answer among short ones, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from modules.worker.batching.row import Sequence, Set

_LEAST = 64
Layer: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # keys and values of one sequence: kv heads × tokens × head size
Layers: TypeAlias = list[Layer]


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
        self.places = 0  # for how many rows there is memory
        self.keys: list[torch.Tensor] = []  # by layer: places × kv heads × capacity × head size
        self.values: list[torch.Tensor] = []

    @property
    def slots(self) -> int:
        """For how many tokens there is memory."""
        return self.places * self.capacity

    def put(self, row: Sequence, layers: Iterator[Layer], places: int) -> None:
        """Add a row at the end, and make it ``places`` where there are fewer: layer by layer, so that one layer at a
        time exists twice."""
        for index, (keys, values) in enumerate(layers):
            if index == len(self.keys):
                self.keys.append(keys.new_zeros(0, keys.shape[0], self.capacity, keys.shape[2]))
                self.values.append(values.new_zeros(0, values.shape[0], self.capacity, values.shape[2]))
            for tensors, new in ((self.keys, keys), (self.values, values)):
                tensors[index] = _resized(tensors[index], places, len(self.rows))
                tensors[index][len(self.rows), :, : new.shape[1]] = new
                tensors[index][len(self.rows), :, new.shape[1] :] = 0  # NaN of who was here before; see _resized
        self.places = places
        self.rows.append(row)
        row.slab = self

    def tighten(self) -> None:
        """Give back the memory that no row uses."""
        for tensors in (self.keys, self.values):
            for index, tensor in enumerate(tensors):
                tensors[index] = _resized(tensor, len(self.rows), len(self.rows))
        self.places = len(self.rows)

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


def _resized(old: torch.Tensor, places: int, rows: int) -> torch.Tensor:
    """A tensor of so many places that holds the first ``rows`` of ``old``."""
    if old.shape[0] == places:
        return old
    # Zeros and not just any memory: what is masked is multiplied by 0 all the same, and NaN stays NaN.
    new = old.new_zeros(places, *old.shape[1:])
    new[:rows] = old[:rows]
    return new


class Slabs:
    """All slabs, within a bound of ``tokens`` slots together, which may change.

    ``longest``: the most tokens of one sequence.
    """

    def __init__(self, tokens: int, longest: int) -> None:
        self.tokens = tokens
        self._longest = longest
        self._slabs: dict[tuple[Set, int], Slab] = {}

    @property
    def slots(self) -> int:
        """How many tokens there is memory for now."""
        return sum(slab.slots for slab in self._slabs.values())

    def need(self, tokens: int) -> int:
        """How many slots a sequence of so many tokens takes."""
        return capacity_for(tokens, self._longest)

    def with_adapters(self, adapters: Set) -> list[Slab]:
        """The slabs whose sequences belong to this set of LoRAs."""
        return [slab for key, slab in self._slabs.items() if key[0] == adapters and slab.rows]

    def add(self, row: Sequence) -> None:
        """Move a sequence from a cache of its own to the others."""
        self._place(row, _given_up(row.cache))
        row.cache = None

    def grow(self, row: Sequence) -> None:
        """Move a sequence whose slab is full to one where there is room for a token more."""
        old = row.slab
        assert old is not None
        self._place(row, iter(old.of(row)))
        new = row.slab
        old.drop(row)
        row.slab = new
        self._forget_empty()

    def remove(self, row: Sequence) -> None:
        """Forget what a sequence holds here, also where moving it failed halfway."""
        if row.slab is not None:
            row.slab.drop(row)
        self._forget_empty()

    def take_out(self, row: Sequence) -> Layers:
        """Forget what a sequence holds here, and return it."""
        assert row.slab is not None
        layers = [(keys.clone(), values.clone()) for keys, values in row.slab.of(row)]
        self.remove(row)
        return layers

    def _place(self, row: Sequence, layers: Iterator[Layer]) -> None:
        capacity = self.need(len(row.ids))
        slab = self._slabs.setdefault((row.adapters, capacity), Slab(capacity))
        slab.put(row, layers, self._places_for_one_more(slab))

    def _places_for_one_more(self, slab: Slab) -> int:
        """For half as many again where the bound allows it, since copying takes time."""
        rows = len(slab.rows)
        if rows < slab.places:
            return slab.places
        for places in (rows + 1 + rows // 2, rows + 1):
            if self.slots + (places - slab.places) * slab.capacity <= self.tokens:
                return places
        for other in self._slabs.values():
            if other is not slab and other.places > len(other.rows):
                other.tighten()
        return rows + 1

    def _forget_empty(self) -> None:
        self._slabs = {key: slab for key, slab in self._slabs.items() if slab.rows}

    def clear(self) -> None:
        """Forget all."""
        for slab in self._slabs.values():
            for row in slab.rows:
                row.slab = None
        self._slabs = {}


def _given_up(cache: Any) -> Iterator[Layer]:
    """The layers of a cache with one sequence, each of which the cache no longer holds."""
    for layer in cache.layers:
        keys, values = layer.keys[0], layer.values[0]
        layer.keys = layer.values = None
        yield keys, values


def own_cache(empty: Any, layers: Layers) -> Any:
    """An ``empty`` DynamicCache, filled with what one sequence holds."""
    for index, (keys, values) in enumerate(layers):
        empty.update(keys[None], values[None], index)
    return empty
