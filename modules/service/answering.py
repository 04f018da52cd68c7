"""Using what is loaded: answers as they come, and tokens. What each answer took is what later plans learn from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from modules.devices import Machine
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
)
from modules.service.learned import Learned
from modules.service.loras import Loras
from modules.service.pump import Pump
from modules.settings import Settings
from modules.supervisor import Supervisor


class Answering:
    """The part of the service that talks to the loaded model."""

    supervisor: Supervisor
    settings: Settings
    loras: Loras
    learned: Learned
    measure: Callable[[], Machine]
    _generation_flags: Mapping[str, Any]

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
        stopped: threading.Event | None = None,
    ) -> Iterator[Chunk]:
        """An answer as it comes: Piece …, then Done. Setting ``stopped`` or closing the iterator ends it.

        ``loras``: answer with this set, this once; empty: with the base model; None: with the active set.
        Raises NothingLoaded, WorkerCrashed and what the worker answers with.
        """
        chat: ChatMessages = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        adapters = None if loras is None else self.loras.checked(loras)
        order = GenerateOrder(self.generation(values), chat, prompt, continue_last, adapters)
        yield from self.stream(order, stopped or threading.Event())

    def stream(self, order: GenerateOrder, stopped: threading.Event) -> Iterator[Chunk]:
        """As :meth:`generate`, for an order that says more than the page's do."""
        for chunk in Pump(self.supervisor, order, stopped).chunks():
            if isinstance(chunk, Done) and chunk.prompt_tokens:
                used = chunk.prompt_tokens + chunk.completion_tokens
                threading.Thread(target=self._learn, args=(used,), daemon=True, name="learn").start()
            yield chunk

    def _learn(self, used_tokens: int) -> None:
        loaded, memory = self.supervisor.snapshot().loaded, self.supervisor.memory()
        if loaded is not None and memory is not None:
            self.learned.note(loaded, memory, used_tokens, self.measure())

    def count(self, order: CountOrder) -> int:
        """How many tokens a prompt has for the loaded model. Raises NothingLoaded."""
        return self.supervisor.count(order)

    def encode(self, text: str) -> list[int]:
        """The loaded model's token ids of a text. Raises NothingLoaded."""
        return [int(token) for token in self.supervisor.ask(ENCODE, EncodeOrder(text))["tokens"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the loaded model's token ids. Raises NothingLoaded, and OptionError for an unknown id."""
        return str(self.supervisor.ask(DECODE, DecodeOrder(tuple(tokens)))["text"])
