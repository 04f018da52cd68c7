"""Orders under way for one request, stopped when its client goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from starlette.requests import Request

from modules.api.openai.reaching import disconnected
from modules.errors import Cancelled, InternalError, LoadstoneError, OptionError, Overloaded
from modules.protocol import Chunk, Done, GenerateOrder, Piece
from modules.service import Service, Stop
from modules.service.asking import share, user_of
from modules.service.traffic import seen_of
from modules.supervisor import Use

log = logging.getLogger(__name__)


MOST_ANSWERS = 256  # under way and waiting; each holds a thread


class Lane:
    """How many answers are under way and waiting, of all requests together.

    A user holds no more than half of the places that the others leave: however much one asks for, the next one finds
    as many again.
    """

    def __init__(self, most: int = MOST_ANSWERS) -> None:
        self._most = most
        self._inside: Counter[str] = Counter()  # by user
        self._lock = threading.Lock()

    def enter(self, user: str, count: int) -> None:
        """Take ``count`` places. Raises Overloaded where not so many are free, OptionError where there never are."""
        if count > (most := share(self._most, 0)):
            raise OptionError(f"n: {count} answers are asked for, and no more than {most} are given at a time.")
        with self._lock:
            all_inside, inside = self._inside.total(), self._inside[user]
            if all_inside + count > self._most:
                raise Overloaded(f"{all_inside} answers are waited for, and no more than {self._most} may be.")
            most = share(self._most, all_inside - inside)
            if inside + count > most:
                raise Overloaded(
                    f"You wait for {inside} answers, and no more than {most} may be yours: the other places are kept "
                    "for other users.",
                    "Wait for some of them to come.",
                )
            self._inside[user] += count

    @contextlib.contextmanager
    def place(self, user: str) -> Iterator[None]:
        """One place meanwhile. Raises as :meth:`enter`."""
        self.enter(user, 1)
        try:
            yield
        finally:
            self.leave(user)

    def leave(self, user: str) -> None:
        """Give one place back."""
        with self._lock:
            self._inside[user] -= 1
            if not self._inside[user]:
                del self._inside[user]


class Running:
    """The answers to several orders as they come, from threads of their own to the event loop.

    May be made on any thread. Raises Overloaded where too many are waited for already, and OptionError for more than
    ever may be.
    """

    def __init__(
        self, service: Service, lane: Lane, orders: Sequence[GenerateOrder], request: Request, use: Use,
        loop: asyncio.AbstractEventLoop, choices_a_prompt: int = 1,
    ) -> None:  # fmt: skip
        self._user = user_of(request.scope)
        lane.enter(self._user, len(orders))
        self._lane = lane
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Chunk | LoadstoneError]] = asyncio.Queue()  # of (choice, what came)
        self._stop = Stop()
        self._request = request
        self._seen = seen_of(request.scope)
        self._seen.model = use.name
        self._choices_a_prompt = choices_a_prompt
        self.count = self._left = len(orders)
        for index, order in enumerate(replace(order, user=self._user) for order in orders):
            self._start(service, index, order, use.again())

    def _start(self, service: Service, index: int, order: GenerateOrder, held: Use) -> None:
        """``held`` until this answer is there, however long the response takes. Raises Overloaded for want of threads:
        then those that have been started end, and the places of the rest are given back.
        """
        thread = threading.Thread(target=self._run, args=(service, index, order, held), name="api-answer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            log.exception("no thread for an answer")
            self._stop.set()
            held.release()
            for _ in range(index, self.count):
                self._lane.leave(self._user)
            raise Overloaded("This machine has no thread left for a further answer.") from None

    def _run(self, service: Service, index: int, order: GenerateOrder, use: Use) -> None:
        try:
            for chunk in service.stream(order, self._stop, use):
                self._tell(index, chunk)
                if isinstance(chunk, Done):
                    return
            raise InternalError("An answer has no end.")
        except LoadstoneError as error:
            self._tell(index, error)
        except Exception as error:
            log.exception("an answer failed")
            self._tell(index, InternalError(f"{type(error).__name__}: {error}"))
        finally:
            use.release()
            self._lane.leave(self._user)

    def _tell(self, index: int, chunk: Chunk | LoadstoneError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, chunk))

    async def chunks(self) -> AsyncGenerator[tuple[int, Piece | Done], None]:
        """(choice, chunk) until all have ended. Raises what an order failed with, and Cancelled when the client goes.

        Leaving the loop over it early stops what is still under way.
        """
        gone = asyncio.create_task(self._tell_when_gone())
        try:
            while self._left:
                index, chunk = await self._queue.get()
                self._note(index, chunk)
                if isinstance(chunk, LoadstoneError):
                    raise chunk
                if isinstance(chunk, Done):
                    self._left -= 1
                    if chunk.finish_reason == "cancelled":
                        raise Cancelled("The answer was stopped.")
                if isinstance(chunk, Piece | Done):
                    yield index, chunk
        finally:
            self._stop.set()
            gone.cancel()

    async def _tell_when_gone(self) -> None:
        await disconnected(self._request)
        self._queue.put_nowait((0, Cancelled("The client has gone.")))

    def _note(self, index: int, chunk: Chunk | LoadstoneError) -> None:
        """For the log: what came, without what it says."""
        if isinstance(chunk, Piece):
            self._seen.first_token()
        elif isinstance(chunk, Done):
            self._seen.prompt_tokens += chunk.prompt_tokens if index % self._choices_a_prompt == 0 else 0
            self._seen.completion_tokens += chunk.completion_tokens
        elif isinstance(chunk, LoadstoneError):
            self._seen.kind = chunk.kind


@dataclass
class Collected:
    """One whole answer."""

    pieces: list[Piece] = field(default_factory=list)
    done: Done | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reasoning(self) -> str:
        return "".join(piece.reasoning for piece in self.pieces)

    @property
    def end(self) -> Done:
        """How it ended. Raises InternalError where it has not."""
        if self.done is None:
            raise InternalError("An answer has no end.")
        return self.done


async def collect(running: Running) -> list[Collected]:
    """All answers, when all are there."""
    answers = [Collected() for _ in range(running.count)]
    async with contextlib.aclosing(running.chunks()) as chunks:
        async for index, chunk in chunks:
            if isinstance(chunk, Done):
                answers[index].done = chunk
            else:
                answers[index].pieces.append(chunk)
    return answers
