"""What a LoRA may learn from: formats that are read, and lines that are named where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.errors import BrokenData, HubUnreachable
from modules.training import data, hub
from modules.training.messages import DataFile
from tests import trainings

CHAT = trainings.chat("Hi", "Hello")


def read(tmp_path: Path, text: str, name: str = "data.jsonl", data_format: Any = "auto") -> data.Examples:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return data.read(DataFile(str(file), data_format, name))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (CHAT, "chat"),
        (CHAT["messages"], "chat"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "chat"),
        ({"instruction": "Greet.", "input": "Anna", "output": "Hello Anna"}, "chat"),
        ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "chat"),
        ({"prompt": "Hi", "completion": " Hello"}, "pairs"),
        ({"text": "Once upon a time"}, "text"),
    ],
    ids=str,
)
def test_each_form_is_known_by_itself(tmp_path: Path, value: Any, kind: str) -> None:
    line = json.dumps(value)
    listed = read(tmp_path, f"[{line}]", "data.json")
    by_line = read(tmp_path, f"{line}\n\n{line}\n")
    assert (by_line.data_format, listed.data_format) == (kind, kind)
    assert [example.number for example in by_line.examples] == [1, 3]
    if kind == "chat":
        assert [message["role"] for message in by_line.examples[0].messages] == ["user", "assistant"]


def test_plain_text_stays_one_running_text(tmp_path: Path) -> None:
    found = read(tmp_path, "Chapter 1\n\nIt was a dark night.", "book.txt")
    assert (found.data_format, found.plain, found.examples[0].text[:9]) == ("text", True, "Chapter 1")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "no JSON"),
        ("7", "no object but int"),
        ('{"question": "x"}', "but question"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "'king'"),
        ('{"messages": [{"role": "user"}]}', "no text"),
        ('{"prompt": "x", "completion": ""}', "completion is empty"),
        ('{"prompt": 5, "completion": "y"}', "its prompt is no text but int"),
        ('{"text": "  "}', "its text is empty"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(BrokenData) as error:
        read(tmp_path, f"{json.dumps(CHAT)}\n\n{line}\n{json.dumps(CHAT)}\n")
    assert "1 of 3 examples in data.jsonl cannot be used. Line 3: " in error.value.message
    assert said in error.value.message


def test_of_many_bad_lines_the_first_few_are_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenData) as error:
        read(tmp_path, "x\n" * 30, data_format="chat", name="many.jsonl")
    assert "30 of 30" in error.value.message
    assert "line 5:" in error.value.message
    assert "line 6:" not in error.value.message
    assert "And 25 more." in error.value.message


@pytest.mark.parametrize(
    ("text", "name", "data_format", "said"),
    [
        ("", "data.jsonl", "auto", "is empty"),
        ("[]", "data.json", "auto", "holds no examples"),
        ("[1,", "data.json", "auto", "no JSON"),
        ("Plain words.", "data.txt", "chat", "is plain text, not chat"),
        (json.dumps(CHAT), "data.jsonl", "pairs", "it is chat, not pairs"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    tmp_path: Path, text: str, name: str, data_format: str, said: str
) -> None:
    with pytest.raises(BrokenData, match=said):
        read(tmp_path, text, name, data_format)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenData, match=r"no file gone\.jsonl"):
        data.read(DataFile(str(tmp_path / "gone.jsonl")))
    with pytest.raises(BrokenData, match="cannot be read"):
        data.read(DataFile(str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(BrokenData, match="byte 2 is 0xf6"):
        data.read(DataFile(str(tmp_path / "latin.txt")))


def test_data_comes_from_one_place(tmp_path: Path) -> None:
    with data.on_disk("", json.dumps(CHAT), "", "auto", tmp_path / "new") as file:
        assert data.read(file).data_format == "chat"
        kept = Path(file.path)
    assert not kept.exists()
    for given in (("", " ", ""), ("a.txt", "text", "")):
        with pytest.raises(BrokenData), data.on_disk(*given, "auto", tmp_path):
            pass


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("squad", ("squad", "", "train")),
        ("user/name", ("user/name", "", "train")),
        ("user/name:test", ("user/name", "", "test")),
        ("user/name/config:train[:10%]", ("user/name", "config", "train[:10%]")),
    ],
)
def test_a_data_set_is_named_as_on_the_hub(text: str, parts: tuple[str, str, str]) -> None:
    assert hub.parts(text) == parts


def test_the_rows_of_a_data_set_become_lines(tmp_path: Path) -> None:
    """The real library, which takes a folder beside the file that is written for a data set too."""
    pytest.importorskip("datasets")
    (tmp_path / "lesson").mkdir()
    trainings.jsonl(tmp_path / "lesson" / "train.jsonl", [CHAT, CHAT])
    hub.fetch("lesson:train", tmp_path / "rows.jsonl")
    found = data.read(DataFile(str(tmp_path / "rows.jsonl")))
    assert [example.kind for example in found.examples] == ["chat", "chat"]
    with pytest.raises(HubUnreachable, match="nothing/there"):
        hub.fetch("nothing/there", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("text", ["a/b/c/d", "", "../models", "user/..", ".", "/"])
def test_a_name_of_no_data_set_is_refused(text: str) -> None:
    with pytest.raises(BrokenData):
        hub.parts(text)
