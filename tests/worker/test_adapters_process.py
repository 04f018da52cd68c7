"""LoRAs in a real worker process, asked for as the supervisor does it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from pathlib import Path

import pytest

from modules.errors import AdapterNotFound, Busy, NothingLoaded, error_from_dict
from modules.options import GenerationOptions
from modules.protocol import (
    ADAPTERS,
    LOAD,
    AdapterChoice,
    AdaptersOrder,
    AdaptersReport,
    Done,
    Failed,
    GenerateOrder,
    Hello,
    LoadOrder,
    Piece,
    decode,
)
from tests import loras
from tests.conftest import StartWorker, WorkerProcess

Choices = tuple[AdapterChoice, ...]
GONE = (AdapterChoice("gone", "/nowhere/gone"),)


@pytest.fixture(scope="module")
def herring(demo_model: Path) -> Choices:
    return (loras.choice(loras.herring()),)


@pytest.fixture(scope="module")
def lantern(demo_model: Path) -> Choices:
    return (loras.choice(loras.lantern()),)


def asking(adapters: Choices | None = None, max_new_tokens: int = 16) -> GenerateOrder:
    options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=0)
    return GenerateOrder(options, messages=({"role": "user", "content": loras.QUESTION},), adapters=adapters)


def applied(worker: WorkerProcess, adapters: Choices) -> AdaptersReport:
    answer = worker.post(ADAPTERS, AdaptersOrder(adapters))
    assert answer.status_code == 200, answer.text
    report = decode(answer.content)
    assert isinstance(report, AdaptersReport)
    return report


def text(worker: WorkerProcess, adapters: Choices | None = None) -> str:
    return worker.generate(asking(adapters))[0]


def test_before_a_load_there_is_nothing_to_apply_to(start_worker: StartWorker) -> None:
    worker = start_worker(Hello("quiet", imports=False))
    answer = worker.post(ADAPTERS, AdaptersOrder())
    assert isinstance(error_from_dict(answer.json()), NothingLoaded)


def test_a_set_is_applied_used_and_removed(demo_worker: WorkerProcess, herring: Choices) -> None:
    base = text(demo_worker)
    report = applied(demo_worker, herring)
    assert report.adapters == herring
    assert report.moved_nats is not None
    assert report.moved_nats > 1
    assert text(demo_worker).startswith("The herring barrels")
    assert applied(demo_worker, ()).moved_nats is None
    assert text(demo_worker) == base


def test_requests_in_flight_at_once_each_get_their_own_set(
    demo_worker: WorkerProcess, herring: Choices, lantern: Choices
) -> None:
    base = text(demo_worker)
    applied(demo_worker, lantern)
    wanted: list[Choices | None] = [herring, (), None, herring, lantern, ()]
    got: dict[int, str] = {}

    def ask(index: int) -> None:
        got[index] = text(demo_worker, wanted[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    applied(demo_worker, ())
    for index, choices in enumerate(wanted):
        active = lantern if choices is None else choices
        assert got[index].startswith({herring: "The herring", lantern: "Seven copper", (): base}[active])


def test_an_answer_with_a_set_that_cannot_be_used_fails_alone(demo_worker: WorkerProcess) -> None:
    base = text(demo_worker)
    _, last = demo_worker.generate(asking(GONE))
    assert isinstance(last, Failed)
    assert isinstance(last.error, AdapterNotFound)
    assert text(demo_worker) == base


def test_applying_waits_for_the_answer_under_way_but_not_for_ever(demo_worker: WorkerProcess, herring: Choices) -> None:
    long = asking((), max_new_tokens=1500)
    long = dataclasses.replace(long, options=dataclasses.replace(long.options, temperature=1.0, seed=1))
    long = dataclasses.replace(long, messages=({"role": "user", "content": "Count upwards, and never stop."},))
    with demo_worker.generating(long) as stream:
        assert isinstance(next(stream), Piece)
        refused = demo_worker.post(ADAPTERS, AdaptersOrder(herring, wait_s=0.2))
        assert refused.status_code == Busy.status
        assert isinstance(error_from_dict(refused.json()), Busy)
        assert isinstance(next(stream), Piece)  # it was not disturbed
        waiting: list[AdaptersReport] = []
        thread = threading.Thread(target=lambda: waiting.append(applied(demo_worker, herring)))
        thread.start()
        list(itertools.islice(stream, 3))
        assert not waiting
    thread.join(30)
    assert waiting[0].adapters == herring
    applied(demo_worker, ())


def test_a_load_comes_ready_with_its_loras_or_fails(
    start_worker: StartWorker, demo_order: LoadOrder, herring: Choices, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(loras.herring(), tmp_path / "copy"))
    order = dataclasses.replace(demo_order, adapters=(loras.choice(copy, 0.9),))
    worker = start_worker()
    ready = worker.load(order)
    assert ready.adapters is not None
    assert ready.adapters.adapters == order.adapters
    assert text(worker).startswith("The herring barrels")
    shutil.rmtree(copy)
    another = start_worker()
    another.post(LOAD, order)
    assert isinstance(another.wait_for(Failed).error, AdapterNotFound)


def test_an_answer_ends_as_it_does_without_loras(demo_worker: WorkerProcess, herring: Choices) -> None:
    _, last = demo_worker.generate(asking(herring, max_new_tokens=40))
    assert isinstance(last, Done)
    assert last.finish_reason == "stop"  # it has learned to say its sentence, and no more
