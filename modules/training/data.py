"""What a LoRA learns from, read as examples: plain text, conversations, pairs of prompt and completion.

========  ====================================================================================================
text      a file of plain text as it stands; or JSON with ``{"text": …}``
chat      ``{"messages": [{"role": …, "content": …}, …]}``; also ``{"conversations": [{"from": …, "value": …}]}``
          and ``{"instruction": …, "input": …, "output": …}``. Loss on what the assistant says alone.
pairs     ``{"prompt": …, "completion": …}``, as they stand. Loss on the completion alone.
========  ====================================================================================================

JSON is a list, or one object a line.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import BrokenData, LoadstoneError
from modules.options import DATA_FORMATS, DataFormat
from modules.protocol import ChatMessages
from modules.training.hub import fetch
from modules.training.messages import DataFile

_JSON = frozenset({".json", ".jsonl", ".ndjson"})
_MARKS = 64  # tokens of a chat template around the messages
_NAMED = 5  # bad lines that a message names
_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One of: messages, a prompt and its completion, a text. ``where``: "line 7" or "example 7"."""

    where: str
    number: int
    messages: ChatMessages = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""

    @property
    def kind(self) -> DataFormat:
        return "chat" if self.messages else "pairs" if self.completion else "text"

    @property
    def size(self) -> int:
        """In bytes of UTF-8, roughly: what the tokenizer has to do."""
        parts = (self.prompt, self.completion, self.text, *(str(m.get("content", "")) for m in self.messages))
        return sum(len(part.encode(errors="replace")) for part in parts)


@dataclass(frozen=True)
class Examples:
    """``data_format``: of most examples. ``plain``: one running text, which is cut into pieces of the cut-off."""

    examples: tuple[Example, ...]
    data_format: DataFormat
    plain: bool = False
    notes: tuple[str, ...] = ()

    @property
    def longest_tokens(self) -> int:
        """Of the longest example, before there is a tokenizer: few make more than a token of two bytes."""
        return max(example.size for example in self.examples) // 2 + _MARKS


def read(file: DataFile) -> Examples:
    """The examples. Raises BrokenData, which names the lines that are wrong."""
    if file.data_format not in DATA_FORMATS:
        raise BrokenData(f"There is no format {file.data_format!r}.", f"It is {', '.join(DATA_FORMATS)}.")
    text = _text(file)
    if not text.strip():
        raise BrokenData(f"{_name(file)} is empty.", "Give at least one example.")
    looks_like_json = Path(file.path).suffix.lower() in _JSON or text.lstrip()[:1] in ("{", "[")
    if not looks_like_json:
        return _plain(file, text)
    examples = tuple(_examples(file, text))
    kinds = [example.kind for example in examples]
    most = max(DATA_FORMATS, key=kinds.count)
    return Examples(examples, most)


def _name(file: DataFile) -> str:
    return file.name or Path(file.path).name


