"""What the tests of many answers at once share: a small model in float32, and answers alone and together."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.options import GenerationOptions
from modules.protocol import AdapterChoice, Chunk, Done, Failed, GenerateOrder, Piece, Shape
from modules.worker import transformers_loader
from modules.worker.adapters import Adapters
from modules.worker.batching import Line, Ticket
from modules.worker.batching.scheduler import Scheduler
from tests import checkpoints

PROMPTS = ("One", "The capital of France is", "Once upon a time there was a dog", "x = 1", "Count from one: 1, 2, 3")


def tiny_llama() -> Path:
    """Two layers with random weights, large enough that one token is clearly likelier than the next; the demo
    model's tokenizer, and no end-of-text token that it would hit by chance."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        config = checkpoints.llama_config(
            vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None
        )
        model = checkpoints.new_model(AutoModelForCausalLM, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        model.save_pretrained(folder)
        for file in checkpoints.demo_model().glob("*token*"):
            shutil.copy(file, folder)

    return checkpoints.kept("tiny-llama-1", build)


@dataclass
class Told:
    """What one asker gets."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        return [chunk for chunk in self.chunks if isinstance(chunk, Piece)]

    @property
    def text(self) -> str:
        """The whole answer. Fails where there is none."""
        assert isinstance(self.chunks[-1], Done), self.chunks[-1]
        return "".join(piece.text for piece in self.pieces)

    @property
    def done(self) -> Done:
        assert isinstance(self.chunks[-1], Done), self.chunks[-1]
        return self.chunks[-1]

    @property
    def error(self) -> Exception:
        assert isinstance(self.chunks[-1], Failed), self.chunks[-1]
        return self.chunks[-1].error


class Desk:
    """A loaded model whose answers are asked for and made on the test's own thread."""

    def __init__(self, path: Path, work: Path, **facts: Any) -> None:
        order = checkpoints.order_for(path, work, cpu=True, **facts)
        self.loaded = transformers_loader.load(order, lambda _: None)
        self.adapters: Adapters | None = None
        self.steps = 0  # calls of the model since the last answers were asked for
        self.loaded.model.register_forward_pre_hook(self._count)
        self.reset()

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def reset(self) -> None:
        """A new scheduler, with nobody in the line."""
        self.line = Line()
        self._number = 0
        self.scheduler = Scheduler(self.loaded, self.line, self._using, self._active)

    def _using(self, choices: tuple[AdapterChoice, ...] | None) -> AbstractContextManager[None]:
        return self.adapters.using(choices) if self.adapters is not None else nullcontext()

    def _active(self) -> tuple[AdapterChoice, ...]:
        return self.adapters.active if self.adapters is not None else ()

    def ask(
        self,
        order: GenerateOrder,
        then: Callable[[Told], None] = lambda _: None,
        stopped: threading.Event | None = None,
    ) -> Told:
        """Stand in the line; ``then`` is called with every chunk."""
        told = Told()

        def emit(chunk: Chunk) -> None:
            told.chunks.append(chunk)
            then(told)

        self._number += 1
        self.line.add(Ticket(self._number, order, emit, stopped or threading.Event()))
        return told

    def work(self) -> None:
        """Answer everybody."""
        self.steps = 0
        while self.scheduler.turn(lambda: self._number + 1):
            pass

    def together(self, orders: Sequence[GenerateOrder]) -> list[Told]:
        told = [self.ask(order) for order in orders]
        self.work()
        return told

    def alone(self, orders: Sequence[GenerateOrder]) -> list[Told]:
        return [self.together([order])[0] for order in orders]


@contextmanager
def at_call(desk: Desk, call: int, error: Exception) -> Iterator[None]:
    """The model's last layer raises ``error`` once, at that call from now on."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    handle = desk.loaded.model.model.layers[-1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        assert len(calls) >= call


def order(
    number: int, tokens: int = 24, *, user: str = "", shape: Shape | None = None, **options: Any
) -> GenerateOrder:
    """The ``number``-th of many different orders; greedy where ``options`` say nothing else."""
    chosen = GenerationOptions(**{"max_new_tokens": tokens, "temperature": 0.0, "top_p": 1.0, **options})
    prompt = f"{PROMPTS[number % len(PROMPTS)]} {number}"
    return GenerateOrder(chosen, prompt=prompt, user=user, shape=shape or Shape())
