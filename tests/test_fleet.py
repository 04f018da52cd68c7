"""Several models at once: which is shown, which ends to make room, which idles too long; none that is in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from modules.errors import Busy, ModelNotFound, NothingLoaded
from modules.supervisor import NEVER, State
from modules.supervisor.slot import Slot
from tests.fleets import Ships, fleets
from tests.supervised import order, prompt, text_of, until


@pytest.fixture
def two() -> Iterator[Ships]:
    """A fleet that holds two models at most."""
    with fleets(most=2) as ships:
        yield ships


def test_one_alone_is_replaced_as_ever() -> None:
    with fleets() as ships:
        ships.load("first")
        ships.load("second")
        assert ships.names() == ["second"]
        until(lambda: len(ships.pids()) == 1, "the end of the first")


def test_two_answer_at_once_and_the_last_one_loaded_is_shown(two: Ships) -> None:
    two.load("first")
    two.load("second")
    assert two.names() == ["second", "first"]
    for name in ("first", "second"):
        use = two.fleet.use(name)
        assert use is not None
        with use:
            assert text_of(use.supervisor.generate(prompt("2"))) == "1 2 "
    two.fleet.to_front("first")
    assert two.names() == ["first", "second"]
    with pytest.raises(ModelNotFound):
        two.fleet.to_front("third")


def test_the_one_used_least_recently_makes_room(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.fleet.need("first").release()
    assert [loaded.order.name for loaded in two.fleet.endable(by_hand=True)] == ["second", "first"]
    two.load("third")
    two.until_names("first", "third")


def test_the_plan_says_who_ends_first(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.load("third", beside=False, ends=("first", "second"))
    assert two.names() == ["third"]
    until(lambda: len(two.pids()) == 1, "the end of both")


def test_the_same_model_again_keeps_its_place(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.load("first", beside=False, ends=("first",))
    assert two.names() == ["first", "second"]


def test_a_failed_load_brings_back_what_made_room(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.load("fail third", beside=False, ends=("first",))
    assert sorted(two.names()) == ["first", "second"]
    assert two.fleet.front.snapshot().state is State.FAILED


def test_a_failed_load_brings_back_all_that_made_room() -> None:
    with fleets(most=3) as ships:
        for name in ("first", "second", "third"):
            ships.load(name)
        ships.load("fail fourth", beside=False, ends=("first", "second", "third"))
        ships.until_names("first", "second", "third")
        assert ships.fleet.front.snapshot().state is State.FAILED  # the page says what failed
        ships.load("fourth", beside=False, ends=("first", "second"))
        ships.until_names("third", "fourth")


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("before", ["", "first"])
def test_a_second_load_is_refused_while_one_is_under_way(most: int, before: str) -> None:
    with fleets(most=most) as ships:
        if before:
            ships.load(before)
        ships.fleet.load(order("slow second"), beside=True)
        with pytest.raises(Busy, match="is loading slow second"):
            ships.fleet.load(order("third"), beside=True)
        ships.fleet.front.cancel()
        assert ships.names() == ([before] if before else [])


def test_unloading_the_shown_one_shows_the_other(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.fleet.unload()
    assert two.names() == ["first"]
    two.fleet.unload("first")
    assert two.names() == []
    with pytest.raises(NothingLoaded):
        two.fleet.need()
    with pytest.raises(ModelNotFound):
        two.fleet.unload("first")
    two.load("third")
    assert two.names() == ["third"]


def test_a_pin_keeps_it_and_ends_with_the_model(two: Ships) -> None:
    two.load("first")
    two.load("second")
    two.fleet.pin("first", True)
    assert [loaded.order.name for loaded in two.fleet.endable(by_hand=False)] == ["second"]
    assert [place.name for place in two.fleet.places() if place.pinned] == ["first"]
    two.load("third", beside=False, ends=("first",))  # a person's, who may
    assert not any(place.pinned for place in two.fleet.places())


def test_what_idles_ends_and_what_is_pinned_or_in_use_does_not() -> None:
    with fleets(most=3, idle_s=0.3) as ships:
        ships.fleet.start()
        for name in ("idle", "pinned", "used"):
            ships.load(name)
            if name == "pinned":
                ships.fleet.pin(name, True)
        held = ships.fleet.use("used")
        assert held is not None
        ships.until_names("pinned", "used")
        answer = held.supervisor.generate(prompt("200"))  # a second
        assert text_of(answer).endswith(" 200 ")
        assert sorted(ships.names()) == ["pinned", "used"]
        held.release()
        held.release()
        ships.until_names("pinned")
        ships.fleet.pin("pinned", False)
        ships.until_names()


def test_a_look_that_fails_does_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[Slot] = []
    ends_at = Slot.ends_at

    def fails_once(slot: Slot, idle_s: float) -> float:
        if threading.current_thread().name == "idle-models" and not looked:
            looked.append(slot)
            raise RuntimeError("Set changed size during iteration")
        return ends_at(slot, idle_s)

    with fleets(idle_s=0.3) as ships:
        ships.load("idle")
        monkeypatch.setattr(Slot, "ends_at", fails_once)
        ships.fleet.start()
        ships.until_names()
    assert "looking for idle models failed" in caplog.text
    assert "RuntimeError" in caplog.text


def test_a_request_says_how_long_its_model_stays() -> None:
    with fleets(most=2, idle_s=0.3) as ships:
        ships.load("forever")
        ships.load("never")
        ships.fleet.need("forever", NEVER).release()
        ships.fleet.need("never", 0.0).release()
        ships.until_names("forever")
        (place,) = ships.fleet.places()
        assert (place.name, place.ends_in_s) == ("forever", None)
        ships.fleet.need("forever", 0.0).release()
        ships.until_names()
        ships.load("forever")  # it begins anew
        assert ships.fleet.places()[0].ends_in_s == pytest.approx(0.3, abs=0.3)


def test_how_long_a_model_stays_is_what_the_last_use_said() -> None:
    with fleets(idle_s=600) as ships:
        ships.load("first")
        for keep_alive_s, ends_in_s in ((None, 600), (NEVER, None), (None, 600), (60, 60)):
            ships.fleet.need("first", keep_alive_s).release()
            (place,) = ships.fleet.places()
            assert (None if place.ends_in_s is None else round(place.ends_in_s, -1)) == ends_in_s


def test_what_ended_because_nobody_used_it_is_told_until_the_next_load() -> None:
    with fleets(idle_s=0.2) as ships:
        ships.load("first")
        ships.fleet.unload()
        assert ships.fleet.front.snapshot().idled == ""
        ships.load("second")
        ships.fleet.start()
        until(lambda: ships.fleet.front.snapshot().state is State.EMPTY, "the end of what idles")
        snapshot = ships.fleet.front.snapshot()
        assert (snapshot.idled, snapshot.last and snapshot.last.name) == ("second", "second")
        ships.fleet.front.reload()
        assert ships.fleet.front.snapshot().idled == ""


def test_what_makes_room_has_not_idled(two: Ships) -> None:
    two.load("first")
    first = two.fleet.front
    two.load("second")
    two.load("third", beside=False, ends=("first", "second"))
    assert first.snapshot().idled == ""


def test_the_last_model_that_idles_stays_the_one_that_is_told_of_in_whatever_place_it_was() -> None:
    with fleets(most=2, idle_s=1.0) as ships:
        ships.load("first")
        ships.load("second")
        ships.fleet.unload("first")
        ships.fleet.start()
        until(lambda: not ships.names(), "the end of what idles")
        until(lambda: ships.fleet.front.snapshot().state is State.EMPTY, "the end's end")
        assert ships.fleet.front.snapshot().idled == "second"
        place, _ = ships.fleet.choose("third", (), by_hand=False)
        assert ships.fleet.front is place.supervisor, "whoever looks sees how a load on demand goes"
        ships.load("third")
        assert ships.names() == ["third"]