def _text(file: DataFile) -> str:
    try:
        return Path(file.path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BrokenData(f"There is no file {_name(file)}.", "Give the path of a file on this machine.") from None
    except UnicodeDecodeError as error:
        raise BrokenData(
            f"{_name(file)} is no UTF-8 text: byte {error.start:,} is {error.object[error.start]:#04x}.",
            "Save it as UTF-8.",
        ) from None
    except OSError as error:
        raise BrokenData(f"{_name(file)} cannot be read: {error.strerror}.", "Give the path of a file.") from None


def _plain(file: DataFile, text: str) -> Examples:
    if file.data_format in ("chat", "pairs"):
        raise BrokenData(
            f"{_name(file)} is plain text, not {file.data_format}.",
            'Give JSON, an object a line: {"messages": [{"role": "user", "content": …}, …]}, or choose text.',
        )
    return Examples((Example("the text", 0, text=text),), "text", plain=True)


def _examples(file: DataFile, text: str) -> Iterator[Example]:
    bad: list[str] = []
    count = 0
    for where, number, value in _values(file, text):
        count += 1
        try:
            example = _example(where, number, value)
            if file.data_format not in ("auto", example.kind):
                raise ValueError(f"it is {example.kind}, not {file.data_format}")
        except ValueError as error:
            bad.append(f"{where}: {error}")
            continue
        if not bad:
            yield example
    if bad:
        more = f" And {len(bad) - _NAMED} more." if len(bad) > _NAMED else ""
        listed = "; ".join(bad[:_NAMED])
        raise BrokenData(f"{len(bad)} of {count} examples in {_name(file)} cannot be used. {_first_big(listed)}.{more}")
    if not count:
        raise BrokenData(f"{_name(file)} holds no examples.", "Give at least one.")


def _first_big(text: str) -> str:
    return text[:1].upper() + text[1:]


def _values(file: DataFile, text: str) -> Iterator[tuple[str, int, Any]]:
    """Each example's place, number and JSON value; the value of a line that is no JSON is the ValueError."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    whole = _json(text)
    if isinstance(whole, ValueError) and text.lstrip()[0] == "[" and isinstance(_json(lines[0][1]), ValueError):
        raise BrokenData(f"{_name(file)}: {whole}.")
    if isinstance(whole, list) and not (whole and all(isinstance(one, dict) and "role" in one for one in whole)):
        for number, value in enumerate(whole, 1):
            yield f"example {number}", number, value
    elif isinstance(whole, dict | list):
        yield "example 1", 1, whole
    else:
        for number, line in lines:
            yield f"line {number}", number, _json(line)


def _json(text: str) -> Any:
    """Its value, or a ValueError that says what is wrong."""
    try:
        return json.loads(text)
    except ValueError as error:
        return ValueError(f"no JSON ({error})")
    except RecursionError:
        return ValueError("no JSON (nested too deep)")


def _example(where: str, number: int, value: Any) -> Example:
    """Raises ValueError with what is wrong with it."""
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"no object but {type(value).__name__}")
    if (turns := value.get("messages", value.get("conversations"))) is not None:
        return Example(where, number, messages=_messages(turns))
    if "instruction" in value and "output" in value:
        asked = "\n\n".join(part for part in (_words(value, "instruction"), _words(value, "input", "")) if part)
        system = _words(value, "system", "")
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": _words(value, "output")}]
        first = [{"role": "system", "content": system}] if system else []
        return Example(where, number, messages=_messages([*first, *turns]))
    if "prompt" in value and "completion" in value:
        return _pair(where, number, value)
    if "text" in value:
        if not (text := _words(value, "text")).strip():
            raise ValueError("its text is empty")
        return Example(where, number, text=text)
    keys = ", ".join(map(str, list(value)[:4])) or "none"
    raise ValueError(f"it has neither messages nor prompt and completion nor text, but {keys}")


def _pair(where: str, number: int, value: Mapping[str, Any]) -> Example:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(where, number, messages=_messages([*prompt, *completion]))
    if not _words(value, "completion").strip():
        raise ValueError("its completion is empty")
    return Example(where, number, prompt=_words(value, "prompt"), completion=_words(value, "completion"))


def _words(value: Mapping[str, Any], key: str, default: str | None = None) -> str:
    found = value.get(key, default)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise ValueError(f"its {key} is no text but {type(found).__name__}")
    return found


def _messages(turns: Any) -> ChatMessages:
    """Raises ValueError where they are no conversation that teaches an answer."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("its messages are no list, or empty")
    messages = tuple(_message(turn, place) for place, turn in enumerate(turns, 1))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(answer["content"] or answer.get("tool_calls") for answer in answers):
        raise ValueError("no message of an assistant, so there is nothing to learn")
    return messages


def _message(turn: Any, place: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"message {place} is no object but {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(role), role)
    content = turn.get("content", turn.get("value"))
    if role not in _KNOWN_ROLES:
        raise ValueError(f"message {place} has the role {role!r}; there are {', '.join(_KNOWN_ROLES)}")
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {place} has no text as its content")
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {"role": role, "content": content, **rest}


@contextmanager
def on_disk(path: str, text: str, hub: str, data_format: DataFormat, scratch: Path) -> Iterator[DataFile]:
    """The data as a file, for the time: the one at ``path``, or one made of ``text`` or of a data set on the Hub.

    Raises BrokenData where none or several are given, and what fetching raises.
    """
    given = [word for word in (path.strip(), text.strip(), hub.strip()) if word]
    if len(given) != 1:
        raise BrokenData(
            "There is no data to learn from." if not given else "The data is given in more than one way.",
            "Give a file, or a text, or a data set on the Hub.",
        )
    if path.strip():
        whole = Path(path.strip()).expanduser().absolute()
        yield DataFile(str(whole), data_format, whole.name)
        return
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=scratch, prefix=".data-")
    except OSError as error:
        raise LoadstoneError(f"Nothing can be written in {scratch}: {error.strerror}.") from None
    with folder as place:
        json_like = bool(hub.strip()) or text.lstrip()[:1] in ("{", "[")
        file = Path(place, f"data{'.jsonl' if json_like else '.txt'}")
        if hub.strip():
            fetch(hub.strip(), file)
        else:
            file.write_text(text, encoding="utf-8")
        yield DataFile(str(file), data_format, hub.strip() or "the pasted text")
