"""From a request's body to orders for the model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from modules.api.openai.bodies import ChatBody, CompletionBody, Message, Sampling, ToolChoice
from modules.api.openai.reaching import Target
from modules.errors import OptionError, UnsupportedParameter
from modules.options import GENERATION_OPTIONS
from modules.protocol import GenerateOrder, Shape
from modules.service import Service

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_MOST_SEED = int(GENERATION_OPTIONS["seed"].high or 0)


def chat_orders(service: Service, body: ChatBody, target: Target) -> list[GenerateOrder]:
    """One order a choice. Raises UserError for what the body asks for and cannot have."""
    wanted = body.max_completion_tokens or body.max_tokens  # else as many as the context holds: it ends by itself
    if body.top_logprobs is not None and not body.logprobs:
        raise OptionError("top_logprobs: needs logprobs: true.")
    order = GenerateOrder(
        service.generation(_values(body, wanted or target.loaded.order.ctx_tokens)),
        messages=tuple(_message(message) for message in body.messages),
        adapters=target.adapters,
        whole=True,
        shape=replace(
            _shape(body),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            json_schema=_schema(body),
            template_values=_template_values(body),
            split=True,
            **_tools(body),
        ),
    )
    return _choices(order, body)


def completion_orders(service: Service, body: CompletionBody, target: Target) -> list[GenerateOrder]:
    """One order a choice, all choices of a prompt together. Raises UserError as :func:`chat_orders` does."""
    if body.best_of not in (None, body.n or 1):
        raise UnsupportedParameter("best_of: only the value of n is supported.")
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameter("logprobs: a prompt's own are not told; leave out echo or logprobs.")
    order = GenerateOrder(
        service.generation(_values(body, body.max_tokens or _DEFAULT_COMPLETION_TOKENS)),
        adapters=target.adapters,
        whole=True,
        shape=replace(_shape(body), logprobs=body.logprobs),
    )
    return [choice for prompt in prompts(body) for choice in _choices(_prompted(order, prompt), body)]


def prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, each a text or token ids. Raises OptionError for none."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or [] in prompt:
        raise OptionError("prompt: an empty list is none.")
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def _values(body: Sampling, max_new_tokens: int) -> dict[str, Any]:
    """The generation options that the body sets, by name."""
    high = int(GENERATION_OPTIONS["max_new_tokens"].high or max_new_tokens)
    given = {name: value for name in GENERATION_OPTIONS if (value := getattr(body, name, None)) is not None}
    if given.get("top_p") == 0:
        given["top_p"] = 1e-6  # OpenAI takes 0 for: the likeliest token alone
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if given.get("seed") not in (None, -1):  # -1: a new one each time
        given["seed"] = given["seed"] % _MOST_SEED
    return {**given, "max_new_tokens": min(max_new_tokens, high)}


def _shape(body: Sampling) -> Shape:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stops:
        raise OptionError("stop: an empty text is none.")
    return Shape(
        stops=tuple(stops),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=dict(body.logit_bias or {}),
    )


def _choices(order: GenerateOrder, body: Sampling) -> list[GenerateOrder]:
    """``n`` orders; with a seed each has one of its own, so that they differ and come again."""
    seed = order.options.seed
    seeds = [seed if seed < 0 else (seed + choice) % _MOST_SEED for choice in range(body.n or 1)]
    return [replace(order, options=replace(order.options, seed=one)) for one in seeds]


def _prompted(order: GenerateOrder, prompt: str | list[int]) -> GenerateOrder:
    return replace(order, prompt=prompt) if isinstance(prompt, str) else replace(order, prompt_ids=tuple(prompt))


def _message(message: Message) -> dict[str, Any]:
    """As chat templates read it: arguments as data, not as JSON's text."""
    role = "system" if message.role == "developer" else message.role
    data: dict[str, Any] = {"role": role, "content": message.text}
    if message.name:
        data["name"] = message.name
    if message.tool_call_id:
        data["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        data["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return data


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        raise OptionError("messages: the arguments of a tool call are no JSON.") from None


def _schema(body: ChatBody) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if body.tools and body.tool_choice != "none":
        raise UnsupportedParameter("response_format: not together with tools.")
    if form.type == "json_object":
        return {}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise OptionError("response_format: json_schema needs a schema.")
    return form.json_schema.schema_


def _tools(body: ChatBody) -> dict[str, Any]:
    """The fields of Shape that tell of tools."""
    names = [tool.function.name for tool in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            raise OptionError(f"tool_choice: no tool is named {choice.function.name!r}.")
        choice_text = f"function:{choice.function.name}"
    else:
        choice_text = choice or "auto"
    if choice_text == "required" and not names:
        raise OptionError("tool_choice: required needs tools.")
    if not names or choice_text == "none":
        return {}
    return {
        "tools": tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
        "tool_choice": choice_text,
    }


def _template_values(body: ChatBody) -> dict[str, Any]:
    values = dict(body.chat_template_kwargs or {})
    for taken in ("messages", "tools", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message"):
        if taken in values:
            raise UnsupportedParameter(f"chat_template_kwargs: {taken} is not yours to set.")
    if body.reasoning_effort is not None:
        values["reasoning_effort"] = body.reasoning_effort
    return values
