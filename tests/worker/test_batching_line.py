"""Who comes next, and what place those who wait are told."""

from __future__ import annotations

import random
import threading
from collections import Counter

from modules.protocol import Chunk, Waiting
from modules.worker.batching import Line, Ticket
from tests.worker.batches import order

EVER = 2**62


class Asker:
    """One ticket, and the places it was told."""

    def __init__(self, line: Line, number: int, user: str = "") -> None:
        self.places: list[int] = []
        self.stopped = threading.Event()
        self.ticket = Ticket(number, order(0, user=user), self._emit, self.stopped)
        line.add(self.ticket)

    def _emit(self, chunk: Chunk) -> None:
        assert isinstance(chunk, Waiting)
        self.places.append(chunk.place)


def taken(line: Line, before: int = EVER) -> list[int]:
    """Everybody's number, in the order in which they are taken."""
    numbers = []
    while (ticket := line.first(before)) is not None:
        line.take(ticket)
        numbers.append(ticket.number)
    return numbers


def test_one_users_come_in_the_order_in_which_they_asked() -> None:
    line = Line()
    for number in (1, 2, 3):
        Asker(line, number)
    assert taken(line) == [1, 2, 3]


def test_a_newcomer_does_not_wait_for_all_of_anothers() -> None:
    line = Line()
    for number in range(1, 61):
        Asker(line, number, "many")
    begun = []
    for _ in range(20):
        ticket = line.first(EVER)
        assert ticket is not None
        line.take(ticket)
        begun.append(ticket.number)
    Asker(line, 61, "one")
    Asker(line, 62, "other")
    assert taken(line)[:4] in ([61, 62, 21, 22], [21, 61, 62, 22])


def test_nobody_waits_for_more_than_a_turn_of_each_user_for_each_of_their_own() -> None:
    chance = random.Random(3)
    line = Line()
    own: Counter[str] = Counter()  # of each user, in the line
    bounds: dict[int, int] = {}  # by number: at how many takes it has been taken at the latest
    takes = 0
    for number in range(1, 401):
        user = chance.choice("abc")
        own[user] += 1
        bounds[number] = takes + 3 * (own[user] + 1)
        Asker(line, number, user)
        while number == 400 or chance.random() < 0.4:
            ticket = line.first(EVER)
            if ticket is None:
                break
            line.take(ticket)
            own[ticket.user] -= 1
            takes += 1
            assert takes <= bounds.pop(ticket.number)
    assert not bounds


def test_what_was_asked_after_a_job_waits_for_it() -> None:
    line = Line()
    for number in (1, 4, 2):
        Asker(line, number)
    assert taken(line, before=3) == [1, 2]
    assert taken(line) == [4]


def test_each_is_told_a_place_when_it_changes() -> None:
    line = Line()
    askers = [Asker(line, number, user) for number, user in enumerate("aaab", 1)]
    line.tell()
    line.tell()
    assert [asker.places for asker in askers] == [[1], [3], [4], [2]]
    line.take(askers[0].ticket)
    line.leave(askers[3].ticket)
    line.leave(askers[3].ticket)
    line.tell()
    assert [asker.places for asker in askers] == [[1], [3, 1], [4, 2], [2]]


def test_while_one_answer_holds_the_model_newcomers_are_told_at_once() -> None:
    line = Line()
    with line.held():
        first, second = Asker(line, 1), Asker(line, 2)
        assert (first.places, second.places) == ([1], [2])
        line.leave(first.ticket)
        assert second.places == [2, 1]
    assert Asker(line, 3).places == []


def test_those_who_give_up_are_handed_out_once() -> None:
    line = Line()
    gone, stays = Asker(line, 1), Asker(line, 2)
    gone.stopped.set()
    assert line.gone() == [gone.ticket]
    assert line.gone() == []
    assert line.first(EVER) is stays.ticket


def test_who_has_left_is_not_taken() -> None:
    line = Line()
    gone, stays = Asker(line, 1), Asker(line, 2)
    found = line.first(EVER)
    line.leave(gone.ticket)
    assert found is gone.ticket
    assert not line.take(gone.ticket)
    assert line.take(stays.ticket)
