"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.openai.bodies import ChatBody
from modules.api.openai.orders import chat_orders
from modules.api.openai.reaching import Target, reached
from modules.api.openai.running import Collected, Lane, Running, collect
from modules.api.openai.shapes import finish_reason, head, token_bytes, usage
from modules.api.openai.streaming import Events, stream
from modules.protocol import Done, Piece
from modules.service import Service


def router(service: Service, lane: Lane) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        loop = asyncio.get_running_loop()

        def begin(target: Target) -> Running:
            orders = chat_orders(service, body, target)
            return Running(service, lane, orders, request, target.use, loop, body.n or 1)

        async with reached(service, body.model, body.keep_alive, request, begin) as (target, running):
            name = body.model or target.use.name
        if body.stream:
            return await stream(_events(running, body, name))
        return JSONResponse(_whole(await collect(running), body, name))

    return routes


def _whole(answers: Sequence[Collected], body: ChatBody, name: str) -> dict[str, Any]:
    return {
        **head("chat.completion", "chatcmpl", name),
        "choices": [_choice(index, answer, body) for index, answer in enumerate(answers)],
        "usage": usage((answer.end for answer in answers), body.n or 1),
    }


def _choice(index: int, answer: Collected, body: ChatBody) -> dict[str, Any]:
    calls = _calls(answer.end, body)
    content = answer.text or (None if calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer.pieces) if body.logprobs else None,
        "finish_reason": finish_reason(answer.end),
    }


def _calls(end: Done, body: ChatBody) -> list[dict[str, Any]]:
    """The calls of tools; the first alone where no more are wanted at a time."""
    wanted = end.tool_calls[:1] if body.parallel_tool_calls is False else end.tool_calls
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": dict(call)} for call in wanted]


def _logprobs(pieces: Sequence[Piece]) -> dict[str, Any]:
    def token(one: dict[str, Any]) -> dict[str, Any]:
        return {"token": one["token"], "logprob": one["logprob"], "bytes": token_bytes(one["token"])}

    told = [one for piece in pieces for one in piece.logprobs]
    content = [{**token(one), "top_logprobs": [token(other) for other in one["top"]]} for one in told]
    return {"content": content, "refusal": None}


async def _events(running: Running, body: ChatBody, name: str) -> Events:
    """The events of a stream: each choice's role first, then what comes, its end, and at last the usage."""
    begin = head("chat.completion.chunk", "chatcmpl", name)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        begin["usage"] = None
    ends: dict[int, Done] = {}
    greeted: set[int] = set()

    def event(index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return {**begin, "choices": [choice]}

    async with contextlib.aclosing(running.chunks()) as chunks:
        async for index, chunk in chunks:
            events = [] if index in greeted else [event(index, {"role": "assistant", "content": ""})]
            greeted.add(index)
            if isinstance(chunk, Piece):
                events.append(event(index, _delta(chunk), logprobs=_logprobs([chunk]) if body.logprobs else None))
            else:
                ends[index] = chunk
                if calls := _calls(chunk, body):
                    events.append(
                        event(index, {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]})
                    )
                events.append(event(index, {}, finish_reason=finish_reason(chunk)))
            yield events
    if with_usage:
        counted = usage((ends[index] for index in range(running.count)), body.n or 1)
        yield [{**begin, "choices": [], "usage": counted}]


def _delta(piece: Piece) -> dict[str, str]:
    delta = {"reasoning_content": piece.reasoning} if piece.reasoning else {}
    return {**delta, "content": piece.text} if piece.text or not delta else delta
