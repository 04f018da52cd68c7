"""Where the keys and values of many answers lie while they decode together.

A slab holds sequences of about the same length, one row each, in one tensor a layer for keys and one for values, so
that a layer attends to all of them in one call. Lengths are rounded up to a few sizes, each at most half as long
again as the one before: so much is lost to a single long answer among short ones, and no more. A layer that sees a
window only keeps that: the token at position p lies at p modulo the window, over the one that it sees no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from modules.worker.batching.extents import Extents
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

    def __init__(self, capacity: int, extents: Extents) -> None:
        self.capacity = capacity
        self._extents = extents
        self.rows: list[Sequence] = []
        self.places = 0  # for how many rows there is memory
        self.keys: list[torch.Tensor] = []  # by layer: places × kv heads × size of the layer × head size
        self.values: list[torch.Tensor] = []

    @property
    def slots(self) -> int:
        return self.places * self._extents.slots(self.capacity)

    def size(self, layer: int) -> int:
        """For how many tokens of a row a layer has room."""
        return self._extents.size(layer, self.capacity)

    def put(self, row: Sequence, layers: Iterator[Layer], places: int) -> None:
        """Add a row at the end, and make it ``places`` where there are fewer: layer by layer, so that one layer at a
        time exists twice."""
        for index, (keys, values) in enumerate(layers):
            if index == len(self.keys):
                self.keys.append(keys.new_zeros(0, keys.shape[0], self.size(index), keys.shape[2]))
                self.values.append(values.new_zeros(0, values.shape[0], self.size(index), values.shape[2]))
            for tensors, new in ((self.keys, keys), (self.values, values)):
                tensors[index] = _resized(tensors[index], places, len(self.rows))
                _lay(new, tensors[index][len(self.rows)], row.read)
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
        """What one row holds, from the earliest token to the last; as views, but where a window begins amid it."""
        place = self.rows.index(row)
        pairs = zip(self.keys, self.values, strict=True)
        return [(_in_order(keys[place], row.read), _in_order(values[place], row.read)) for keys, values in pairs]

    def drop(self, row: Sequence) -> None:
        """Take a row out; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            for tensor in (*self.keys, *self.values):
                tensor[place] = tensor[last]
            self.rows[place] = self.rows[last]
        self.rows.pop()
        row.slab = None


def _lay(new: torch.Tensor, place: torch.Tensor, length: int) -> None:
    """Lay the last tokens of a sequence of ``length`` each at its position modulo the size of the place.

    ``new``, ``place``: kv heads × tokens × head size.
    """
    size, count = place.shape[1], new.shape[1]
    first = (length - count) % size
    before = min(count, size - first)  # as many come before the end, the others again at the beginning
    place.zero_()  # NaN of who was here before; see _resized
    place[:, first : first + before] = new[:, :before]
    place[:, : count - before] = new[:, before:]


def _in_order(place: torch.Tensor, length: int) -> torch.Tensor:
    """What :func:`_lay` has laid, and steps beyond it."""
    first = length % place.shape[1]
    if length <= place.shape[1] or not first:
        return place[:, :length]
    return torch.cat((place[:, first:], place[:, :first]), dim=1)


def _resized(old: torch.Tensor, places: int, rows: int) -> torch.Tensor:
    """A tensor of so many places that holds the first ``rows`` of ``old``."""
    if old.shape[0] == places:
        return old
    # Zeros and not just any memory: what is masked is multiplied by 0 all the same, and NaN stays NaN.
    new = old.new_zeros(places, *old.shape[1:])
    new[:rows] = old[:rows]
    return new


class Slabs:
    """All slabs, within a bound of ``bound`` slots together, which may change. What a slot is, ``extents`` say.

    ``longest``: the most tokens of one sequence.
    """

    def __init__(self, extents: Extents, longest: int) -> None:
        self.bound = extents.room
        self.extents = extents
        self._longest = longest
        self._slabs: dict[tuple[Set, int], Slab] = {}

    @property
    def slots(self) -> int:
        """How many there is memory for now."""
        return sum(slab.slots for slab in self._slabs.values())

    def need(self, tokens: int) -> int:
        """How many slots a sequence of so many tokens takes."""
        return self.extents.slots(capacity_for(tokens, self._longest))

    def numbers(self) -> list[int]:
        """How many numbers a token's keys and values are, by layer. There has to be a sequence."""
        slab = next(iter(self._slabs.values()))
        pairs = zip(slab.keys, slab.values, strict=True)
        return [keys[0, :, 0].numel() + values[0, :, 0].numel() for keys, values in pairs]

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
        capacity = capacity_for(len(row.ids), self._longest)
        slab = self._slabs.setdefault((row.adapters, capacity), Slab(capacity, self.extents))
        slab.put(row, layers, self._places_for_one_more(slab))

    def _places_for_one_more(self, slab: Slab) -> int:
        """For half as many again where the bound allows it, since copying takes time."""
        rows = len(slab.rows)
        if rows < slab.places:
            return slab.places
        for places in (rows + 1 + rows // 2, rows + 1):
            if self.slots + (places - slab.places) * self.extents.slots(slab.capacity) <= self.bound:
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


def own_cache(empty: Any, layers: Layers, length: int) -> Any:
    """An ``empty`` DynamicCache, filled with what a sequence of ``length`` tokens holds."""
    for index, (keys, values) in enumerate(layers):
        empty.update(keys[None], values[None], index)
        if empty.layers[index].is_sliding:
            empty.layers[index].cumulative_length = length  # as if it had seen also what it no longer holds
    return empty
