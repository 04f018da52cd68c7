"""The order of jobs and turns on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable

from modules.worker.engine import Engine


class Answers:
    """Numbered answers, all under way together; each turn takes one piece of every one that may go on."""

    def __init__(self, said: list[str]) -> None:
        self.left: dict[int, int] = {}  # pieces, by number
        self._said = said

    def turn(self, before: Callable[[], int]) -> bool:
        going = [number for number, left in self.left.items() if left and number < before()]
        for number in going:
            self.left[number] -= 1
        self._said += ["turn"] if going else []
        return bool(going)


class Desk:
    """An engine that is worked off on the test's own thread; ``said``: what was done, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.engine = Engine()
        self.answers = Answers(self.said)
        self.engine.take_turns(self.answers)

    def ask(self, pieces: int) -> int:
        number = self.engine.number()
        self.answers.left[number] = pieces
        self.engine.wake()
        return number

    def once(self, times: int = 1) -> list[str]:
        for _ in range(times):
            self.engine._once()
        return self.said


def test_a_short_job_comes_between_two_turns_and_holds_up_no_answer() -> None:
    desk = Desk()
    desk.ask(5)
    desk.once()
    for name in ("one", "two"):
        desk.engine.slip_in(desk.said.append, name)
    late = desk.ask(1)
    desk.once()
    assert desk.answers.left[late] == 0  # it joined, though it was asked for after the jobs
    assert desk.once(3) == ["turn", "turn", "one", "turn", "two", "turn", "turn"]


def test_one_that_comes_again_and_again_leaves_each_turn_its_place() -> None:
    desk = Desk()

    def again() -> None:
        desk.said.append("short")
        desk.engine.slip_in(again)

    desk.ask(3)
    desk.engine.slip_in(again)
    assert desk.once(4) == ["turn", "short"] * 3 + ["short"]


def test_a_job_of_its_own_waits_for_what_came_before_it_and_what_comes_later_waits_for_it() -> None:
    desk = Desk()
    desk.ask(2)
    desk.engine.slip_in(desk.said.append, "earlier")
    desk.engine.submit(desk.said.append, "alone")
    desk.ask(1)
    desk.engine.slip_in(desk.said.append, "later")
    assert desk.once(4) == ["turn", "earlier", "turn", "alone", "turn", "later"]


def test_a_job_that_is_cancelled_holds_up_no_short_one() -> None:
    desk = Desk()
    desk.ask(3)
    job = desk.engine.submit(desk.said.append, "alone")
    done = desk.engine.slip_in(desk.said.append, "later")
    desk.once()
    assert not done.done()
    assert job.cancel()
    assert desk.once() == ["turn", "turn", "later"]
