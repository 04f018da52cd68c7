"""The commands of a worker, by HTTP on loopback: the routes that :mod:`modules.protocol` lists."""

from __future__ import annotations

import asyncio
import hmac
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from modules.embeddings import EMBED, EmbedOrder
from modules.errors import AccessRefused, Busy, InternalError, LoadstoneError, NothingLoaded, Overloaded, UserError
from modules.perplexity import PERPLEXITY, PerplexityOrder
from modules.protocol import (
    ADAPTERS,
    COUNT,
    DECODE,
    ENCODE,
    GENERATE,
    LOAD,
    MEMORY,
    AdapterChoice,
    AdaptersOrder,
    AdaptersReport,
    Chunk,
    CountOrder,
    DecodeOrder,
    EncodeOrder,
    Event,
    Failed,
    GenerateOrder,
    LoadOrder,
    Memory,
    Progress,
    Ready,
    Warm,
    decode,
    encode,
)
from modules.training.messages import PREVIEW, PreviewOrder
from modules.worker.batching import Line, Ticket
from modules.worker.embedding import embed
from modules.worker.engine import Engine
from modules.worker.generation import Loaded, prompter
from modules.worker.perplexity import measure
from modules.worker.process import import_packages, memory_given_back, memory_of_this_process
from modules.worker.streaming import Answer
from modules.worker.telling import Tell, telling

if TYPE_CHECKING:
    from modules.worker.adapters import Adapters
    from modules.worker.batching.scheduler import Scheduler

T = TypeVar("T")
_TOKENIZING_WAIT_S = 20.0  # less than the web process waits for a short command


