"""Embeddings by the worker, against a computation by transformers alone."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from modules.embeddings import EMBED, Embedded, EmbedOrder, Input
from modules.errors import OptionError, OutOfMemory, RequestTooLong, UnsupportedModel
from modules.protocol import Done, Failed, Progress, decode, encode
from modules.worker import embedding, transformers_loader
from modules.worker.adapters import Adapters
from modules.worker.engine import Engine
from tests import checkpoints, loras
from tests.conftest import StartWorker, WorkerProcess
from tests.worker import batches

TEXTS = ("a herring", "The quick brown fox jumps over the lazy dog. " * 3, "b", "Two words more", "a herring")


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


def reference(loaded: Any, ids: list[int]) -> Any:
    """One text alone, by transformers: the mean over the last of all hidden states, of length 1."""
    import torch

    with torch.no_grad():
        states = loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    return torch.nn.functional.normalize(states[0].float().mean(0), dim=-1)


def vectors(found: Embedded) -> Any:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(found.vectors)), dtype=torch.float32).view(-1, found.dimensions)


def embedded(loaded: Any, *inputs: Input) -> tuple[Embedded, int]:
    """What comes of it, and in how many batches."""
    work = embedding.Embedding(loaded, EmbedOrder(inputs))
    batches = 0
    while not work.read:
        work.read_on()
    while work.done < len(inputs):
        work.batch()
        batches += 1
    return work.result(), batches


@pytest.mark.parametrize("batch_tokens", [4096, 20])
def test_each_vector_is_that_of_its_text_alone(loaded: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(embedding, "BATCH_TOKENS", batch_tokens)
    ids = [list(loaded.tokenizer(text).input_ids) for text in TEXTS]
    found, batches = embedded(loaded, *map(Input, TEXTS), Input(ids=tuple(ids[1])))
    assert (batches == 1) == (batch_tokens == 4096)
    assert found.tokens == tuple(map(len, [*ids, ids[1]]))
    wanted = torch.stack([reference(loaded, one) for one in [*ids, ids[1]]])
    torch.testing.assert_close(vectors(found), wanted, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(vectors(found).norm(dim=1), torch.ones(6))
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)  # so that a mix-up would be seen


@pytest.mark.parametrize(
    ("one", "error", "words"),
    [
        (Input(ids=(5, checkpoints.VOCABULARY)), OptionError, f"no token {checkpoints.VOCABULARY}"),
        (Input(ids=(5,) * 257), RequestTooLong, "257 tokens"),
        (Input("word " * 300), RequestTooLong, "context of 256"),
        (Input("word " * 300_000), RequestTooLong, "1,500,000 characters; a context of 256"),
    ],
)
def test_what_cannot_be_embedded_is_refused(loaded: Any, one: Input, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        embedded(loaded, Input("fine"), one)


def test_many_inputs_are_read_some_at_a_time(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "READ_TOKENS", 10)
    work = embedding.Embedding(loaded, EmbedOrder((Input(ids=(5,) * 4),) * 7))
    reads = 0
    while not work.read:
        work.read_on()
        reads += 1
    assert reads == 3  # of 3, 3 and 1
    work.batch()
    assert work.done == 7


def test_a_model_with_an_encoder_is_refused(tmp_path: Any) -> None:
    order = checkpoints.order_for(checkpoints.t5(), tmp_path, task="seq2seq", cpu=True)
    with pytest.raises(UnsupportedModel, match="encoder"):
        embedded(transformers_loader.load(order, lambda _: None), Input("fine"))


def test_the_process_answers_with_the_same_and_refuses_by_name(worker: WorkerProcess, loaded: Any) -> None:
    *_, last = worker.post(EMBED, EmbedOrder(tuple(map(Input, TEXTS)))).content.splitlines()
    assert decode(last) == embedded(loaded, *map(Input, TEXTS))[0]
    *_, last = worker.post(EMBED, EmbedOrder((Input(ids=(9999,)),))).content.splitlines()
    refused = decode(last)
    assert isinstance(refused, Failed)
    assert isinstance(refused.error, OptionError)
    *_, last = worker.post(EMBED, EmbedOrder((Input("again"),))).content.splitlines()
    assert isinstance(decode(last), Embedded)
    assert encode(decode(last)).strip() == last


def test_answers_go_on_and_new_ones_begin_while_texts_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 4)
    desk = batches.Desk(batches.tiny_llama(), tmp_path, ctx_tokens=1024, max_batch=8, batch_tokens=4096)
    desk.adapters = Adapters(desk.loaded.model, desk.loaded.tokenizer, desk.loaded.order)
    desk.adapters.apply((loras.choice(loras.untrained(tmp_path / "active", batches.tiny_llama())),))
    own = (loras.choice(loras.untrained(tmp_path / "own", batches.tiny_llama())),)
    orders = [batches.order(0, 300), batches.order(1, 2)]
    alone = [one.text for one in desk.alone(orders)]
    with desk.adapters.using(own):
        wanted = embedded(desk.loaded, *map(Input, TEXTS))[0]
    engine = Engine()
    engine.take_turns(desk.scheduler)
    long = desk.ask(orders[0])
    engine.wake()
    engine._once()
    told: list[Any] = []
    asked = EmbedOrder(tuple(map(Input, TEXTS)), own)
    embedding.embed(desk.loaded, asked, desk.adapters.using, engine, told.append, threading.Event())
    short = desk.ask(orders[1])
    while not (told and isinstance(told[-1], Embedded)):
        engine._once()
    assert short.done.completion_tokens == 2
    assert long.pieces
    assert not isinstance(long.chunks[-1], Done)  # both came while this one was under way
    while not isinstance(long.chunks[-1], Done):
        engine._once()
    assert [long.text, short.text] == alone  # with the active set, whose place the other took in between
    assert told[-1] == wanted


def test_where_there_is_no_room_beside_answers_it_is_done_after_them(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    engine = Engine()
    told: list[Any] = []
    seen: list[Any] = []
    full: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")] * 3
    forward = loaded.model.base_model.register_forward_pre_hook(lambda *_: _raise(full))

    def submit(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return Engine.submit(engine, *args, **kwargs)

    monkeypatch.setattr(engine, "submit", submit)

    def ask() -> Any:
        told.clear()
        inputs = EmbedOrder(tuple(map(Input, TEXTS)))
        embedding.embed(loaded, inputs, lambda _: nullcontext(), engine, told.append, threading.Event())
        while not told or isinstance(told[-1], Progress):
            engine._once()
        return told[-1]

    try:
        assert isinstance(ask().error, OutOfMemory)  # alone there is none either
        assert isinstance(ask(), Embedded)
    finally:
        forward.remove()
    assert len(seen) == 2
    assert told[-1] == embedded(loaded, *map(Input, TEXTS))[0]


def _raise(errors: list[Exception]) -> None:
    if errors:
        raise errors.pop()
