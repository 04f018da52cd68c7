"""Reasoning, text and tool calls told apart, however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import UnsupportedParameter
from modules.worker.parts import Parts, reasoning_marks
from modules.worker.tools import BARE, TAGGED, ToolFormat, call_grammar, read_call, tool_format

THINK = ("<think>", "</think>")
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
WEATHER = {"name": "weather", "arguments": '{"city": "Oslo"}'}


def sorted_out(pieces: list[str], *, thinking: bool = False, tools: ToolFormat | None = None) -> tuple[str, str, int]:
    """(reasoning, text, calls)"""
    parts = Parts(THINK, thinking=thinking, tools=tools, offered=["weather"])
    told = [parts.push(piece) for piece in pieces] + [parts.finish()]
    assert all(call == WEATHER for call in parts.calls)
    return "".join(one for one, _ in told), "".join(one for _, one in told), len(parts.calls)


CASES = [
    ("Hello", False, None, ("", "Hello", 0)),
    (" Hello\n", False, None, ("", " Hello\n", 0)),
    ("<think>\nHm.\n</think>\n\nOslo", False, None, ("Hm.\n", "Oslo", 0)),
    ("Hm.</think>Oslo", True, None, ("Hm.", "Oslo", 0)),
    ("Hm", True, None, ("Hm", "", 0)),
    ("a < b <thin", False, None, ("", "a < b <thin", 0)),
    (f"<tool_call>\n{CALL}\n</tool_call>", False, TAGGED, ("", "", 1)),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", False, TAGGED, ("", "", 2)),
    (f"Hm.</think>\n<tool_call>{CALL}", True, TAGGED, ("Hm.", "", 1)),
    (f"Let me look. <tool_call>{CALL}</tool_call>", False, TAGGED, ("", "Let me look. ", 1)),
    ("<tool_call>nonsense</tool_call>", False, TAGGED, ("", "<tool_call>nonsense</tool_call>", 0)),
    ("<tool_call>{", False, TAGGED, ("", "<tool_call>{", 0)),
    (f"<tool_call>{CALL}</tool_call>", False, None, ("", f"<tool_call>{CALL}</tool_call>", 0)),
    (CALL.replace("arguments", "parameters"), False, BARE, ("", "", 1)),
    ('{"a": 1}', False, BARE, ("", '{"a": 1}', 0)),
    ('{"name": "Alice", "age": 3}', False, BARE, ("", '{"name": "Alice", "age": 3}', 0)),
    ('<tool_call>{"name": "rm"}</tool_call>!', False, TAGGED, ("", '<tool_call>{"name": "rm"}</tool_call>!', 0)),
    (CALL.replace('{"city": "Oslo"}', "[1]"), False, BARE, ("", CALL.replace('{"city": "Oslo"}', "[1]"), 0)),
    ("It is {x}", False, BARE, ("", "It is {x}", 0)),
]


@pytest.mark.parametrize(("text", "thinking", "tools", "expected"), CASES)
@given(cuts=st.sets(st.integers(0, 200), max_size=12))
def test_parts_are_told_apart_wherever_the_text_is_cut(
    text: str, thinking: bool, tools: ToolFormat | None, expected: tuple[str, str, int], cuts: set[int]
) -> None:
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(at)]
    assert sorted_out(pieces, thinking=thinking, tools=tools) == expected


def test_nothing_certain_is_held_back() -> None:
    parts = Parts(THINK, tools=None)
    assert parts.push("a <") == ("", "a ")
    assert parts.push("b") == ("", "<b")
    assert parts.push("<think>c") == ("c", "")
    assert parts.thinking


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", TAGGED),
        ('{% if tools %}{"name": x, "parameters": y}{% endif %}', BARE),
    ],
)
def test_forms_of_calls_are_known_by_their_templates(template: str, form: ToolFormat) -> None:
    assert tool_format(template) == form


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ tools }}", "{{ tools }}<tool_call><function="])
def test_other_forms_are_refused(template: str) -> None:
    with pytest.raises(UnsupportedParameter, match="tools"):
        tool_format(template)


def test_marks_of_reasoning() -> None:
    assert reasoning_marks("{{ content.split('</think>') }}") == THINK
    assert reasoning_marks("{{ messages }}") is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", "{}"),
        (', "arguments": null', "{}"),
        (', "arguments": ""', "{}"),
        (', "arguments": {"a": 1}', '{"a": 1}'),
        (', "arguments": "{\\"a\\": 1}"', '{"a": 1}'),
        (', "arguments": "null"', None),
        (', "arguments": "a"', None),
        (', "arguments": [1]', None),
        (', "arguments": 1', None),
    ],
)
def test_the_arguments_of_a_call_are_an_object(written: str, read: str | None) -> None:
    found = read_call(f'{{"name": "f"{written}}}', TAGGED, {"f"})
    assert found == (None if read is None else {"name": "f", "arguments": read})
    found = read_call(f'{{"name": "f"{written.replace("arguments", "parameters")}}}', BARE, {"f"})
    assert found == (None if read is None else {"name": "f", "arguments": read})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"name": 1}',
        '{"name": ["f"]}',
        '{"arguments": {}}',
        '{"name": "g"}',
        pytest.param("[" * 99_999, id="brackets"),
    ],
)
def test_what_calls_no_function_that_was_offered_is_no_call(text: str) -> None:
    assert read_call(text, TAGGED, {"f"}) is None


def test_the_grammar_of_calls_is_one() -> None:
    from llguidance import LLMatcher

    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = tuple({"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", "g"))
    for form in (TAGGED, BARE):
        for choice in ("required", "function:f"):
            grammar = call_grammar(form, tools, choice)
            assert LLMatcher.validate_grammar(grammar) == ""
            assert ("g" in names(grammar)) is (choice == "required")


def names(grammar: str) -> set[str]:
    """The functions that may be called."""
    return set(re.findall(r'\\"name\\":\\"(\w+)\\"', grammar))


REFERRING: list[dict[str, Any]] = [
    {
        "properties": {"color": {"$ref": "#/$defs/Color"}},
        "required": ["color"],
        "additionalProperties": False,
        "$defs": {"Color": {"enum": ["red", "green"], "type": "string"}},
    },
    {
        "$ref": "#/definitions/Paint",
        "definitions": {
            "Color": {"const": "red"},
            "Paint": {
                "type": "object",
                "properties": {"color": {"$ref": "#/definitions/Color"}},
                "required": ["color"],
            },
        },
    },
    {
        "type": "object",
        "properties": {"color": {"type": "string", "maxLength": 3}, "other": {"$ref": "#/properties/color"}},
        "required": ["color"],
    },
    {"type": "object", "properties": {"color": {"type": "string", "maxLength": 3}, "under": {"$ref": "#"}}},
]


@pytest.mark.parametrize("form", [TAGGED, BARE])
@pytest.mark.parametrize("schema", REFERRING)
def test_schemas_that_refer_to_their_own_parts_hold_the_arguments(schema: dict[str, Any], form: ToolFormat) -> None:
    other = {"$ref": "#/$defs/Color", "$defs": {"Color": {"type": "object", "properties": {}}}}  # of the same name
    tools = tuple(
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in (("f", schema), ("g", other))
    )
    grammar = call_grammar(form, tools, "required")
    for name, arguments, right in (("f", {"color": "red"}, True), ("f", {"color": "blue"}, False), ("g", {}, True)):
        call = json.dumps({"name": name, form.arguments: arguments}, separators=(",", ":"))
        assert accepted(grammar, f"{form.begin}\n{call}\n{form.end}" if form.begin else call) is right


def accepted(grammar: str, text: str) -> bool:
    """Whether the grammar takes this text as a whole. Each byte is a token, and the end is token 256."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [*text.encode(), 256]
    return bool(matcher.validate_tokens(tokens) == len(tokens))


class Bytes:
    """What llguidance needs of a tokenizer."""

    bos_token_id = None
    eos_token_id = 256
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
