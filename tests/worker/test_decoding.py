"""Streams of token ids into text: the pieces joined are what decoding everything at once gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from modules.worker.decoding import StopText, TextStream

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
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same kind by the SentencePiece library: a slow tokenizer."""
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
    return SentencePieceBackend(vocab_file=str(folder / "tokenizer.model"), unk_token="<unk>", eos_token="</s>")


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*[stream.push(token) for token in ids], stream.finish()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@given(st.data())
def test_any_tokens_of_a_byte_level_tokenizer(byte_level: Any, data: st.DataObject) -> None:
    few = st.integers(0, 300)  # the special tokens and single bytes: mostly no characters
    ids = data.draw(st.lists(few | st.integers(0, len(byte_level) - 1), max_size=40))
    assert "".join(pieces(byte_level, ids)) == whole(byte_level, ids)


@given(st.data())
def test_any_tokens_of_a_slow_tokenizer(slow: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(slow) - 1), max_size=40))
    assert "".join(pieces(slow, ids)) == whole(slow, ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "slow"])
@given(text=TEXTS)
def test_text_comes_in_whole_characters(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text).input_ids
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


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
