"""What OpenAI's clients send. A field that stands in no class here is refused by its name, unless it is null or a
message's own: null asks for nothing, and a message comes out of the client's history, with what it notes there.

Each thing that is wrong becomes an error of 1 kB, 300 times the bytes that were sent, so what can hold millions of them
stops at the first (lists) or is counted before it is looked at (objects).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_MESSAGES = 10_000
MOST_PARTS = 20_000  # texts and calls of tools, of all messages together
MOST_CHOICES = 16
MOST_PROMPTS = 32
MOST_INPUTS = 2048  # to be embedded; as OpenAI
MOST_FIELDS = 2000  # of one JSON object

FIRST = Field(fail_fast=True)


def _not_too_many(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_many", "{count} fields are too many", {"count": len(value)})
    return value


def _few_parts(messages: Any) -> Any:
    known = messages[:MOST_MESSAGES] if isinstance(messages, list) else []
    held = [value for one in known if isinstance(one, dict) for value in (one.get("content"), one.get("tool_calls"))]
    count = sum(len(value) for value in held if isinstance(value, list))
    if count > MOST_PARTS:
        raise PydanticCustomError("too_many", "{count} parts of messages are too many", {"count": count})
    return messages


Few = BeforeValidator(_not_too_many)
FewParts = BeforeValidator(_few_parts)
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = str | Annotated[list[str], Field(max_length=16)] | None
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], FIRST]


class Body(BaseModel):
    """Takes its own fields alone."""

    # Any bound, even none at all, makes pydantic refuse a text that is no Unicode, which no tokenizer takes.
    model_config = ConfigDict(extra="forbid", strict=False, str_min_length=0)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        """The fields that ask for something. Raises PydanticCustomError for too many."""
        few = _not_too_many(value)
        return {name: one for name, one in few.items() if one is not None} if isinstance(few, dict) else few


class StreamOptions(Body):
    """``include_obfuscation`` pads OpenAI's events; here none are padded: it is taken and changes nothing."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Noted(Body):
    """Out of a client's history: what else it has noted there is taken and not looked at."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Noted):
    type: Literal["text"]
    text: str


class RefusalPart(Noted):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Noted):
    name: str
    arguments: str


class ToolCall(Noted):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Noted):
    """An assistant's ``reasoning_content`` is not shown to the model again; its ``refusal`` is where it said nothing
    else."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], FIRST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What chat and completions share. ``top_k``, ``min_p`` and ``repetition_penalty`` are not OpenAI's;
    ``keep_alive`` is Ollama's: how long the model stays loaded after this request.

    ``user``, ``metadata``, ``safety_identifier``, ``prompt_cache_key`` and ``prompt_cache_retention`` name somebody or
    something and change no answer: they are taken and not kept.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1: off, as vLLM's and llama.cpp's
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=3)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Few] | None = None
    seed: int | None = None
    stop: Stops = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Few] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    keep_alive: float | str | None = None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True), FewParts]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: Annotated[list[Literal["text"]], FIRST] | None = None
    store: Literal[False] | None = None


class CompletionBody(Sampling):
    prompt: str | Annotated[list[str], FIRST] | TokenIds | Annotated[list[TokenIds], FIRST]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: None = None


class EmbeddingBody(Body):
    input: (
        str
        | Annotated[list[str], Field(max_length=MOST_INPUTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MOST_INPUTS, fail_fast=True)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    keep_alive: float | str | None = None
