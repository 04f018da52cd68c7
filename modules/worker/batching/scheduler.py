"""Whose turn it is: who joins, whose prompt is read, who gets a token, and who steps back when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import TypeAlias

import torch
from transformers import GenerationConfig

from modules.errors import OutOfMemory
from modules.protocol import READ_AT_ONCE, READ_AT_ONCE_EAGER, AdapterChoice, Done, Failed
from modules.worker.batching.choosing import Chooser, defaults, likeliest, no_numbers
from modules.worker.batching.extents import extents
from modules.worker.batching.line import Line, Ticket
from modules.worker.batching.row import Row, Set
from modules.worker.batching.slabs import Slabs
from modules.worker.batching.steps import Steps
from modules.worker.batching.suitable import agreed, obstacle
from modules.worker.generation import Answer, Loaded, generate, release, typed

log = logging.getLogger(__name__)

Using: TypeAlias = Callable[[tuple[AdapterChoice, ...] | None], AbstractContextManager[None]]
READ_TOKENS = 512  # of prompts between two steps, so that those who decode do not wait long
STEPS = 32  # in one turn
SHARED_STEPS = 8  # where another set of LoRAs waits for its turn: switching takes some milliseconds
_SPARE_SHARE = 16  # a newcomer must leave this part of the room free: answers grow, and stepping back costs reading


class Scheduler:
    """Answers everybody in ``line``, in turns, on the engine's thread. ``using`` lets a set of LoRAs act.

    Sets of LoRAs take turns. Answers are taken in as long as there is room for what they hold now, and the youngest
    steps back, to be read again later, where all together have grown too long. An answer that is alone has the
    whole context.
    """

    def __init__(self, loaded: Loaded, line: Line, using: Using, active: Callable[[], Set]) -> None:
        self._loaded = loaded
        self._line = line
        self._using = using
        self._active = active
        self._rows: list[Row] = []  # under way, in the order in which they began
        self._paused: list[Row] = []  # stepped back
        self._prepared: tuple[Ticket, Row] | None = None
        self._last_set: Set | None = None
        order = loaded.order
        self.obstacle = obstacle(loaded.model, order)
        if self.obstacle:
            log.info("%s answers one request after another: %s", order.name, self.obstacle)
        self._most = 1 if self.obstacle else order.options.max_batch
        eager = loaded.model.config.get_text_config(decoder=True)._attn_implementation == "eager"
        self._read_at_once = READ_AT_ONCE_EAGER if eager else READ_AT_ONCE  # a stop is obeyed in between
        self._tried = False
        self._held = 0  # the most tokens that there was memory for
        self._steps = Steps(loaded.model)
        layers = () if self.obstacle else self._steps.new_cache().layers
        self._slabs = Slabs(extents(layers, order.options, order.ctx_tokens), order.ctx_tokens)

    @property
    def slots(self) -> int:
        """How much memory is held by answers that decode together, see :class:`Extents`."""
        return self._slabs.slots

    @property
    def alone(self) -> bool:
        """Whether one answer at most is under way. Asked on the engine's thread."""
        return len(self._under_way()) <= 1

    def turn(self, before: Callable[[], int]) -> bool:
        """Do a little for those numbered below ``before()``; False where none of them is left."""
        self._dismiss()
        if self.obstacle:
            return self._one_by_one(before())
        adapters = self._whose_turn(before())
        if adapters is None:
            return False
        self._last_set = adapters
        try:
            with self._using(adapters):
                self._run(adapters, before)
        except Exception as error:  # of the set: what fails within is told to whom it concerns
            self._fail([row for row in self._under_way() if row.adapters == adapters], error)
            self._refuse_prepared(adapters, error)
        return True

    # --- one after another ---

    def _one_by_one(self, before: int) -> bool:
        ticket = self._line.first(before)
        if ticket is None:
            return False
        if not self._line.take(ticket):
            return True
        try:
            with self._line.held(), self._using(ticket.order.adapters):
                generate(self._loaded, ticket.order, ticket.emit, ticket.stopped)
        except Exception as error:
            ticket.emit(Failed(typed(error, self._loaded.order)))
        return True

    # --- whose turn ---

    def _whose_turn(self, before: int) -> Set | None:
        """The set of LoRAs after the last one, of those that have something to do."""
        sets = list(dict.fromkeys(row.adapters for row in self._rows))
        newcomer = self._newcomer(before)
        if newcomer is not None and newcomer.adapters not in sets:
            sets.append(newcomer.adapters)
        if not sets:
            return None
        after = sets.index(self._last_set) + 1 if self._last_set in sets else 0
        return sets[after % len(sets)]

    def _run(self, adapters: Set, before: Callable[[], int]) -> None:
        """Some steps with one set of LoRAs; returns where another's turn has come, or nothing is left to do."""
        others = any(row.adapters != adapters for row in self._rows)
        for _ in range(SHARED_STEPS if others else STEPS):
            self._dismiss()
            self._join(adapters, before())
            self._line.tell()
            self._read(adapters)
            if not self._step(adapters) and not any(row.adapters == adapters for row in self._rows):
                return
            newcomer = self._newcomer(before())
            if newcomer is not None and newcomer.adapters != adapters:
                return

    # --- coming and going ---

    def _newcomer(self, before: int) -> Row | None:
        """Who may join now: those who stepped back first, then the line."""
        row = self._paused[0] if self._paused else self._prepare(before)
        if row is None or not self._rows:
            return row
        if len(self._rows) >= self._most or not self._may_join():
            return None
        wanted = self._slabs.need(len(row.ids)) + self._slabs.bound // _SPARE_SHARE
        return row if self._demand() + wanted <= self._slabs.bound else None

    def _prepare(self, before: int) -> Row | None:
        """The first of the line with its prompt; those whose prompt is refused are told, and leave."""
        while (ticket := self._line.first(before)) is not None:
            if self._prepared is None or self._prepared[0] is not ticket:
                try:
                    self._prepared = ticket, self._row(ticket)
                except Exception as error:
                    self._line.leave(ticket)
                    ticket.emit(Failed(typed(error, self._loaded.order)))
                    continue
            return self._prepared[1]
        self._prepared = None
        return None

    def _row(self, ticket: Ticket) -> Row:
        answer = Answer(self._loaded, ticket.order, ticket.emit, ticket.stopped)
        chooser = Chooser(self._loaded.model, self._defaults, answer, self._steps.device)
        chosen = ticket.order.adapters
        adapters = self._active() if chosen is None else chosen
        return Row([*answer.prompt_ids], adapters, ticket=ticket, answer=answer, chooser=chooser)

    @cached_property
    def _defaults(self) -> GenerationConfig:
        return defaults(self._loaded.model)

    def _join(self, adapters: Set, before: int) -> None:
        while (row := self._newcomer(before)) is not None and row.adapters == adapters:
            if row in self._paused:
                self._paused.remove(row)
            else:
                self._prepared = None
                if not self._line.take(row.ticket):
                    continue
                row.answer.begin()
            self._rows.append(row)

    def _may_join(self) -> bool:
        """Whether the model computes the same for many as for one, which is tried where first there are two."""
        if not self._tried:
            self._tried = True
            tried = agreed(self._loaded.model, self._steps, self._slabs.extents)
            self._slabs.extents, self._most = (tried, self._most) if tried else (self._slabs.extents, 1)
        return self._most > 1

    def _dismiss(self) -> None:
        """Let those go who no longer want an answer."""
        for ticket in self._line.gone():
            ticket.emit(Done("cancelled", 0, 0, 0.0, 0.0))
        for row in self._under_way():
            if row.answer.stopped.is_set():
                self._remove(row)
                row.answer.end(self._held)

    def _under_way(self) -> list[Row]:
        return [*self._rows, *self._paused]

    def _remove(self, row: Row) -> None:
        rows = self._rows if row in self._rows else self._paused
        rows.remove(row)
        self._slabs.remove(row)
        row.forget()
        self._slabs.bound = self._slabs.extents.room  # see _move: there is more memory again

    def _fail(self, rows: list[Row], error: Exception) -> None:
        told = typed(error, self._loaded.order)
        for row in rows:
            self._remove(row)
            row.answer.fail(told)

    def _refuse_prepared(self, adapters: Set, error: Exception) -> None:
        """The newcomer for whom the set was to act."""
        if self._prepared is not None and self._prepared[1].adapters == adapters:
            ticket, _ = self._prepared
            self._prepared = None
            self._line.leave(ticket)
            ticket.emit(Failed(typed(error, self._loaded.order)))

    # --- memory ---

    def _demand(self) -> int:
        """The slots that all under way take together."""
        return sum(self._slabs.need(len(row.ids)) for row in self._rows)

    def _make_room(self, adapters: Set) -> None:
        """Where answers have outgrown the room for all, the youngest step back; where slabs are full, rows move."""
        while len(self._rows) > 1 and self._demand() + self._moving(adapters) > self._slabs.bound:
            self._step_back()
        if len(self._rows) == 1 and self._rows[0].slab is not None:
            self._move(self._rows[0], lambda row: self._steps.set_apart(row, self._slabs))
        for row in self._outgrown(adapters):
            if row in self._rows:
                self._move(row, self._slabs.grow)
        for row in [row for row in self._rows if row.slab is None]:
            if not row.reading and sum(not other.reading for other in self._rows) > 1:
                self._move(row, self._slabs.add)

    def _step_back(self, row: Row | None = None) -> None:
        """The row, or the youngest, leaves its place to the others, and is read again where there is room."""
        row = row or self._rows[-1]
        self._rows.remove(row)
        self._slabs.remove(row)
        row.forget()
        self._paused.insert(0, row)

    def _move(self, row: Row, how: Callable[[Row], None]) -> None:
        """Move a row. Where there is less memory than was thought, it is read again and the youngest steps back, until
        somebody's answer ends."""
        try:
            how(row)
            return
        except Exception as error:
            if isinstance(typed(error, self._loaded.order), OutOfMemory):
                self._slabs.remove(row)  # the move may have ended halfway
                row.forget()
                self._leave_room()
            else:
                self._fail([row], error)
        release()  # only here is the traceback gone, which held tensors

    def _leave_room(self, row: Row | None = None) -> None:
        """Where others are under way, the row, or the youngest, steps back until somebody's answer ends."""
        if len(self._rows) > 1:
            self._slabs.bound = min(self._slabs.bound, self._demand() - 1)
            self._step_back(row)
        log.warning("%s: memory is short, %d answers wait", self._loaded.order.name, len(self._paused))

    def _outgrown(self, adapters: Set) -> list[Row]:
        """Those of this set whose slab has no room for the token that comes."""
        rows = [row for row in self._rows if row.adapters == adapters]
        return [row for row in rows if row.slab is not None and row.read >= row.slab.capacity]

    def _moving(self, adapters: Set) -> int:
        """The slots that are held twice while one row moves to a larger slab."""
        full = [row.slab.capacity for row in self._outgrown(adapters) if row.slab is not None]
        return self._slabs.extents.slots(max(full, default=0))

    # --- the model's work ---

    def _read(self, adapters: Set) -> None:
        """Go on with prompts. One that fails fails alone."""
        left = READ_TOKENS if any(not row.reading for row in self._rows) else self._read_at_once
        for row in [row for row in self._rows if row.reading and row.adapters == adapters]:
            tokens, left = min(left, len(row.ids) - row.read), left - len(row.ids) + row.read
            scores = self._tried_with([row], partial(self._steps.read, row, tokens))
            if scores is not None:
                self._choose([row], scores)
            if left <= 0:
                return

    def _step(self, adapters: Set) -> bool:
        """One token for everybody with these LoRAs who decodes; whether there was anybody."""
        self._make_room(adapters)
        rows = [row for row in self._rows if row.adapters == adapters and not row.reading]
        if not rows:
            return False
        if rows[0].slab is None:
            scores = self._tried_with(rows, partial(self._steps.alone, rows[0]))
        else:
            slabs = self._slabs.with_adapters(adapters)
            rows = [row for slab in slabs for row in slab.rows if isinstance(row, Row)]
            scores = self._tried_with(rows, lambda: self._steps.together(slabs)[1])
        if scores is not None:
            self._choose(rows, scores)
        return True

    def _tried_with(self, rows: list[Row], call: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """What a call of the model gives for these rows; None too where it fails, which they are told.

        Where memory is too short for it beside others, the youngest of them steps back instead.
        """
        try:
            return call()
        except Exception as error:
            if len(self._rows) > 1 and isinstance(typed(error, self._loaded.order), OutOfMemory):
                self._leave_room(max(rows, key=self._rows.index))
            else:
                self._fail(rows, error)
        release()  # only here is the traceback gone, which held the step's tensors
        return None

    def _choose(self, rows: list[Row], scores: torch.Tensor) -> None:
        """Give each row its next token. ``scores``: rows × vocabulary."""
        own = sum(self._slabs.extents.slots(row.read) for row in self._rows if row.slab is None)
        self._held = max(self._held, self._slabs.slots + own)
        best = likeliest(scores, wanted=any(row.chooser.plain for row in rows))
        for index, row in enumerate(rows):
            if best[index] < 0:
                self._fail([row], no_numbers(self._loaded.order.name))
                continue
            try:
                token = best[index] if row.chooser.plain else row.chooser(scores[index : index + 1])
                row.ids.append(token)
                if row.answer.take(token):
                    self._remove(row)
                    row.answer.end(self._held)
            except Exception as error:
                self._fail([row], error)
