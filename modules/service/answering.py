"""Using what is loaded: answers as they come, and tokens. What each answer took is what later plans learn from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from modules.devices import Machine
from modules.errors import LoadstoneError, ModelNotFound, UnsupportedParameter
from modules.library import Library
from modules.options import GENERATION_OPTIONS, GenerationOptions
from modules.protocol import (
    DECODE,
    ENCODE,
    ChatMessages,
    Chunk,
    CountOrder,
    DecodeOrder,
    Done,
    EncodeOrder,
    GenerateOrder,
    Piece,
)
from modules.service.learned import Learned
from modules.service.loras import Loras
from modules.service.on_demand import OnDemand
from modules.service.stopping import Stop, chunks
from modules.service.traffic import Traffic
from modules.settings import Settings
from modules.supervisor import Fleet, Supervisor, Use

KEEP_ALIVE = "keep_alive"  # what a request has to be allowed for saying how long its model stays


@dataclass(frozen=True)
class Reached:
    """The model that a request names. ``use``: a hold on it, now or once it is loaded, to be released by whoever gets
    it. ``entries``: the LoRAs that are named with it; None: the set that is active.
    """

    name: str
    entries: tuple[str, ...] | None
    use: Future[Use]


class Answering:
    """The part of the service that talks to the loaded model."""

    fleet: Fleet
    on_demand: OnDemand | None  # None: a request gets what is loaded, or is refused
    library: Library
    settings: Settings
    loras: Loras
    traffic: Traffic
    learned: Learned
    measure: Callable[[], Machine]
    _generation_flags: Mapping[str, Any]

    @property
    def supervisor(self) -> Supervisor:
        """The owner of the model that the page shows."""
        return self.fleet.front

    # --- which model ---

    def reach(self, model: str, keep_alive_s: float | None = None, user: str = "") -> Reached:
        """A hold on the model that a request of ``user`` names, ``name`` or ``name+lora:weight``; "" for the front one.

        Raises NothingLoaded, ModelNotFound for one that is not loaded and is not to be loaded for a request either,
        UnsupportedParameter for ``keep_alive_s`` without --load-on-demand, and Overloaded.
        """
        if keep_alive_s is not None and self.on_demand is None:
            raise UnsupportedParameter("keep_alive: only with --load-on-demand.")
        loaded = [one.order.name for one in self.fleet.loaded()]
        name, entries = _split(model, loaded)
        if name in ("", *loaded):
            pass
        elif self.on_demand is not None:
            name, entries = _split(model, [one.name for one in self.library.models()])
            if name not in (one.name for one in self.library.models()):
                raise ModelNotFound(f"There is no model {name!r}.", "GET /v1/models tells which there are.")
        elif loaded:
            are = "are" if loaded[1:] else "is"
            raise ModelNotFound(
                f"The model {model!r} is not loaded; {' and '.join(map(repr, loaded))} {are}.",
                f"Ask for {loaded[0]!r}, or load the other one.",
            )
        if name and self.on_demand is not None:
            return Reached(name, entries, self.on_demand.ask(name, keep_alive_s, user))
        use: Future[Use] = Future()
        use.set_result(self.fleet.need(name if loaded else "", keep_alive_s))
        return Reached(name, entries, use)

    # --- answers ---

    def generation_defaults(self) -> GenerationOptions:
        return self.generation({})

    def generation(self, values: Mapping[str, Any]) -> GenerationOptions:
        """The generation options that these values give, over this machine's defaults. Raises OptionError."""
        layers = {**self.settings.generation_values, **self._generation_flags}
        given = {**layers, **{key: GENERATION_OPTIONS[key].parse(value) for key, value in values.items()}}
        return GenerationOptions(**given)

    def generate(
        self,
        values: Mapping[str, Any],
        *,
        messages: Sequence[Mapping[str, str]] = (),
        prompt: str = "",
        continue_last: bool = False,
        loras: Sequence[str] | None = None,
        stop: Stop | None = None,
        user: str = "",
    ) -> Iterator[Chunk]:
        """An answer as it comes: Waiting …, Piece …, then Done. ``stop`` or closing the iterator ends it.

        ``user``: whose it is; where many wait, users take turns.
        ``loras``: answer with this set, this once; empty: with the base model; None: with the active set.
        Raises NothingLoaded, WorkerCrashed and what the worker answers with.
        """
        chat: ChatMessages = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        adapters = None if loras is None else self.loras.checked(loras)
        order = GenerateOrder(self.generation(values), chat, prompt, continue_last, adapters, user=user)
        yield from self.stream(order, stop or Stop())

    def stream(self, order: GenerateOrder, stop: Stop, use: Use | None = None) -> Iterator[Chunk]:
        """As :meth:`generate`, for an order that says more than the page's do, by the model that ``use`` holds."""
        begin, first_token_s = time.monotonic(), None
        with use.again() if use else self.fleet.need() as held:
            try:
                for chunk in chunks(held.supervisor, order, stop):
                    if first_token_s is None and isinstance(chunk, Piece):
                        first_token_s = time.monotonic() - begin
                    if isinstance(chunk, Done):
                        self.traffic.answered(held.name, chunk, first_token_s)
                        self._learn_from(held.supervisor, chunk)
                    yield chunk
            except LoadstoneError as error:
                if use is None:  # else it is the request that failed
                    self.traffic.failed("page", error)
                raise

    def _learn_from(self, supervisor: Supervisor, done: Done) -> None:
        if done.prompt_tokens:
            used = max(done.prompt_tokens + done.completion_tokens, done.held_tokens)
            threading.Thread(target=self._learn, args=(supervisor, used), daemon=True, name="learn").start()

    def _learn(self, supervisor: Supervisor, used_tokens: int) -> None:
        loaded, memory = supervisor.snapshot().loaded, supervisor.memory()
        if loaded is not None and memory is not None:
            self.learned.note(loaded, memory, used_tokens, self.measure())

    def figures(self) -> bytes:
        """What goes on, in Prometheus's text format. Asks each model's process for its memory."""
        waiting = self.on_demand.waiting if self.on_demand else 0
        return self.traffic.exposition(self.fleet.places(), self.fleet.memory(), waiting)

    def count(self, order: CountOrder) -> int:
        """How many tokens a prompt has for the loaded model. Raises NothingLoaded."""
        return self.supervisor.count(order)

    def encode(self, text: str) -> list[int]:
        """The loaded model's token ids of a text. Raises NothingLoaded."""
        return [int(token) for token in self.supervisor.ask(ENCODE, EncodeOrder(text))["tokens"]]

    def decode(self, tokens: Sequence[int], use: Use | None = None) -> str:
        """The text of the loaded model's token ids. Raises NothingLoaded, and OptionError for an unknown id."""
        supervisor = use.supervisor if use else self.supervisor
        return str(supervisor.ask(DECODE, DecodeOrder(tuple(tokens)))["text"])


def _split(model: str, names: Iterable[str]) -> tuple[str, tuple[str, ...] | None]:
    """(the model's name, its LoRAs); the longest of ``names`` counts. None: the set that is active."""
    for name in sorted(names, key=len, reverse=True):
        if model == name:
            return name, None
        if model.startswith(f"{name}+"):
            return name, tuple(model[len(name) + 1 :].split("+"))
    return model, None
