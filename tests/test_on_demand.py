"""Requests that wait for a model: each gets it after one load, or why not; nobody's answer is cut for another's."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_all

import pytest

from modules.errors import Cancelled, ModelNotFound, NoPlace, OutOfMemory, Overloaded
from modules.service.on_demand import OnDemand, Prepared
from modules.supervisor import Use
from tests.fleets import Ships, fleets
from tests.supervised import LIMIT_S, order, prompt, text_of, until


class Loads:
    """Prepares what is asked for as if memory had room, and counts how often each is asked for."""

    def __init__(self, ends: tuple[str, ...] = ()) -> None:
        self.prepared: list[str] = []
        self.ends = ends

    def __call__(self, name: str) -> Prepared:
        self.prepared.append(name)
        if "unknown" in name:
            raise ModelNotFound(f"There is no {name}.")
        return Prepared(order(name), beside=not self.ends, ends=self.ends)


def got(future: Future[Use]) -> Use:
    return future.result(LIMIT_S)


def waiting(demand: OnDemand, count: int) -> None:
    until(lambda: demand.waiting == count, f"{count} waiting")


def pids_of(ships: Ships, futures: list[Future[Use]]) -> set[int]:
    """The processes that answer those who got a hold."""
    found = set()
    for future in futures:
        memory = got(future).supervisor.memory()
        assert memory is not None
        found.add(memory.rss_bytes)  # the fake worker's own number
    assert found <= ships.pids()
    return found


def released(futures: list[Future[Use]]) -> None:
    """Each gives its hold back as soon as it has it; returns when all have had one."""
    for future in futures:
        future.add_done_callback(lambda done: done.result().release())
    assert not wait_for_all(futures, LIMIT_S).not_done


def test_all_who_wait_get_the_model_after_one_load() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        futures = [demand.ask("steps=10 wanted") for _ in range(20)]
        wait_for_all(futures, LIMIT_S)
        assert len(pids_of(ships, futures)) == 1
        (place,) = ships.fleet.places()
        assert (place.name, place.uses, demand.waiting) == ("steps=10 wanted", 20, 0)
        for future in futures:
            assert text_of(got(future).supervisor.generate(prompt("2"))) == "1 2 "
            got(future).release()
        assert ships.fleet.places()[0].uses == 0
        assert demand.ask("steps=10 wanted").done()  # at once: it is there


def test_a_failed_load_on_demand_brings_back_all_that_made_room() -> None:
    with fleets(most=3) as ships:
        for name in ("first", "second"):
            ships.load(name)
        demand = OnDemand(ships.fleet, Loads(ends=("first", "second")))
        assert demand.ask("fail wanted").exception(LIMIT_S) is not None
        ships.until_names("first", "second")


def test_all_who_wait_are_told_why_the_load_failed() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        errors = [demand.ask("steps=10 fail wanted").exception(LIMIT_S) for _ in range(3)]
        futures = [demand.ask("steps=10 fail again") for _ in range(3)]
        errors += [future.exception(LIMIT_S) for future in futures]
        assert all(isinstance(error, OutOfMemory) and "fake GPU" in error.message for error in errors)
        assert len({id(error) for error in errors}) == 6
        with pytest.raises(ModelNotFound):
            demand.ask("unknown").result(LIMIT_S)
        assert demand.waiting == 0


def test_an_answer_under_way_is_never_cut_for_another_model() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        first = got(demand.ask("first"))
        answer = first.supervisor.generate(prompt("150"))
        next(answer)
        second = demand.ask("second")
        until(lambda: ships.fleet.places()[0].closing, "the first making room")
        later = demand.ask("first")  # behind the second: it would keep the place for ever
        assert text_of(answer).endswith(" 150 ")
        assert not second.done()
        first.release()
        got(second).release()
        assert got(later).name == "first"
        assert text_of(got(later).supervisor.generate(prompt("2"))) == "1 2 "


def test_the_one_used_least_recently_ends_and_pinned_and_used_ones_stay() -> None:
    with fleets(most=3) as ships:
        demand = OnDemand(ships.fleet, Loads())
        held = got(demand.ask("held"))
        for name in ("pinned", "old"):
            got(demand.ask(name)).release()
        ships.fleet.pin("pinned", True)
        got(demand.ask("new")).release()
        ships.until_names("held", "pinned", "new")
        got(demand.ask("newer")).release()
        ships.until_names("held", "pinned", "newer")
        assert text_of(held.supervisor.generate(prompt("2"))) == "1 2 "


def test_with_all_places_pinned_there_is_none() -> None:
    with fleets(most=2) as ships:
        demand = OnDemand(ships.fleet, Loads())
        for name in ("one", "two"):
            got(demand.ask(name)).release()
            ships.fleet.pin(name, True)
        with pytest.raises(NoPlace, match="2 at most"):
            demand.ask("three").result(LIMIT_S)
        ships.until_names("one", "two")


def test_where_memory_lacks_those_named_by_the_plan_end_first() -> None:
    with fleets(most=3) as ships:
        loads = Loads()
        demand = OnDemand(ships.fleet, loads)
        for name in ("one", "two"):
            got(demand.ask(name)).release()
        loads.ends = ("one", "two")
        got(demand.ask("large")).release()
        assert ships.names() == ["large"]


def test_who_gives_up_holds_nothing_and_keeps_nobody_waiting() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        first = got(demand.ask("first"))
        given_up = demand.ask("given up")
        waiting(demand, 1)
        assert given_up.cancel()
        waiting(demand, 0)
        again = got(demand.ask("first"))
        first.release()
        again.release()
        assert ships.names() == ["first"]
        assert ships.fleet.places()[0].uses == 0


def test_a_persons_load_goes_first_and_serves_those_who_wait_for_it() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        ships.fleet.load(order("steps=20 by hand"), beside=True)
        future = demand.ask("steps=20 by hand")
        assert got(future).name == "steps=20 by hand"
        assert len(pids_of(ships, [future])) == 1


def test_waiting_has_a_bound_and_ends_with_the_server() -> None:
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads(), most_waiting=2)
        futures = [demand.ask("hang", user=user) for user in "ab"]
        with pytest.raises(Overloaded):
            demand.ask("hang", user="c")
        until(lambda: ships.fleet.loading() is not None, "the load")
        threading.Thread(target=ships.fleet.close).start()
        assert all(isinstance(future.exception(LIMIT_S), Cancelled) for future in futures)


def test_one_user_leaves_places_to_the_others() -> None:
    """Half of those that the others leave are one user's at most."""
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads(), most_waiting=8)
        for _ in range(4):
            demand.ask("hang", user="ann")
        with pytest.raises(Overloaded, match="no more than 4 may be yours"):
            demand.ask("hang", user="ann")
        demand.ask("hang", user="bob")
        with pytest.raises(Overloaded, match="no more than 3 may be yours"):
            demand.ask("hang", user="ann")


