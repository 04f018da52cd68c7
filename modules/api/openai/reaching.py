"""The model that a request names, once it answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from modules.errors import AccessRefused, Cancelled, LoadPending, OptionError
from modules.protocol import AdapterChoice
from modules.service import Service
from modules.service.answering import KEEP_ALIVE, Reached
from modules.service.asking import user_of
from modules.supervisor import NEVER, Loaded, Use

T = TypeVar("T")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"-?(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")


@dataclass(frozen=True)
class Target:
    """A model that answers, held. ``adapters``: the LoRAs that the request names; None: the active set."""

    use: Use
    adapters: tuple[AdapterChoice, ...] | None

    @property
    def loaded(self) -> Loaded:
        return self.use.loaded


@contextlib.asynccontextmanager
async def reached(
    service: Service, model: str | None, keep_alive: float | str | None, request: Request,
    begin: Callable[[Target], T],
) -> AsyncIterator[tuple[Target, T]]:  # fmt: skip
    """The model that ``model`` names, held for as long as the block runs; it may have to be loaded first.

    With it comes what ``begin`` begins with it, on another thread than the event loop's: for a model that answers
    already, one turn of that thread does both. Raises what ``begin`` and :meth:`Answering.reach` raise and what the
    load failed with, LoadPending where it takes too long, AccessRefused for a guest's ``keep_alive``, and Cancelled
    when the client goes.
    """
    if keep_alive is not None and not _may_keep(request):
        raise AccessRefused(
            "keep_alive: how long a model stays is the administrator's to say.",
            "Leave it out, or send the key of --admin-key.",
        )
    user = user_of(request.scope)
    wanted, found = await run_in_threadpool(_at_once, service, model or "", seconds(keep_alive), user, begin)
    if found is None:
        use = await _awaited(wanted.use, wanted.name, service, request)
        found = await run_in_threadpool(_begun, service, wanted, use, begin)
    with found[0].use:
        yield found


def _may_keep(request: Request) -> bool:
    """As the door has written it down; without a door everybody may."""
    allowed = request.scope.get("auth")
    return allowed is None or KEEP_ALIVE in allowed.scopes


def _at_once(
    service: Service, model: str, keep_alive_s: float | None, user: str, begin: Callable[[Target], T]
) -> tuple[Reached, tuple[Target, T] | None]:
    """What the request names, and the rest unless it has to be loaded first."""
    wanted = service.reach(model, keep_alive_s, user)
    return wanted, _begun(service, wanted, wanted.use.result(), begin) if wanted.use.done() else None


def _begun(service: Service, wanted: Reached, use: Use, begin: Callable[[Target], T]) -> tuple[Target, T]:
    try:
        adapters = None if wanted.entries is None else service.loras.checked(wanted.entries, use.loaded)
        target = Target(use, adapters)
        return target, begin(target)
    except BaseException:
        use.release()
        raise


async def _awaited(future: Future[Use], name: str, service: Service, request: Request) -> Use:
    """The hold, as soon as it is there; no thread waits meanwhile."""
    waiting = asyncio.wrap_future(future)
    gone = asyncio.create_task(disconnected(request))
    try:
        both: set[asyncio.Future[Any]] = {waiting, gone}
        await asyncio.wait(both, timeout=service.server.load_wait, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            raise Cancelled("The client has gone.")
        raise LoadPending(f"{name} was not loaded within {service.server.load_wait} s.")
    finally:
        gone.cancel()
        if not waiting.done() and not future.cancel() and future.exception() is None:
            future.result().release()  # it came at this very moment


async def disconnected(request: Request) -> None:
    """Returns when the client has gone. The body has to be read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def seconds(keep_alive: float | str | None) -> float | None:
    """The seconds that Ollama's ``keep_alive`` means: a number of them, or "5m"; below 0: never. Raises OptionError."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        text = keep_alive.strip()
        try:
            value = float(text)
        except ValueError:
            if not _DURATION.fullmatch(text):
                raise _not_understood(keep_alive) from None
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
            value = sum(float(number) * _UNITS_S[unit] for number, unit in parts) * (-1 if text[0] == "-" else 1)
    else:
        value = float(keep_alive)
    if math.isnan(value):
        raise _not_understood(keep_alive)
    return NEVER if value < 0 else value


def _not_understood(keep_alive: float | str) -> OptionError:
    return OptionError(
        f"keep_alive: {str(keep_alive)[:40]!r} is no time.",
        'It takes seconds, or a text like "5m" or "1h30m"; 0: unload at once, -1: never.',
    )
