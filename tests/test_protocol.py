"""The messages: whatever is encoded is decoded to an equal message, and nonsense is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import OutOfMemory
from modules.options import GenerationOptions, LoadOptions
from modules.perplexity import Perplexity, PerplexityOrder
from modules.protocol import (
    AdapterChoice,
    AdaptersOrder,
    AdaptersReport,
    CountOrder,
    Done,
    Failed,
    GenerateOrder,
    Hello,
    Listening,
    LoadOrder,
    LoadReport,
    Memory,
    Merged,
    MergeOrder,
    Piece,
    Progress,
    Ready,
    decode,
    encode,
)

TEXT = st.text(max_size=50)
COUNT = st.integers(0, 2**60)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3).map(tuple)


def orders() -> st.SearchStrategy[LoadOrder]:
    options = st.builds(LoadOptions, load_in_4bit=st.booleans(), gpu_memory=st.tuples(st.floats(0, 1e6)))
    return st.builds(LoadOrder, options=options, adapters=adapters())


def adapters() -> st.SearchStrategy[tuple[AdapterChoice, ...]]:
    return st.lists(st.builds(AdapterChoice, TEXT, TEXT, st.floats(-2, 2)), max_size=3).map(tuple)


def applied() -> st.SearchStrategy[AdaptersReport]:
    moved = st.none() | st.floats(0, 50)
    return st.builds(AdaptersReport, adapters=adapters(), moved_nats=moved, seconds=st.floats(0, 1e6))


def reports() -> st.SearchStrategy[LoadReport]:
    return st.builds(LoadReport, load_seconds=st.floats(0, 1e6), notes=st.lists(TEXT, max_size=2).map(tuple))


@given(
    st.one_of(
        st.builds(Hello),
        orders(),
        st.builds(
            GenerateOrder,
            options=st.just(GenerationOptions(seed=3)),
            messages=MESSAGES,
            adapters=st.none() | adapters(),
        ),
        st.builds(PerplexityOrder, adapters=st.none() | adapters()),
        st.builds(
            Perplexity,
            perplexity=st.floats(1, 1e6) | st.just(math.inf),
            stretches=st.lists(st.none() | st.floats(1, 1e6), max_size=3).map(tuple),
            seconds=st.floats(0, 1e6),
        ),
        st.builds(AdaptersOrder, adapters=adapters()),
        applied(),
        st.builds(MergeOrder, adapters=adapters()),
        st.builds(Merged, seconds=st.floats(0, 1e6)),
        st.builds(CountOrder, messages=MESSAGES),
        st.builds(Listening),
        st.builds(Progress),
        st.builds(
            Ready,
            report=reports(),
            memory=st.builds(Memory, COUNT, COUNT, st.tuples(COUNT, COUNT)),
            adapters=st.none() | applied(),
        ),
        st.builds(Piece),
        st.builds(Done, first_token_seconds=st.floats(0, 1e6), seconds=st.floats(0, 1e6)),
    )
)
def test_every_message_comes_back_equal(message: object) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


def test_an_error_comes_back_with_its_class() -> None:
    again = decode(encode(Failed(OutOfMemory("no room", fix={"load_in_4bit": True}))))
    assert isinstance(again.error, OutOfMemory)
    assert again.error.fix == {"load_in_4bit": True}


def test_halves_of_characters_do_not_arrive() -> None:
    """As a page sends them that cuts an emoji in two; whole ones stay."""
    halves = CountOrder(messages=({"role": "user", "content": "a\ud83d 😀", "tool\udc00": ["\ud83d"]},))
    assert decode(encode(halves)).messages == ({"role": "user", "content": "a\ufffd 😀", "tool\ufffd": ["\ufffd"]},)


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", '{"is": "Nothing"}', '{"is": "Piece", "text": "a", "tokens": 1, "x": 2}']
)
def test_what_is_no_message_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a message|has no|Expecting"):
        decode(line)


@given(st.text())
def test_any_line_is_a_message_or_refused(line: str) -> None:
    try:
        decode(line)
    except (ValueError, TypeError, KeyError):
        return
