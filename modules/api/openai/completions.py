"""``/v1/completions``: a text, or token ids, continued as they stand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from modules.api.openai.bodies import MOST_PROMPTS, CompletionBody
from modules.api.openai.orders import completion_orders, prompts
from modules.api.openai.reaching import Target, reached
from modules.api.openai.running import Collected, Lane, Running, collect
from modules.api.openai.shapes import finish_reason, head, usage
from modules.api.openai.streaming import Events, stream
from modules.api.threads import Threads
from modules.errors import OptionError
from modules.protocol import Done, GenerateOrder, Piece
from modules.service import Service
from modules.service.asking import user_of
from modules.supervisor import Use

_MOST_DECODED = 4  # prompts at a time, for those who want them back as text


def router(service: Service, lane: Lane) -> APIRouter:
    """The route."""
    routes = APIRouter()
    threads = Threads(_MOST_DECODED, "echo")

    @routes.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        if len(prompts(body)) > MOST_PROMPTS:
            raise OptionError(f"prompt: at most {MOST_PROMPTS} at a time.")
        loop, user = asyncio.get_running_loop(), user_of(request.scope)

        def run(orders: Sequence[GenerateOrder], use: Use) -> Running:
            return Running(service, lane, orders, request, use, loop, body.n or 1)

        def begin(target: Target) -> tuple[Sequence[GenerateOrder], Running | None]:
            orders = completion_orders(service, body, target)
            return orders, None if body.echo else run(orders, target.use)

        async with reached(service, body.model, body.keep_alive, request, begin) as (target, (orders, running)):
            name = body.model or target.use.name
            fronts = ["" for _ in orders]
            if running is None:
                with lane.place(user):
                    work = partial(_prompts, service, orders, target.use)
                    fronts = await asyncio.wrap_future(threads.submit(user, work))
                running = await run_in_threadpool(run, orders, target.use)
        if body.stream:
            return await stream(_events(running, body, name, fronts))
        return JSONResponse(_whole(await collect(running), body, name, fronts))

    return routes


def _prompts(service: Service, orders: Sequence[GenerateOrder], use: Use) -> list[str]:
    """Each order's prompt as text; where several have the same, it is decoded once."""
    decoded = {ids: service.decode(ids, use) for ids in dict.fromkeys(order.prompt_ids for order in orders) if ids}
    return [decoded[order.prompt_ids] if order.prompt_ids else order.prompt for order in orders]


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


async def _events(running: Running, body: CompletionBody, name: str, fronts: Sequence[str]) -> Events:
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
            events = [event(index, fronts[index])] if fronts[index] and index not in echoed else []
            echoed.add(index)
            if isinstance(chunk, Done):
                ends[index] = chunk
                events.append(event(index, "", finish_reason=finish_reason(chunk)))
            else:
                logprobs = _logprobs([chunk], offsets[index]) if body.logprobs is not None else None
                offsets[index] += sum(len(one["token"]) for one in chunk.logprobs)
                events.append(event(index, chunk.text, logprobs=logprobs))
            yield events
    if with_usage:
        counted = usage((ends[index] for index in range(len(fronts))), body.n or 1)
        yield [{**begin, "choices": [], "usage": counted}]
