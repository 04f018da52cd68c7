"""Fast and slow tokenizers of real checkpoints, and the conversion that is done once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from modules.errors import BrokenCheckpoint
from modules.protocol import Progress
from modules.worker import tokenizer
from tests import checkpoints

TEXTS = ("Hello world, this is argparse.", "<s>[INST] x [/INST]</s>", "naïve 🙂 東京", "a\n\n  b")


def load(path: Path, work: Path, stages: list[str] | None = None, **facts: Any) -> tokenizer.LoadedTokenizer:
    def note(progress: Progress) -> None:
        if stages is not None:
            stages.append(progress.stage)

    return tokenizer.load(checkpoints.order_for(path, work, **facts), AutoConfig.from_pretrained(path), note)


def ids(loaded: tokenizer.LoadedTokenizer) -> list[list[int]]:
    return [loaded.tokenizer(text).input_ids for text in TEXTS]


def test_a_slow_only_folder_is_converted_once_and_kept(tmp_path: Path) -> None:
    stages: list[str] = []
    first = load(checkpoints.llama(), tmp_path, stages)
    assert stages == ["loading the tokenizer", "converting the tokenizer"]
    assert first.tokenizer.is_fast
    kept = list((tmp_path / "cache" / "tokenizers").iterdir())
    assert [(folder / "tokenizer.json").exists() for folder in kept] == [True]
    stages.clear()
    second = load(checkpoints.llama(), tmp_path, stages)
    assert stages == ["loading the tokenizer"]
    assert second.tokenizer.name_or_path == str(kept[0])
    assert type(second.tokenizer) is type(first.tokenizer)
    assert ids(second) == ids(first)
    assert not (checkpoints.llama() / "tokenizer.json").exists()


def test_a_changed_source_is_converted_again(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    load(folder, tmp_path)
    os.utime(folder / "tokenizer.model", ns=(1, 1))
    stages: list[str] = []
    load(folder, tmp_path, stages)
    assert "converting the tokenizer" in stages


def test_a_cache_that_cannot_be_written_does_not_stop_a_load(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert load(checkpoints.llama(), tmp_path).tokenizer.is_fast


def test_off_takes_sentencepiece_with_the_same_ids(tmp_path: Path) -> None:
    fast, slow = load(checkpoints.llama(), tmp_path), load(checkpoints.llama(), tmp_path, use_fast=False)
    assert isinstance(slow.tokenizer, SentencePieceBackend)
    assert not slow.tokenizer.is_fast
    assert ids(slow) == ids(fast)
    assert slow.tokenizer.get_vocab() == fast.tokenizer.get_vocab()
    for text, numbers in zip(TEXTS, ids(slow), strict=True):
        assert slow.tokenizer.decode(numbers) == fast.tokenizer.decode(numbers), text
    assert slow.tokenizer("a", add_special_tokens=False).input_ids == slow.tokenizer("a").input_ids[1:]


def test_a_difference_between_the_two_is_said(tmp_path: Path) -> None:
    """Leading spaces: SentencePiece puts its own in front of them, the tokenizers library does not."""
    slow = load(checkpoints.llama(), tmp_path, use_fast=False)
    assert slow.notes == ("The SentencePiece tokenizer splits 1 of 3 probe texts unlike the fast one.",)


def test_off_works_for_a_seq2seq_model(tmp_path: Path) -> None:
    fast, slow = load(checkpoints.t5(), tmp_path), load(checkpoints.t5(), tmp_path, use_fast=False)
    assert not slow.tokenizer.is_fast
    assert slow.notes == ()
    assert ids(slow) == ids(fast)
    assert slow.tokenizer("a").input_ids[-1] == slow.tokenizer.eos_token_id
    sentinel = "<extra_id_0>"
    assert slow.tokenizer.convert_tokens_to_ids(sentinel) == fast.tokenizer.convert_tokens_to_ids(sentinel)


def test_off_says_so_where_there_is_only_the_fast_form(tmp_path: Path) -> None:
    loaded = load(checkpoints.gpt2(), tmp_path, use_fast=False)
    assert loaded.tokenizer.is_fast
    assert loaded.notes == ("use_fast is off, but the model has only the fast form of its tokenizer.",)


def test_a_chat_template_survives_in_both_forms(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "Hi"}]
    for use_fast in (True, True, False):  # converted, from the cache, SentencePiece
        loaded = load(folder, tmp_path, use_fast=use_fast)
        assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "[user] Hi"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(BrokenCheckpoint, match="has no tokenizer"):
        load(folder, tmp_path)


def test_a_tiktoken_file_is_not_taken_for_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert tokenizer.sentencepiece_file(tmp_path) is None
