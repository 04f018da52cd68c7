"""How a model's chat template writes a call of a function: how to force one, and how to read one."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from modules.errors import UnsupportedParameter


@dataclass(frozen=True)
class ToolFormat:
    """A call is ``begin``, one JSON object of ``name`` and :attr:`arguments`, ``end``. Without tags it is the whole
    answer."""

    begin: str
    end: str
    arguments: str = "arguments"


TAGGED = ToolFormat("<tool_call>", "</tool_call>")  # Hermes, Qwen, SmolLM3 and others
BARE = ToolFormat("", "", "parameters")  # Llama 3.1 and later


def tool_format(template: str) -> ToolFormat:
    """The form that this chat template teaches. Raises UnsupportedParameter for one that cannot be read."""
    if "tools" not in template:
        raise UnsupportedParameter("tools: the model's chat template knows none.", "Choose a model that calls tools.")
    if TAGGED.begin in template and "<function=" not in template and "<arg_key>" not in template:
        return TAGGED
    if '"parameters"' in template and '"name"' in template:
        return BARE
    raise UnsupportedParameter(
        "tools: the model writes its calls in a form that Loadstone does not read.",
        "It reads <tool_call>{JSON}</tool_call> and Llama's bare JSON.",
    )


def call_grammar(form: ToolFormat, tools: tuple[dict[str, Any], ...], choice: str) -> str:
    """llguidance's grammar for one call: of the function that ``choice`` names, or of any for "required".

    Each one's arguments are a JSON grammar of their own, since a schema's references (``#/$defs/…``) begin at its root.
    """
    wanted = choice.removeprefix("function:") if choice.startswith("function:") else None
    functions = [tool["function"] for tool in tools if wanted in (None, tool["function"]["name"])]
    begin, end = (f'"{form.begin}\\n" ', f' "\\n{form.end}"') if form.begin else ("", "")
    rules = [f"start: {begin}call{end}", "call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
    for at, function in enumerate(functions):
        front = f'{{"name":{json.dumps(function["name"])},"{form.arguments}":'
        rules.append(f'call_{at}: {json.dumps(front)} arguments_{at} "}}"')
        rules.append(f"arguments_{at}: %json {json.dumps(_arguments_schema(function))}")
    return "\n".join(rules) + "\n"


def _arguments_schema(function: dict[str, Any]) -> dict[str, Any]:
    """Of an object, whose spaces are written in one way: a small model would otherwise write them for ever."""
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    return {**schema, "x-guidance": {"whitespace_flexible": False}}


def read_call(text: str, form: ToolFormat, offered: Collection[str]) -> dict[str, str] | None:
    """The call that ``text`` writes: its name, and its arguments as JSON of an object, which callers unpack.

    None where it writes none, or not of a function that was ``offered``: what is JSON by itself may be an answer.
    """
    call = _parsed(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in offered:
        return None
    arguments = call.get(form.arguments, call.get("arguments"))
    if isinstance(arguments, str) and isinstance(_parsed(arguments), dict):
        return {"name": call["name"], "arguments": arguments}
    if arguments in (None, ""):
        arguments = {}  # as models write for functions that take none
    if not isinstance(arguments, dict):
        return None
    return {"name": call["name"], "arguments": json.dumps(arguments)}


def _parsed(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
