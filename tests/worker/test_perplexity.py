"""Perplexity by the worker, against a computation by transformers alone."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modules.errors import LoadstoneError, OptionError, RequestTooLong, UnsupportedModel, UserError, error_from_dict
from modules.options import GenerationOptions
from modules.perplexity import PERPLEXITY, Perplexity, PerplexityOrder
from modules.protocol import (
    Done,
    Failed,
    GenerateOrder,
    Progress,
    decode,
    encode,
)
from modules.worker import perplexity, transformers_loader
from tests import checkpoints, loras
from tests.conftest import StartWorker, WorkerProcess

TEXT = inspect.getsource(textwrap)
WINDOW, STRIDE, MOST = 200, 80, 700


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """To load the small Llama in float32, with a context of 256 tokens."""
    return checkpoints.order_for(checkpoints.llama(), tmp_path_factory.mktemp("work"), cpu=True)


@pytest.fixture(scope="module")
def loaded(order: Any) -> Any:
    return transformers_loader.load(order, lambda _: None)


@pytest.fixture(scope="module")
def worker(start_shared_worker: StartWorker, order: Any) -> Iterator[WorkerProcess]:
    worker = start_shared_worker()
    worker.load(order)
    yield worker
    worker.end()


def measured(loaded: Any, order: PerplexityOrder) -> Perplexity:
    measurement = perplexity.Measurement(loaded, order)
    while not measurement.over:
        measurement.window(lambda _: None, threading.Event())
    return measurement.result()


def reference(loaded: Any, window: int, stride: int, most: int) -> tuple[float, int]:
    """The perplexity, and how many tokens it is of: whole windows in one go, no cache, labels where they are new."""
    import torch

    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids[:, :most]
    total, count, known = 0.0, 0, 1
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        with torch.no_grad():
            scores = loaded.model(ids[:, begin:end], use_cache=False).logits[0].float().log_softmax(-1)
        for place in range(max(known, begin + 1), end):
            total -= float(scores[place - 1 - begin, ids[0, place]])
            count += 1
        known = end
        if end == ids.shape[1]:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(WINDOW, STRIDE), (256, 256), (64, 1)])
def test_it_equals_a_computation_without_pieces_and_cache(
    loaded: Any, window: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "PIECE_TOKENS", 48)  # several a window, that end in the middle of new tokens
    most = MOST if stride > 1 else 90
    expected, tokens = reference(loaded, window, stride, most)
    found = measured(loaded, PerplexityOrder(TEXT, window, stride, most))
    assert found.tokens == tokens
    assert tokens == most - 1 or stride == window  # then nothing predicts the first of a window
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.windows == math.ceil((most - window) / stride) + 1


def test_places_in_the_window_together_make_the_whole(loaded: Any) -> None:
    found = measured(loaded, PerplexityOrder(TEXT, window_tokens=256, stride_tokens=256, most_tokens=256))
    assert len(found.stretches) == perplexity.STRETCHES
    sizes = [min(found.stretch_tokens, 255 - found.stretch_tokens * place) for place in range(perplexity.STRETCHES)]
    logs = [math.log(value) for value in found.stretches if value is not None]
    assert math.exp(sum(size * log for size, log in zip(sizes, logs, strict=True)) / 255) == pytest.approx(
        found.perplexity, rel=1e-6
    )


def test_without_a_window_it_is_the_loaded_context_and_a_short_text_is_one_window(loaded: Any) -> None:
    assert measured(loaded, PerplexityOrder(TEXT, most_tokens=600)).window_tokens == 256
    short = measured(loaded, PerplexityOrder("def main():"))
    assert short.windows == 1
    assert short.tokens == len(loaded.tokenizer("def main():").input_ids) - 1


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (PerplexityOrder(""), UserError),
        (PerplexityOrder(TEXT, window_tokens=257), RequestTooLong),
        (PerplexityOrder(TEXT, window_tokens=64, stride_tokens=65), OptionError),
        (PerplexityOrder(TEXT, window_tokens=1), OptionError),
    ],
)
def test_what_cannot_be_measured_is_refused(loaded: Any, asked: PerplexityOrder, error: type[LoadstoneError]) -> None:
    with pytest.raises(error):
        perplexity.Measurement(loaded, asked)


def test_a_token_that_the_model_has_not_is_refused(loaded: Any) -> None:
    """On a GPU looking it up would end the process's use of it."""

    def tokenize(text: str, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=[1, 10**6])

    with pytest.raises(OptionError, match="1000000"):
        perplexity.Measurement(dataclasses.replace(loaded, tokenizer=tokenize), PerplexityOrder(TEXT))


def test_a_model_that_translates_has_none(loaded: Any) -> None:
    other = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, task="seq2seq"))
    with pytest.raises(UnsupportedModel):
        perplexity.Measurement(other, PerplexityOrder(TEXT))


def streamed(worker: WorkerProcess, order: PerplexityOrder) -> Generator[Any, None, None]:
    """What the worker tells, as it comes. Closing the iterator closes the connection."""
    with worker.http() as client, client.stream("POST", PERPLEXITY, content=encode(order)) as response:
        assert response.status_code == 200
        yield from (decode(line) for line in response.iter_lines())


def test_a_worker_tells_how_far_it_is_and_what_came_out(worker: WorkerProcess, loaded: Any) -> None:
    *steps, last = streamed(worker, PerplexityOrder(TEXT, WINDOW, STRIDE, MOST))
    assert all(isinstance(step, Progress) for step in steps)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == MOST
    assert isinstance(last, Perplexity)
    assert last.perplexity == pytest.approx(reference(loaded, WINDOW, STRIDE, MOST)[0], rel=1e-4)


def test_answers_come_between_its_windows_and_closing_ends_it(worker: WorkerProcess) -> None:
    running = streamed(worker, PerplexityOrder(TEXT * 20, window_tokens=256, stride_tokens=1))
    before = next(running)
    _, done = worker.generate(GenerateOrder(GenerationOptions(max_new_tokens=2, temperature=0), prompt="def"))
    assert isinstance(done, Done)
    assert isinstance(before, Progress)
    assert before.done < before.total
    later = next(step for step in running if step.done > before.done)  # it goes on after the answer
    assert later.done < later.total
    running.close()
    *_, last = streamed(worker, PerplexityOrder("def main():"))  # ends only when the other one is out of the way
    assert isinstance(last, Perplexity)


def test_a_refusal_comes_as_a_failure_with_its_kind(worker: WorkerProcess) -> None:
    (failed,) = streamed(worker, PerplexityOrder(TEXT, window_tokens=10_000))
    assert isinstance(failed, Failed)
    assert isinstance(error_from_dict(failed.error.to_dict()), RequestTooLong)


def test_a_set_of_loras_acts_while_its_text_is_measured(worker: WorkerProcess, tmp_path: Path) -> None:
    lora = loras.choice(loras.untrained(tmp_path / "lora", checkpoints.llama()))
    short = PerplexityOrder(TEXT, WINDOW, STRIDE, 400, adapters=())
    results = [
        list(streamed(worker, order))[-1].perplexity
        for order in (short, dataclasses.replace(short, adapters=(lora,)), short)
    ]
    assert results[0] == results[2]
    assert results[1] != pytest.approx(results[0], rel=5e-5)