class Worker:
    """What the process holds: nothing, then one model. ``emit`` writes events to the web process."""

    def __init__(self, engine: Engine, emit: Callable[[Event], None]) -> None:
        self.engine = engine
        self.line = Line()
        self._emit = emit
        self._loaded: Loaded | None = None
        self._adapters: Adapters | None = None
        self._turns: Scheduler | None = None
        self._load_started = False
        self._tokenizing = threading.Lock()  # one text at a time: each takes a hundred times its size of memory

    def warm_up(self) -> None:
        """Import the ML packages, and no more: no GPU is touched. Emits Warm, or Failed."""
        begin = time.perf_counter()
        try:
            import_packages()
        except Exception as error:
            self._emit(Failed(_as_loadstone(error, "Importing the ML packages failed")))
        else:
            self._emit(Warm(time.perf_counter() - begin))

    def load(self, order: LoadOrder) -> None:
        """Begin to load, after the warm-up. Raises Busy for a second load: a process loads one model in its life."""
        if self._load_started:
            raise Busy("This process has been given a model already.", "Each model gets a process of its own.")
        self._load_started = True
        self.engine.submit(self._load, order)

    def _load(self, order: LoadOrder) -> None:
        try:
            import_packages()
            from modules.worker.transformers_loader import load

            with memory_given_back():
                loaded = load(order, self._emit_progress)
            applied = None
            if order.adapters:
                self._emit(Progress("applying LoRAs"))
                self._adapters = _adapters(loaded)
                applied = self._adapters.apply(order.adapters)
            self._turns = self._scheduler(loaded)
            self.engine.take_turns(self._turns)
            self._loaded = loaded
            self._emit(Ready(loaded.report, self.memory(), applied))
        except Exception as error:
            self._emit(Failed(_translated(error, order)))

    def _scheduler(self, loaded: Loaded) -> Scheduler:
        from modules.worker.batching.scheduler import Scheduler  # torch and transformers

        def active() -> tuple[AdapterChoice, ...]:
            return self._adapters.active if self._adapters is not None else ()

        return Scheduler(loaded, self.line, partial(self._using, loaded), active)

    def _emit_progress(self, progress: Progress) -> None:
        self._emit(progress)

    def loaded(self) -> Loaded:
        """The model. Raises NothingLoaded where there is none, or none yet."""
        if self._loaded is None:
            raise NothingLoaded("This process holds no model yet.")
        return self._loaded

    def generate(self, order: GenerateOrder, emit: Callable[[Chunk], None], stopped: threading.Event) -> Ticket:
        """Ask for an answer; it waits for its turn until it leaves the line. Raises NothingLoaded."""
        self.loaded()
        ticket = Ticket(self.engine.number(), order, emit, stopped)
        self.line.add(ticket)
        self.engine.wake()
        return ticket

    def alone(self) -> bool:
        """Whether one answer at most is under way. Asked on the engine's thread."""
        return self._turns is None or self._turns.alone

    def _using(self, loaded: Loaded, choices: tuple[AdapterChoice, ...] | None) -> AbstractContextManager[None]:
        if self._adapters is None and not choices:
            return nullcontext()
        self._adapters = self._adapters or _adapters(loaded)
        return self._adapters.using(choices)

    def apply(self, order: AdaptersOrder) -> Future[AdaptersReport]:
        """Queue a change of LoRAs behind the answers that were asked for earlier. Raises NothingLoaded."""
        return self.engine.submit(self._apply, self.loaded(), order)

    def _apply(self, loaded: Loaded, order: AdaptersOrder) -> AdaptersReport:
        self._adapters = self._adapters or _adapters(loaded)
        return self._adapters.apply(order.adapters)

    def measure(self, order: PerplexityOrder, tell: Tell, stopped: threading.Event) -> None:
        """Queue a measurement of perplexity: its windows come between the turns of those who are answered."""
        loaded = self.loaded()
        measure(loaded, order, partial(self._using, loaded), self.engine, tell, stopped)

    def embed(self, order: EmbedOrder, tell: Tell, stopped: threading.Event) -> None:
        """Queue texts to be embedded: their batches come between the turns of those who are answered."""
        loaded = self.loaded()
        embed(loaded, order, partial(self._using, loaded), self.engine, tell, stopped)

    def count(self, order: CountOrder) -> int:
        """How many tokens the prompt has. Does not wait for a generation."""
        with self._one_at_a_time():
            return prompter(self.loaded()).count(order)

    def encode(self, order: EncodeOrder) -> list[int]:
        """The token ids of a text. Does not wait for a generation."""
        with self._one_at_a_time():
            return prompter(self.loaded()).encode(order.text)

    def decode(self, order: DecodeOrder) -> str:
        """The text of token ids. Does not wait for a generation."""
        with self._one_at_a_time():
            return prompter(self.loaded()).decode(order.tokens)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Raises Overloaded where others' texts take longer than the web process waits."""
        if not self._tokenizing.acquire(timeout=_TOKENIZING_WAIT_S):
            raise Overloaded(f"Others' texts have been in the tokenizer for {_TOKENIZING_WAIT_S:g} s.")
        try:
            yield
        finally:
            self._tokenizing.release()

    def preview(self, order: PreviewOrder) -> str:
        """How data to train on will look to the model. Does not wait for a generation."""
        from modules.worker.training.preview import preview

        loaded = self.loaded()
        return encode(preview(order, loaded.model, loaded.tokenizer)).decode()

    def memory(self) -> Memory:
        """What the process holds now, GPUs included once a model is loaded."""
        rss_bytes, peak_rss_bytes = memory_of_this_process()
        gpu_bytes, gpu_peak_bytes = _gpu_bytes() if self._loaded else ((), ())
        return Memory(rss_bytes, peak_rss_bytes, gpu_bytes, gpu_peak_bytes, os.getpid())


def _adapters(loaded: Loaded) -> Adapters:
    from modules.worker.adapters import Adapters  # peft, which takes seconds to import: only where it is needed

    return Adapters(loaded.model, loaded.tokenizer, loaded.order)


