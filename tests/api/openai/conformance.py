"""How the API fares in llm-comply, a conformance suite for OpenAI's API, and in OpenAI's own description of it.

What is expected stands here once: the test holds it against a run, and README's table is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One case of llm-comply 0.5.0. ``differs`` tells why what it wants is not what happens; "" where it passes."""

    id: str
    what: str
    differs: str = ""


CASES = (
    Case("chat-basic-response", "a question, an answer, its usage"),
    Case("chat-system-prompt", "a system message"),
    Case("chat-multi-turn", "a conversation"),
    Case("chat-tool-calling", "tools, with tool_choice required"),
    Case("chat-streaming-response", "a stream, its end and [DONE]"),
    Case("chat-streaming-usage", "a stream's usage with include_usage"),
    Case("chat-image-input", "an image in a message", "refused by name: the models read text"),
    Case(
        "chat-reasoning-summary", "reasoning.summary", "left out by the suite itself for models that are not OpenAI's"
    ),
    Case("chat-error-handling", "no model is named, which is to be refused", "the loaded model answers"),
)

# What answers, by the name that it has in OpenAI's OpenAPI description; each is held against that, field by field, and
# against the types of OpenAI's Python client, in which no field may be missing and none beside them stand.
SHAPES = (
    ("CreateChatCompletionResponse", "an answer, with log probabilities, with tool calls, of two choices"),
    ("CreateChatCompletionStreamResponse", "every event of a stream"),
    ("CreateCompletionResponse", "a completion, and every event of its stream"),
    ("ListModelsResponse", "the list of models"),
    ("ErrorResponse", "an error"),
)


def table() -> str:
    """Both in Markdown."""
    rows = ["| checked | result |", "|---|---|"]
    rows += [f"| `{case.id}`: {case.what} | {case.differs or 'passes'} |" for case in CASES]
    rows += [f"| OpenAI's `{name}`: {what} | fits |" for name, what in SHAPES]
    return "\n".join(rows)
