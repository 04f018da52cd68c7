"""Which block lies on which device. Layers in order, device after device; another split only where that one fails.

A device that computes needs its working memory. Where layers lie in RAM or on disk beside a GPU, the first GPU in
use computes them: their weights visit it one block at a time, and their KV cache stays there (accelerate's hooks).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from modules.planner import packing
from modules.planner.devices import Room, Rooms

_HALVINGS = 12  # of the range in which the least that is missing is looked for
_MOST_STEPS = 5_000  # of a search for a split out of order


@dataclass(frozen=True)
class Load:
    """A block in bytes. ``held``: all of it, where it computes. ``offloaded``: what is kept elsewhere, when it
    computes on the main device; its ``kv`` cache and ``buffers`` (a part of ``held``) lie there all the same."""

    held: int
    offloaded: int
    kv: int = 0
    buffers: int = 0

    @property
    def movable(self) -> int:
        """What the main device holds more when the block lies there, than when it is kept elsewhere."""
        return self.held - self.buffers


@dataclass(frozen=True)
class Way:
    """Devices that compute, and places that only keep, each in the order in which they fill.

    Where something is kept, the first of ``computing`` is the one that computes it, and holds something itself.
    """

    computing: tuple[Room, ...]
    stores: tuple[Room, ...] = ()


@dataclass(frozen=True)
class Placement:
    """``devices``: a key a block, in the blocks' order. ``missing_bytes`` on the device ``missing_on``, whose cap
    this split does not keep; 0 = it keeps all."""

    devices: tuple[str, ...]
    missing_bytes: int = 0
    missing_on: str = ""


@dataclass(frozen=True)
class Usage:
    """What a split puts on each device, beside what the device needs by itself."""

    weights: dict[str, int]
    kv: dict[str, int]
    visiting: int  # bytes of the largest block that comes to compute
    main: str  # where it comes to


def place(loads: Sequence[Load], rooms: Rooms, *, search: bool = True) -> Placement:
    """A split that keeps every cap. Where none exists, the split in order that misses one cap by the least.

    ``search``: look for any split where the one in order does not do, which takes a hundred times as long.
    """
    ways = list(_ways(rooms))
    process_short = max(0, rooms.ram.fixed_bytes - (rooms.ram.cap_bytes or 0)) if rooms.gpus else 0
    sums = _Sums(loads)
    if not process_short:
        for way in ways:
            if (devices := _in_order(loads, way, sums)) is not None:
                return Placement(devices)
        if search and (devices := _searched(loads, ways)) is not None:
            return Placement(devices)
    short = min((_short(loads, way, sums) for way in ways), key=lambda found: found.missing if found else math.inf)
    assert short is not None, "without a bound on its first device, every way takes all"
    if process_short:
        return Placement(short.devices, process_short + short.missing, rooms.ram.key)
    return Placement(short.devices, short.missing, short.room.key)


def _ways(rooms: Rooms) -> Iterator[Way]:
    disk = (rooms.store,) if rooms.disk else ()
    computing = rooms.gpus or (rooms.ram,)
    yield Way(computing)
    stores = (*((rooms.ram,) if rooms.spill else ()), *disk)
    if stores:
        for first in range(len(computing)):
            yield Way(computing[first:], stores)


def usage(loads: Sequence[Load], devices: Sequence[str], computing: Sequence[str]) -> Usage:
    """What the split ``devices`` puts where; ``computing``: the keys of the devices that compute."""
    main = next((key for key in computing if key in devices), computing[0])
    weights: defaultdict[str, int] = defaultdict(int)
    kv: defaultdict[str, int] = defaultdict(int)
    visiting = 0
    for load, key in zip(loads, devices, strict=True):
        if key in computing:
            weights[key] += load.held
            kv[key] += load.kv
        else:
            weights[key] += load.offloaded
            weights[main] += load.buffers
            kv[main] += load.kv
            visiting = max(visiting, load.offloaded)
    return Usage(dict(weights), dict(kv), visiting, main)


class _Sums:
    """Sums over the blocks before each position, so that how many fit is one look-up."""

    def __init__(self, loads: Sequence[Load]) -> None:
        self.count = len(loads)
        self.held = list(accumulate((load.held + load.kv for load in loads), initial=0))
        self.offloaded = list(accumulate((load.offloaded for load in loads), initial=0))
        stays = list(accumulate((load.kv + load.buffers for load in reversed(loads)), initial=0))
        self.stays_from = stays[::-1]
        largest = list(accumulate((load.offloaded for load in reversed(loads)), max, initial=0))
        self.visiting_from = largest[::-1]


def _in_order(loads: Sequence[Load], way: Way, sums: _Sums) -> tuple[str, ...] | None:
    """Fill the devices one after another; None where that does not do."""
    reserved = 0  # on the main device: for visiting blocks, and for cache and buffers of those kept elsewhere
    while True:
        ends = _fill(way, sums, reserved)
        if ends[-1] < sums.count:
            return None
        computed = ends[len(way.computing) - 1]
        need = sums.stays_from[computed] + sums.visiting_from[computed]
        if computed == sums.count or (need <= reserved and ends[0]):
            break
        if not ends[0]:
            return None  # the main device would hold nothing, and so would not be the main one
        reserved = need
    keys = [room.key for room in (*way.computing, *way.stores)]
    starts = [0, *ends]
    return tuple(key for key, start, end in zip(keys, starts, ends, strict=False) for _ in range(start, end))


def _fill(way: Way, sums: _Sums, reserved: int) -> list[int]:
    """For each device, the position of the first block that is left for the next one."""
    ends = []
    start = 0
    for index, room in enumerate((*way.computing, *way.stores)):
        computes = index < len(way.computing)
        totals = sums.held if computes else sums.offloaded
        free = _free(room, computes=computes)
        if free is not None:
            free -= 0 if index else reserved
            start = max(start, bisect_right(totals, totals[start] + free) - 1) if free >= 0 else start
        else:
            start = sums.count
        ends.append(start)
    return ends


def _free(room: Room, *, computes: bool) -> int | None:
    """Room for blocks in bytes; None = no bound."""
    if room.cap_bytes is None:
        return None
    return room.cap_bytes - room.fixed_bytes - (room.working_bytes if computes else 0)


@dataclass(frozen=True)
class _Short:
    """A split that keeps every cap of a ``way`` but that of ``room``, on which ``missing`` bytes are missing."""

    missing: int
    room: Room
    way: Way
    devices: tuple[str, ...]


def _short(loads: Sequence[Load], way: Way, sums: _Sums) -> _Short | None:
    """What this way misses by the least, on whichever of its devices; None where no one device is too small."""
    bounded = [room for room in (*way.computing, *way.stores) if room.cap_bytes is not None]
    found = [short for room in bounded if (short := _with_cap(loads, way, room, None, sums)) is not None]
    return _least(min(found, key=lambda short: short.missing), loads, sums) if found else None


def _with_cap(loads: Sequence[Load], way: Way, room: Room, cap: int | None, sums: _Sums) -> _Short | None:
    """The split in order with another cap on one device; None where that does not do."""
    wider = replace(room, cap_bytes=cap)
    relaxed = Way(_swapped(way.computing, room, wider), _swapped(way.stores, room, wider))
    if (devices := _in_order(loads, relaxed, sums)) is None:
        return None
    keys = [one.key for one in way.computing]
    used = usage(loads, devices, keys)
    need = used.weights.get(room.key, 0) + used.kv.get(room.key, 0) + room.fixed_bytes
    need += room.working_bytes if room.key in keys else 0
    need += used.visiting if room.key == used.main else 0
    return _Short(max(1, need - (room.cap_bytes or 0)), room, way, devices)


def _least(short: _Short, loads: Sequence[Load], sums: _Sums) -> _Short:
    """The same with as little more on that device as will do: where others may hold a part, it need not hold all."""
    too_little = 0
    for _ in range(_HALVINGS):
        more = (too_little + short.missing) // 2
        found = _with_cap(loads, short.way, short.room, (short.room.cap_bytes or 0) + more, sums)
        if found is None or found.missing >= short.missing:
            too_little = more
        else:
            short = found
    return short


def _swapped(rooms: tuple[Room, ...], old: Room, new: Room) -> tuple[Room, ...]:
    return tuple(new if room is old else room for room in rooms)


def _searched(loads: Sequence[Load], ways: Sequence[Way]) -> tuple[str, ...] | None:
    """Any split that keeps the caps, in order or not; None where there is none, or none was found in time."""
    steps = packing.Steps(_MOST_STEPS)
    try:
        return next((found for way in ways if (found := _any_split(loads, way, steps)) is not None), None)
    except packing.GaveUp:
        return None


def _any_split(loads: Sequence[Load], way: Way, steps: packing.Steps) -> tuple[str, ...] | None:
    numbers = Counter(loads)
    sizes = sorted(numbers, key=lambda load: (numbers[load], load.held))  # the most frequent last: see fills
    counts = tuple(numbers[load] for load in sizes)
    if not _may_fit(loads, way):
        return None
    if not way.stores:
        return _over_computing(loads, sizes, counts, way, steps)
    for seed, number in enumerate(counts):  # the main device holds something, so begin with one block there
        first = tuple(int(index == seed) for index in range(len(counts)))
        if number and (chosen := _seeded(sizes, packing.remaining(counts, first), first, way, steps)) is not None:
            return _assigned(loads, sizes, chosen)
    return None


def _over_computing(
    loads: Sequence[Load], sizes: Sequence[Load], counts: packing.Counts, way: Way, steps: packing.Steps
) -> tuple[str, ...] | None:
    """A split over the devices that compute, with nothing kept elsewhere."""
    keys = [room.key for room in way.computing]
    rooms = [_free(room, computes=True) or 0 for room in way.computing]
    for left, taken in packing.after(counts, [load.held + load.kv for load in sizes], rooms, steps).items():
        if not any(left):
            return _assigned(loads, sizes, dict(zip(keys, taken, strict=True)))
    return None


def _seeded(
    sizes: Sequence[Load], counts: packing.Counts, seed: packing.Counts, way: Way, steps: packing.Steps
) -> dict[str, packing.Counts] | None:
    """A split with the block ``seed`` on the main device, ``counts`` anywhere."""
    held = [load.held + load.kv for load in sizes]
    others = way.computing[1:]
    rooms = [_free(room, computes=True) or 0 for room in others]
    for left, taken in packing.after(counts, held, rooms, steps).items():
        if (rest := _last_devices(sizes, left, seed, way, steps)) is not None:
            return {**dict(zip((room.key for room in others), taken, strict=True)), **rest}
    return None


def _may_fit(loads: Sequence[Load], way: Way) -> bool:
    """Whether all bytes together are not more than all room: quickly seen, and most refusals end here."""
    free = [_free(room, computes=True) for room in way.computing] + [_free(r, computes=False) for r in way.stores]
    if any(room is None for room in free):
        return True
    need = sum(min(load.movable, load.offloaded) + load.kv + load.buffers for load in loads)
    return need <= sum(max(0, room or 0) for room in free)


def _last_devices(
    sizes: Sequence[Load], left: packing.Counts, seed: packing.Counts, way: Way, steps: packing.Steps
) -> dict[str, packing.Counts] | None:
    """Split what is ``left`` over the main device, which holds ``seed``, and the stores.

    Wherever of these it lies, its KV cache and buffers lie on the main device.
    """
    main = way.computing[0]
    held, stays = [load.movable for load in sizes], [load.kv + load.buffers for load in sizes]
    room = (_free(main, computes=True) or 0) - packing.total(left, stays)
    room -= packing.total(seed, held) + packing.total(seed, stays)
    bounded = [_free(store, computes=False) for store in way.stores]
    for visiting in sorted({0, *(load.offloaded for load, count in zip(sizes, left, strict=True) if count)}):
        steps.take(len(sizes))
        must = tuple(count if load.offloaded > visiting else 0 for load, count in zip(sizes, left, strict=True))
        free = room - visiting - packing.total(must, held)
        for choice in packing.fills(packing.remaining(left, must), held, free, steps):
            on_main = packing.added(must, choice)
            kept = _in_stores(packing.remaining(left, on_main), [load.offloaded for load in sizes], bounded, steps)
            if kept is not None:
                stores = dict(zip((store.key for store in way.stores), kept, strict=True))
                return {main.key: packing.added(seed, on_main), **stores}
    return None


def _in_stores(
    left: packing.Counts, sizes: Sequence[int], rooms: Sequence[int | None], steps: packing.Steps
) -> list[packing.Counts] | None:
    kept = []
    for room in rooms:
        bound = packing.total(left, sizes) if room is None else max(0, room)
        choice = max(packing.fills(left, sizes, bound, steps), key=lambda taken: packing.total(taken, sizes))
        kept.append(choice)
        left = packing.remaining(left, choice)
    return None if any(left) else kept


def _assigned(loads: Sequence[Load], sizes: Sequence[Load], chosen: dict[str, packing.Counts]) -> tuple[str, ...]:
    """A device for each block: counts by size become blocks, in order."""
    left = {key: dict(zip(sizes, counts, strict=True)) for key, counts in chosen.items()}
    devices = []
    for load in loads:
        key = next(key for key, counts in left.items() if counts[load])
        left[key][load] -= 1
        devices.append(key)
    return tuple(devices)