def _gpu_bytes() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What torch has reserved on each GPU now, and at most. Creates no context on a GPU."""
    cuda = sys.modules["torch"].cuda
    if not cuda.is_initialized():
        return (), ()
    gpus = range(cuda.device_count())
    return tuple(int(cuda.memory_reserved(g)) for g in gpus), tuple(int(cuda.max_memory_reserved(g)) for g in gpus)


def _as_loadstone(error: Exception, what: str) -> LoadstoneError:
    """``error`` for the web process, where the translation itself may be what could not be imported."""
    if isinstance(error, LoadstoneError):
        return error
    import traceback

    details = "".join(traceback.format_exception(error))
    return InternalError(f"{what}: {type(error).__name__}: {error}", details=details)


def _translated(error: Exception, order: LoadOrder) -> LoadstoneError:
    try:
        from modules.worker.failures import translate
    except Exception:
        return _as_loadstone(error, f"{order.name} could not be loaded")
    return translate(error, order)


class Secret:
    """Refuses every request that does not bring the secret of Hello."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._expected):  # takes as long, whatever is right about it
            error = AccessRefused("The request does not bring this worker's secret.", "Ask the web process instead.")
            await _refusal(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refusal(error: LoadstoneError) -> JSONResponse:
    return JSONResponse(error.to_dict(), status_code=error.status)


async def _refuse(_: Request, error: Exception) -> Response:
    return _refusal(_as_loadstone(error, "A command failed"))


async def _order(request: Request, kind: type[T]) -> T:
    """The order in the request's body. Raises UserError where there is none of that kind."""
    try:
        order = decode(await request.body())
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"This is no {kind.__name__}: {error}", "See modules/protocol.py.") from None
    if not isinstance(order, kind):
        raise UserError(f"This is no {kind.__name__} but a {type(order).__name__}.", "See modules/protocol.py.")
    return order


async def _applied(worker: Worker, order: AdaptersOrder) -> AdaptersReport:
    """Raises Busy where an answer keeps the model longer than the order may wait; nothing is changed then."""
    job = worker.apply(order)
    waiting = asyncio.wrap_future(job)
    await asyncio.wait({waiting}, timeout=order.wait_s)
    if not job.done() and job.cancel():  # only what still stands in the queue can be cancelled
        raise Busy(
            f"The LoRAs have to wait: an answer has been in the making for {order.wait_s:g} s.",
            "Stop the answer, or try again when it is there. Nothing was changed.",
        )
    return await waiting


def _quick(command: Callable[[T], Any], kind: type[T], key: str) -> Callable[[Request], Awaitable[Response]]:
    """The handler of a command that waits for no generation; its result is answered under ``key``."""

    async def answer(request: Request) -> Response:
        order = await _order(request, kind)
        return JSONResponse({key: await run_in_threadpool(command, order)})

    return answer


def make_app(worker: Worker, secret: str) -> ASGIApp:
    """The ASGI app with the routes of the protocol, behind the secret."""

    async def load(request: Request) -> Response:
        worker.load(await _order(request, LoadOrder))
        return Response(status_code=202)

    async def generate(request: Request) -> ASGIApp:
        worker.loaded()
        return Answer(worker, await _order(request, GenerateOrder))

    async def adapters(request: Request) -> Response:
        report = await _applied(worker, await _order(request, AdaptersOrder))
        return Response(encode(report), media_type="application/json")

    async def perplexity(request: Request) -> Response:
        worker.loaded()
        return telling(partial(worker.measure, await _order(request, PerplexityOrder)))

    async def embeddings(request: Request) -> Response:
        worker.loaded()
        return telling(partial(worker.embed, await _order(request, EmbedOrder)))

    async def memory(_: Request) -> Response:
        return Response(encode(worker.memory()), media_type="application/json")

    routes = [
        Route(LOAD, load, methods=["POST"]),
        Route(GENERATE, generate, methods=["POST"]),
        Route(ADAPTERS, adapters, methods=["POST"]),
        Route(COUNT, _quick(worker.count, CountOrder, "tokens"), methods=["POST"]),
        Route(PREVIEW, _quick(worker.preview, PreviewOrder, "preview"), methods=["POST"]),
        Route(ENCODE, _quick(worker.encode, EncodeOrder, "tokens"), methods=["POST"]),
        Route(DECODE, _quick(worker.decode, DecodeOrder, "text"), methods=["POST"]),
        Route(PERPLEXITY, perplexity, methods=["POST"]),
        Route(EMBED, embeddings, methods=["POST"]),
        Route(MEMORY, memory, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {LoadstoneError: _refuse, Exception: _refuse}
    return Secret(Starlette(routes=routes, exception_handlers=handlers), secret)
