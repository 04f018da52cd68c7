"""Streams of token ids into text: the pieces joined are what decoding everything at once gives beyond the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from modules.worker.decoding import StopText, TextStream, common
from modules.worker.tokenizer import SentencePieceTokenizer

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    [
        "The robot 🤖 says hi",
        "你好，世界。こんにちは",
        "e\u0301 👩‍👩‍👧 🇩🇪",
        "  spaces \n\n and\ttabs ",
        "a \ufffd b",
        "don't , stop .",
    ]
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def byte_level(demo_model: Path) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and the demo model have it."""
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """Words with bytes for what is in none of them, as Llama 2 and Gemma have it, by the tokenizers library."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁the", "e", "é", "你", "▁你", "n", "'", "t", "▁n"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model of a few words and all bytes."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [f"the quick brown fox jumps over the lazy dog 你好 世界 {number}" for number in range(200)]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=320,
            byte_fallback=True,
            character_coverage=0.99,
            model_type="bpe",
            minloglevel=2,
        )
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def slow(vocabulary_file: str) -> Any:
    """The same kind by the SentencePiece library: a slow tokenizer."""
    return SentencePieceBackend(vocab_file=vocabulary_file, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def slow_with_bytes(vocabulary_file: str) -> Any:
    """The same as it is loaded without use_fast."""
    return SentencePieceTokenizer(
        vocab_file=vocabulary_file, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


class Windowed:
    """A fast tokenizer without the stream of the tokenizers library."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.decode = tokenizer.decode