def test_users_who_wait_for_models_take_turns() -> None:
    with fleets() as ships:
        loads = Loads()
        demand = OnDemand(ships.fleet, loads)
        first = got(demand.ask("first"))
        asked = {name: demand.ask(name, user="ann") for name in ("a1", "a2", "a3")}
        asked |= {name: demand.ask(name, user="bob") for name in ("b1", "b2")}
        first.release()
        released(list(asked.values()))
        assert list(dict.fromkeys(loads.prepared)) == ["first", "a1", "b1", "a2", "b2", "a3"]


def test_who_comes_later_waits_for_one_turn_of_each_and_has_no_more_turns_than_they() -> None:
    with fleets() as ships:
        loads = Loads()
        demand = OnDemand(ships.fleet, loads)
        asked = [demand.ask(name, user="ann") for name in ("a1", "a2", "a3", "a4")]
        use = got(asked[0])
        until(lambda: "a2" in loads.prepared, "the turn of a2")
        asked += [demand.ask(name, user="bob") for name in ("b1", "b2")]
        use.release()
        released(asked[1:])
        assert list(dict.fromkeys(loads.prepared)) == ["a1", "a2", "b1", "a3", "b2", "a4"]


def test_a_persons_load_does_not_wait_for_answers_that_a_request_waits_for() -> None:
    """ "second" waits for the end of an answer of "first"; a person wants "third" now, and "second" comes later."""
    with fleets() as ships:
        demand = OnDemand(ships.fleet, Loads())
        answering = got(demand.ask("first"))
        future = demand.ask("second", user="ann")
        until(lambda: ships.fleet.places()[0].closing, "the wait for the answer's end")
        ships.fleet.load(order("third"), beside=True).wait_loaded(LIMIT_S)
        assert ships.names() == ["third"]
        answering.release()
        got(future).release()
        assert ships.names() == ["second"]
