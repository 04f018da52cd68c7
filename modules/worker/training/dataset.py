"""What is learned from, as the loop takes it: encoded examples, cut, packed, split, in the order of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset, Sampler

from modules.errors import BrokenData
from modules.options import TrainingOptions
from modules.worker.training.encoding import Encoded

IGNORED = -100  # the label of a token that carries no loss
Row: TypeAlias = list[Encoded]  # one example, or several that were packed


@dataclass(frozen=True)
class Counts:
    """Of the examples, after cutting. ``left_out``: those whose answer lies behind the cut-off as a whole."""

    total: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    cut: int = 0
    left_out: int = 0
    longest: int = 0  # tokens, before cutting

    def notes(self) -> tuple[str, ...]:
        """What of this deserves a word."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut} of {self.total} examples are longer than the cut-off; the longest has "
                f"{self.longest:,} tokens."
            )
        if self.left_out:
            notes.append(f"{self.left_out} examples teach nothing: their answer lies behind the cut-off.")
        return tuple(notes)


@dataclass(frozen=True)
class Lesson:
    """``train`` and ``evaluation``: rows of at most the cut-off's tokens."""

    train: list[Row]
    evaluation: list[Row]
    counts: Counts

    @property
    def tokens(self) -> int:
        """Of one epoch."""
        return sum(len(example.ids) for row in self.train for example in row)

    @property
    def learned_tokens(self) -> int:
        return sum(sum(example.learned) for row in self.train for example in row)

    def steps(self, options: TrainingOptions) -> int:
        """How many steps the training has."""
        return steps_for(len(self.train), options)


def steps_for(rows: int, options: TrainingOptions) -> int:
    """As the Trainer counts them: the last batch of an epoch, and its last step, may be smaller."""
    if options.max_steps:
        return options.max_steps
    by_epoch = max(1, math.ceil(math.ceil(rows / options.batch_size) / options.accumulation))
    return max(1, math.ceil(options.epochs * by_epoch))


def cut(examples: Iterable[Encoded], cutoff: int) -> tuple[list[Encoded], Counts]:
    """The examples that teach something, cut, and what was counted on the way."""
    kept: list[Encoded] = []
    total = cuts = left_out = longest = 0
    for example in examples:
        total += 1
        longest = max(longest, len(example.ids))
        cuts += len(example.ids) > cutoff
        short = example.cut_to(cutoff)
        if short.teaches:
            kept.append(short)
        else:
            left_out += 1
    tokens, learned = sum(len(one.ids) for one in kept), sum(sum(one.learned) for one in kept)
    return kept, Counts(total, tokens, learned, cuts, left_out, longest)


def make_lesson(examples: Iterable[Encoded], options: TrainingOptions, *, whole: bool = True) -> Lesson:
    """Cut, split off what is measured on, pack. ``whole``: see :func:`split`. Raises BrokenData where nothing is left
    to learn from."""
    kept, counts = cut(examples, options.cutoff)
    if not kept:
        raise BrokenData(
            f"None of {counts.total} examples teaches anything within the cut-off of {options.cutoff} tokens.",
            f"The longest has {counts.longest:,} tokens: raise the cut-off.",
        )
    train, evaluation = split(kept, options, whole=whole)
    pack = _packed if options.packing else _alone
    return Lesson(pack(train, options.cutoff), pack(evaluation, options.cutoff), counts)


def split(
    examples: list[Encoded], options: TrainingOptions, *, whole: bool = True
) -> tuple[list[Encoded], list[Encoded]]:
    """Drawn by the seed; at least one is left on each side. One alone is learned, and not measured on.

    ``whole``: what one conversation became stays on one side, as its later prompts hold its earlier answers.
    """
    groups = _conversations(examples) if whole else [[place] for place in range(len(examples))]
    if not options.evaluation_share or len(groups) < 2:
        return examples, []
    number = max(1, round(len(examples) * options.evaluation_share))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(options.seed)).tolist()
    aside: set[int] = set()
    for drawn in order[:-1]:
        if len(aside) >= number:
            break
        aside.update(groups[drawn])
    train = [one for place, one in enumerate(examples) if place not in aside]
    return train, [examples[place] for place in sorted(aside)]


def _conversations(examples: list[Encoded]) -> list[list[int]]:
    """The places of the examples by where in the data they come from; pieces of a running text are each their own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, one in enumerate(examples):
        groups.setdefault((one.number, 0 if one.number else place), []).append(place)
    return list(groups.values())


def _alone(examples: list[Encoded], _: int) -> list[Row]:
    return [[example] for example in examples]


def _packed(examples: list[Encoded], cutoff: int) -> list[Row]:
    """Each row takes the next examples that have room in it, the longest first."""
    rows: list[Row] = []
    rooms: list[int] = []
    for example in sorted(examples, key=lambda one: -len(one.ids)):
        place = next((at for at, room in enumerate(rooms[-200:]) if room >= len(example.ids)), None)
        if place is None:
            rows.append([example])
            rooms.append(cutoff - len(example.ids))
        else:
            place += max(0, len(rooms) - 200)
            rows[place].append(example)
            rooms[place] -= len(example.ids)
    return rows


class Rows(Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Row:
        return self._rows[place]


class Shuffled(Sampler[int]):
    """An order for each epoch by the seed alone, so that a resumed run goes through the data as an unbroken one.

    ``epoch`` is set before an epoch's first batch is asked for.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self._size, generator=generator).tolist()


def collator(pad: int, *, packing: bool) -> Callable[[list[Row]], dict[str, Any]]:
    """Rows → ``input_ids`` and ``labels`` of batch × longest; with an attention mask, or where rows are packed with
    positions that begin anew at each example, by which transformers keeps them from seeing each other."""

    def collate(rows: list[Row]) -> dict[str, Any]:
        width = max(sum(len(example.ids) for example in row) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for line, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example.ids)
                ids[line, start:end] = torch.tensor(example.ids)
                targets = [i if learned else IGNORED for i, learned in zip(example.ids, example.learned, strict=True)]
                labels[line, start:end] = torch.tensor(targets)
                labels[line, start] = IGNORED  # nothing before it tells of it
                mask[line, start:end] = 1
                positions[line, start:end] = torch.arange(len(example.ids))
                start = end
            positions[line, start:] = torch.arange(width - start)
        if packing:
            return {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate
