"""Perplexity as a job of the service: one at a time, cancelled, broken off, and the table of what came out."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.errors import Busy, Cancelled, LoadstoneError, NothingLoaded, RequestTooLong, UserError
from modules.service import Service
from modules.service.perplexity import FILE, KEPT, Measured, Perplexities, read_text
from tests import checkpoints, loras
from tests.services import services

TEXT = inspect.getsource(textwrap)
LONG = TEXT * 40


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With the small Llama, stretched to twice its context, and a LoRA for it, loaded."""
    home = tmp_path_factory.mktemp("home")
    loras.untrained(home / "loras" / "odd", checkpoints.llama())
    with services(home, checkpoints.llama()) as make:
        made = make(("--cpu", "--alpha_value", "2.5", "--lora", "odd:0.5"))
        with pytest.raises(NothingLoaded):
            made.perplexity.start(TEXT, "wrap")
        made.load("demo")
        assert made.supervisor.wait_loaded(120).loaded is not None, made.snapshot().error
        yield made


def until_it_works(job: Perplexities) -> None:
    state = job.state()
    while state.running and not (state.progress and state.progress.done):
        state = job.wait(state.version, 60)
    assert state.running


def test_a_result_says_what_was_measured_and_is_kept(service: Service, tmp_path: Path) -> None:
    job = service.perplexity
    job.start(TEXT, "wrap", window=400, stride=200, most=900)
    assert job.state().running
    state = job.wait_over(120)
    assert state.error is None
    assert state.result == job.results()[0]
    row = job.results()[0]
    assert (row.model, row.text, row.tokens, row.window_tokens, row.stride_tokens) == ("demo", "wrap", 899, 400, 200)
    assert (row.alpha, row.loras) == (2.5, ("odd:0.5",))
    assert row.options == {"alpha_value": 2.5, "cpu": True}
    assert 1 < row.perplexity < math.inf
    assert Perplexities(service.fleet.need, tmp_path).results() == []
    again = Perplexities(service.fleet.need, service.library.roots[0] / ".cache")
    assert again.results() == job.results()


def test_one_at_a_time_and_a_cancelled_one_leaves_no_row(service: Service) -> None:
    job = service.perplexity
    rows = job.results()
    job.start(LONG, "long", stride=1)
    with pytest.raises(Busy):
        job.start(TEXT, "wrap")
    until_it_works(job)
    assert [place.uses for place in service.fleet.places()] == [1]  # neither age nor another model ends it
    job.cancel()
    assert [place.uses for place in service.fleet.places()] == [0]
    state = job.state()
    assert not state.running
    assert isinstance(state.error, Cancelled)
    assert job.results() == rows
    job.start(LONG, "long", stride=1)
    job.cancel()  # at once
    assert isinstance(job.state().error, Cancelled)
    job.cancel()  # nothing runs
    job.start(TEXT, "wrap", most=300)  # the model is free again
    assert job.wait_over(60).error is None


def test_what_the_worker_refuses_and_an_empty_text_are_told(service: Service) -> None:
    service.perplexity.start(TEXT, "wrap", window=100_000)
    state = service.perplexity.wait_over(60)
    assert isinstance(state.error, RequestTooLong)
    with pytest.raises(UserError, match="no text"):
        service.perplexity.start("  \n", "empty")


def test_a_model_that_is_unloaded_meanwhile_ends_it(service: Service) -> None:
    service.perplexity.start(LONG, "long", stride=1)
    until_it_works(service.perplexity)
    service.unload()
    state = service.perplexity.wait_over(60)
    assert isinstance(state.error, LoadstoneError)
    assert not state.running
    service.load("demo")
    assert service.supervisor.wait_loaded(120).loaded is not None


def row(number: int) -> Measured:
    return Measured("m", {}, (), str(number), 8, 4, 7, 2.0, 1, (None, 2.0), 0.1, float(number))


def test_the_table_keeps_the_latest_and_can_be_emptied(tmp_path: Path) -> None:
    job = Perplexities(lambda: pytest.fail("not asked"), tmp_path)
    for number in range(KEPT + 3):
        job._table.add(row(number))
    assert [one.text for one in job.results()[:2]] == [str(KEPT + 2), str(KEPT + 1)]
    assert len(job.results()) == KEPT
    before = job.state().version
    job.forget()
    assert job.results() == []
    assert job.state().version > before
    (tmp_path / FILE).write_text("{broken")
    assert job.results() == []


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "notes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"notes\.txt"):
        read_text(file)