def pieces(tokenizer: Any, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, before or [])
    return [*[stream.push(token) for token in ids], stream.finish()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def beyond(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """What ``ids`` add to the text of ``before``, or of its whole characters where it leaves one unfinished."""
    both = whole(tokenizer, before + ids)
    fronts = (whole(tokenizer, before[:count]) for count in range(max(0, len(before) - 3), len(before) + 1))
    return both[max(common(front, both) for front in fronts) :]


def check(tokenizer: Any, ids: list[int], data: st.DataObject, most: int | None = None) -> None:
    """The first ids are a prompt, any number of them, or ``most``; by both roads."""
    at = data.draw(st.integers(0, len(ids) if most is None else most), "ids of prompt")
    expected = beyond(tokenizer, ids[:at], ids[at:])
    assert "".join(pieces(tokenizer, ids[at:], ids[:at])) == expected
    assert "".join(pieces(Windowed(tokenizer), ids[at:], ids[:at])) == expected


@settings(deadline=None)  # cores are shared
@given(st.data())
def test_any_tokens_of_a_byte_level_tokenizer(byte_level: Any, data: st.DataObject) -> None:
    few = st.integers(0, 300)  # the special tokens and single bytes: mostly no characters
    check(byte_level, data.draw(st.lists(few | st.integers(0, len(byte_level) - 1), max_size=40)), data)


@pytest.mark.parametrize("kind", ["slow", "slow_with_bytes"])
@settings(deadline=None)  # cores are shared
@given(data=st.data())
def test_any_tokens_of_a_slow_tokenizer(kind: str, data: st.DataObject, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    check(tokenizer, data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)), data)


KINDS = ["byte_level", "byte_fallback", "slow", "slow_with_bytes"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # cores are shared
@given(text=TEXTS, data=st.data())
def test_text_comes_in_whole_characters(
    kind: str, text: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    # With byte fallback a cut amidst U+FFFD itself leaves open what of it the prompt shows.
    check(tokenizer, tokenizer(text).input_ids, data, 0 if kind == "byte_fallback" and "\ufffd" in text else None)


@settings(deadline=None)  # cores are shared
@given(parts=st.lists(st.sampled_from(["▁", "▁the", "▁n", "n", "▁你", "</s>", "🤖", "ü"])), data=st.data())
def test_words_and_bytes_of_a_tokenizer_with_byte_fallback(
    byte_fallback: Any, parts: list[str], data: st.DataObject
) -> None:
    known = byte_fallback.get_vocab()
    each = [[known[part]] if part in known else byte_fallback(part).input_ids for part in parts]
    check(byte_fallback, [token for ids in each for token in ids], data)


@pytest.mark.parametrize("road", [lambda tokenizer: tokenizer, Windowed])
def test_what_goes_on_with_a_text_keeps_its_first_blank(byte_fallback: Any, road: Callable[[Any], Any]) -> None:
    the, n, end = byte_fallback.convert_tokens_to_ids(["▁the", "▁n", "</s>"])
    robot, tokenizer = byte_fallback("🤖").input_ids, road(byte_fallback)
    assert pieces(tokenizer, [the, n]) == ["the", " n", ""]  # an answer's first
    assert pieces(tokenizer, [the, n], [n]) == [" the", " n", ""]
    assert pieces(tokenizer, [the], [n, *[end] * 20]) == [" the", ""]  # special tokens are no text
    assert pieces(tokenizer, [the], [end]) == ["the", ""]
    assert pieces(tokenizer, [robot[3], the], [n, *robot[:3]]) == ["🤖", " the", ""]
    assert pieces(tokenizer, [the], [n, *robot[:3]]) == [" the", ""]  # never a character
    assert pieces(tokenizer, [the], [n, *robot * 30]) == [" the", ""]
    assert pieces(tokenizer, [the], byte_fallback("n\ufffd").input_ids) == [" the", ""]
    assert pieces(tokenizer, [*robot, the], robot * 30) == ["", "", "", "🤖", " the", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_single_tokens_joined_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(" the  n the n", add_special_tokens=False).input_ids
    if kind == "byte_fallback":  # it has no merges
        ids = tokenizer.convert_tokens_to_ids(["▁", "▁the", "▁", "▁n", "▁the", "n"])
    fronts: list[list[int]] = [[], ids]
    for before in fronts:
        stream, joined, told = TextStream(tokenizer, before), "", ""
        for token in ids:
            alone, other = stream.texts([token, ids[0]])
            assert alone == other or token != ids[0]
            told, joined = told + alone, joined + stream.push(token)
        assert told == joined + stream.finish() == beyond(tokenizer, before, ids)


def test_the_text_of_a_token_that_has_none_of_its_own(byte_fallback: Any) -> None:
    the, n, byte, end = byte_fallback.convert_tokens_to_ids(["▁the", "▁n", "<0xF0>", "</s>"])
    stream = TextStream(byte_fallback, [the])
    assert stream.texts([n, byte, end]) == [" n", "\ufffd", "</s>"]
    stream.push(byte)
    assert stream.texts([n, byte]) == [" n", "\ufffd"]


@given(st.data())
def test_bytes_that_are_no_text_lose_nothing_behind_them(byte_fallback: Any, data: st.DataObject) -> None:
    garbage = data.draw(st.lists(st.integers(3, 258), max_size=20))
    ids = [*garbage, *byte_fallback("你 the", add_special_tokens=False).input_ids]
    assert "".join(pieces(byte_fallback, ids)).endswith("你 the")


def test_the_text_flows_token_by_token(byte_level: Any) -> None:
    ids = byte_level("The quick brown fox 🤖 jumps.").input_ids
    parts = pieces(byte_level, ids)
    assert parts[:4] == ["The", " quick", " brown", " fox"]
    assert " 🤖" in parts


def test_a_character_cut_off_at_the_end_is_shown_as_broken(byte_level: Any) -> None:
    ids = byte_level("Hi 🤖").input_ids[:-1]
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)
    assert pieces(byte_level, ids)[-1].endswith("\ufffd")


STOPS = ("\nUser:", "\n\nX")


@given(st.lists(st.sampled_from(["\n", "User", ":", "\nUs", "er:", "\nUser:", "X", "text", "\n\n"]), max_size=12))
def test_a_stop_is_found_however_it_is_cut(parts: list[str]) -> None:
    stop = StopText(STOPS)
    handed_out = []
    for part in parts:
        handed_out.append(stop.push(part))
        if stop.stopped:
            break
    handed_out.append(stop.finish())
    text = "".join(parts)
    ends = [at for word in STOPS if (at := text.find(word)) >= 0]
    assert "".join(handed_out) == text[: min(ends, default=None)]
    assert stop.stopped == bool(ends)


def test_text_that_can_be_no_stop_is_not_held_back() -> None:
    stop = StopText(STOPS)
    assert [stop.push(part) for part in ("one", " two\n", "three", "\nUse")] == ["one", " two", "\nthree", ""]
