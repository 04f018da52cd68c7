"""Whether any split of blocks over devices exists, found by search: exact, for when the split in order fails.

Blocks of equal size are interchangeable, so the search goes over counts by size, device after device, and keeps
only the best counts: what is placed on one device is never a burden to the next. The layers of nearly all models come
in two or three sizes; with many sizes the search is given up after so many steps, and the split in order stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Counts = tuple[int, ...]


class GaveUp(Exception):
    """The search has taken all its steps."""


class Steps:
    """How many steps one search may still take; each is about a microsecond."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, count: int = 1) -> None:
        """Raises GaveUp where none is left."""
        self._left -= count
        if self._left < 0:
            raise GaveUp


def fills(counts: Counts, sizes: Sequence[int], room: int, steps: Steps) -> Iterator[Counts]:
    """The choices of blocks within ``room`` to which no more can be added; the last size varies with the others."""
    if room < 0:
        return
    if not counts:
        yield ()
        return
    yield from _fill(counts, sizes, room, 0, steps)


def _fill(counts: Counts, sizes: Sequence[int], room: int, index: int, steps: Steps) -> Iterator[Counts]:
    steps.take()
    size = sizes[index]
    most = counts[index] if size == 0 else min(counts[index], room // size)
    if index == len(counts) - 1:
        yield (most,)
        return
    for count in range(most, -1, -1):
        for rest in _fill(counts, sizes, room - count * size, index + 1, steps):
            yield (count, *rest)


def remaining(counts: Counts, taken: Counts) -> Counts:
    return tuple(have - took for have, took in zip(counts, taken, strict=True))


def added(one: Counts, other: Counts) -> Counts:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def total(counts: Counts, sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def after(
    counts: Counts, sizes: Sequence[int], devices: Sequence[int], steps: Steps
) -> dict[Counts, tuple[Counts, ...]]:
    """What may remain after the ``devices`` (room in bytes each) are filled → what each of them took."""
    states: dict[Counts, tuple[Counts, ...]] = {counts: ()}
    for room in devices:
        found: dict[Counts, tuple[Counts, ...]] = {}
        for left, taken in states.items():
            for choice in fills(left, sizes, room, steps) if room > 0 else [tuple(0 for _ in left)]:
                found.setdefault(remaining(left, choice), (*taken, choice))
        states = _best(found, steps)
    return states


def _best(states: dict[Counts, tuple[Counts, ...]], steps: Steps) -> dict[Counts, tuple[Counts, ...]]:
    """Without those that leave at least as much of every size as another does."""
    kept: dict[Counts, tuple[Counts, ...]] = {}
    for left in sorted(states, key=sum):
        steps.take(1 + len(kept) // 2)
        if not any(all(a <= b for a, b in zip(better, left, strict=True)) for better in kept):
            kept[left] = states[left]
    return kept
