"""What was loaded comes back: by Reload, planned anew, and for a message where it ended because nobody used it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.errors import ModelNotFound, NothingLoaded, OutOfMemory
from modules.service import Service, Stop, awake
from modules.service.on_demand import OnDemand
from modules.supervisor import State
from modules.ui.answering import CHAT, Question, Stops, Updates, answer
from modules.ui.live import LiveAnswers
from tests.services import MACHINE, Make, services
from tests.supervised import LIMIT_S

FORM = {"ctx_size": 64}
QUESTION = Question([{"role": "user", "content": "Hello?"}], CHAT, "", {"max_new_tokens": 4}, [], "Hello?")


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    with services(tmp_path, demo_model) as made:
        yield made


@pytest.fixture
def idled(make: Make) -> Service:
    """A service whose model, loaded by hand, has ended because nobody used it."""
    service = make()
    service.load("demo", FORM)
    assert service.supervisor.wait_loaded(LIMIT_S).state is State.READY
    service.supervisor.unload(idle=True)
    return service


def on_demand(service: Service) -> Service:
    service.on_demand = OnDemand(service.fleet, service._prepare_on_demand)
    return service


def answered(service: Service, stops: Stops) -> Iterator[Updates]:
    return answer(service, stops, LiveAnswers(), "me", QUESTION)


def test_reload_keeps_the_options_and_plans_anew(idled: Service) -> None:
    idled.reload()
    loaded = idled.supervisor.wait_loaded(LIMIT_S).loaded
    assert loaded is not None
    assert loaded.order.ctx_tokens == 64
    idled.measure = lambda: dataclasses.replace(MACHINE, ram_free_bytes=2**20, ram_total_bytes=2**20)
    with pytest.raises(OutOfMemory):
        idled.reload()
    assert idled.snapshot().loaded is loaded


def test_reload_refuses_what_is_gone_and_what_never_was(make: Make, idled: Service) -> None:
    with pytest.raises(NothingLoaded):
        make().reload()
    (idled._cache_dir.parent / "demo").unlink()
    with pytest.raises(ModelNotFound):
        idled.reload()


def test_a_message_loads_what_has_idled_as_it_was(idled: Service) -> None:
    lines = [str(updates[4]) for updates in answered(on_demand(idled), Stops())]
    assert any("Loading demo …" in line for line in lines)
    assert "context" in lines[-1]
    loaded = idled.snapshot().loaded
    assert loaded is not None
    assert loaded.order.ctx_tokens == 64


def test_stop_ends_the_wait_and_the_question_goes_back(idled: Service) -> None:
    stops = Stops()
    updates = answered(on_demand(idled), stops)
    assert "Loading demo …" in str([next(updates), next(updates)][1][4])
    stops.stop("me")
    *_, last = updates
    assert (last[0], last[1]) == ([], "Hello?")
    assert "stopped" in last[4]
    assert idled.supervisor.wait_loaded(LIMIT_S).state is State.READY  # others may want it


def test_why_it_could_not_come_back_is_said(idled: Service) -> None:
    on_demand(idled).measure = lambda: dataclasses.replace(MACHINE, ram_free_bytes=2**20, ram_total_bytes=2**20)
    with pytest.raises(OutOfMemory):
        next(awake(idled, Stop()))


def test_without_on_demand_the_message_says_what_has_become_of_the_model(idled: Service) -> None:
    (updates,) = answered(idled, Stops())
    assert updates[1] == "Hello?"
    assert "demo was unloaded because nobody used it. Reload on the Model tab loads it again" in updates[4]
    assert idled.snapshot().state is State.EMPTY


def test_what_a_person_unloaded_stays_unloaded(idled: Service) -> None:
    on_demand(idled).unload()
    (updates,) = answered(idled, Stops())
    assert "No model is loaded" in updates[4]
