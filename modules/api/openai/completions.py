"""``/v1/completions``: a text, or token ids, continued as they stand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.openai.bodies import MOST_PROMPTS, CompletionBody
from modules.api.openai.orders import completion_orders, prompts
from modules.api.openai.reaching import Target, reached
from modules.api.openai.running import Collected, Lane, Running, collect
from modules.api.openai.shapes import finish_reason, head, usage
from modules.api.openai.streaming import stream
from modules.errors import OptionError
from modules.protocol import Done, GenerateOrder, Piece
from modules.service import Service
from modules.supervisor import Use


def router(service: Service, lane: Lane) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        if len(prompts(body)) > MOST_PROMPTS:
            raise OptionError(f"prompt: at most {MOST_PROMPTS} at a time.")
        loop = asyncio.get_running_loop()

        def begin(target: Target) -> tuple[Running, list[str]]:
            orders = completion_orders(service, body, target)
            fronts = _fronts(service, body, orders, target.use)
            return Running(service, lane, orders, request, target.use, loop, body.n or 1), fronts

        async with reached(service, body.model, body.keep_alive, request, begin) as (target, (running, fronts)):
            name = body.model or target.use.name
        if body.stream:
            return await stream(_events(running, body, name, fronts))
        return JSONResponse(_whole(await collect(running), body, name, fronts))

    return routes


def _fronts(service: Service, body: CompletionBody, orders: Sequence[GenerateOrder], use: Use) -> list[str]:
    """What stands before each answer: its prompt where ``echo`` asks for it."""
    if not body.echo:
        return ["" for _ in orders]
    return [service.decode(order.prompt_ids, use) if order.prompt_ids else order.prompt for order in orders]


def _whole(answers: Sequence[Collected], body: CompletionBody, name: str, fronts: Sequence[str]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": fronts[index] + answer.text,
            "logprobs": _logprobs(answer.pieces, 0) if body.logprobs is not None else None,
            "finish_reason": finish_reason(answer.end),
        }
        for index, answer in enumerate(answers)
    ]
    counted = usage((answer.end for answer in answers), body.n or 1)
    return {**head("text_completion", "cmpl", name), "choices": choices, "usage": counted}


def _logprobs(pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
    """OpenAI's older form. ``offset``: of the first token in the answer's text, in characters."""
    told = [one for piece in pieces for one in piece.logprobs]
    offsets = []
    for one in told:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{other["token"]: other["logprob"] for other in one["top"]} for one in told],
        "text_offset": offsets,
    }


async def _events(
    running: Running, body: CompletionBody, name: str, fronts: Sequence[str]
) -> AsyncIterator[dict[str, Any]]:
    begin = head("text_completion", "cmpl", name)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        begin["usage"] = None
    ends: dict[int, Done] = {}
    offsets = [0 for _ in fronts]
    echoed: set[int] = set()

    def event(index: int, text: str, **rest: Any) -> dict[str, Any]:
        return {**begin, "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": None, **rest}]}

    async with contextlib.aclosing(running.chunks()) as chunks:
        async for index, chunk in chunks:
            if fronts[index] and index not in echoed:
                echoed.add(index)
                yield event(index, fronts[index])
            if isinstance(chunk, Done):
                ends[index] = chunk
                yield event(index, "", finish_reason=finish_reason(chunk))
                continue
            logprobs = _logprobs([chunk], offsets[index]) if body.logprobs is not None else None
            offsets[index] += sum(len(one["token"]) for one in chunk.logprobs)
            yield event(index, chunk.text, logprobs=logprobs)
    if with_usage:
        counted = usage((ends[index] for index in range(len(fronts))), body.n or 1)
        yield {**begin, "choices": [], "usage": counted}
