"""How well the loaded model predicts a text: its perplexity, window by window.

A window goes through the model in pieces of a few hundred tokens over a KV cache, so that the scores of one piece
are all that is held at a time (tokens × vocabulary: the scores of a whole window of 8,192 would take gigabytes).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from modules.errors import OptionError, OutOfMemory, RequestTooLong, UnsupportedModel, UserError
from modules.perplexity import Perplexity, PerplexityOrder
from modules.protocol import AdapterChoice, Failed, LoadOrder, Progress
from modules.worker.engine import Engine
from modules.worker.generation import Loaded, input_device, must_be_known, release
from modules.worker.telling import Tell

if TYPE_CHECKING:
    import torch

PIECE_TOKENS = 256
STRETCHES = 8
Using: TypeAlias = Callable[[tuple[AdapterChoice, ...] | None], AbstractContextManager[None]]


def measure(
    loaded: Loaded, order: PerplexityOrder, using: Using, engine: Engine, tell: Tell, stopped: threading.Event
) -> None:
    """Measure on the engine's thread: one window between two turns of those who are answered, then the next.

    ``using``: lets a set of LoRAs act. ``tell`` gets Progress …, then one Perplexity or Failed, which is not sure to
    come where ``stopped`` is set.
    """

    def begin() -> None:
        go_on(Measurement(loaded, order))

    def go_on(measurement: Measurement) -> None:
        with using(order.adapters):
            measurement.window(tell, stopped)
        if measurement.over:
            tell(measurement.result())
        elif not stopped.is_set():
            engine.slip_in(beside, partial(go_on, measurement), loaded, engine, tell)

    engine.slip_in(beside, begin, loaded, engine, tell)


def beside(work: Callable[[], None], loaded: Loaded, engine: Engine, tell: Tell, alone: bool = False) -> None:
    """Do ``work`` beside the answers under way; where memory is too short for both, once more when they are over.

    ``tell`` gets Failed where it fails. What is done twice must be able to.
    """
    from modules.worker.failures import translate

    try:
        work()
        return
    except Exception as error:
        failure = translate(error, loaded.order, loaded=True)
    release()  # only here is the traceback gone, which held the tensors
    if isinstance(failure, OutOfMemory) and not alone:
        engine.submit(beside, work, loaded, engine, tell, alone=True)
    else:
        tell(Failed(failure))


class Measurement:
    """One text on one model. Each :meth:`window` is a piece of work of its own, after which others may use the model.

    Raises UserError for a text of fewer than two tokens, RequestTooLong for a window beyond the loaded context,
    OptionError for a stride longer than the window, UnsupportedModel for a model that is no causal one.
    """

    def __init__(self, loaded: Loaded, order: PerplexityOrder) -> None:
        self._model = loaded.model
        self._ids = _ids(loaded, order)
        self.window_tokens, self.stride_tokens = _window(order, loaded.order, len(self._ids))
        self._begins = range(0, max(1, len(self._ids) - self.window_tokens + self.stride_tokens), self.stride_tokens)
        self._stretch = math.ceil(max(1, self.window_tokens - 1) / STRETCHES)
        self._sums = [0.0] * STRETCHES  # of -ln p, by place in the window
        self._counts = [0] * STRETCHES
        self._next = 0  # the window that is to be computed next
        self._predicted = 1  # tokens of the text that need no more predicting; nothing predicts the first
        self._seconds = 0.0

    @property
    def over(self) -> bool:
        return self._next == len(self._begins)

    def window(self, tell: Tell, stopped: threading.Event) -> None:
        """Compute the next window; leaves at the next piece once ``stopped`` is set. Raises what the model raises."""
        import torch

        begun = time.perf_counter()
        begin = self._begins[self._next]
        end = min(begin + self.window_tokens, len(self._ids))
        cache = None
        with torch.no_grad():
            for start in range(begin, end - 1, PIECE_TOKENS):
                if stopped.is_set():
                    return
                cache = self._piece(start, min(start + PIECE_TOKENS, end - 1), begin, cache)
                self._predicted = max(self._predicted, min(start + PIECE_TOKENS, end - 1) + 1)
                tell(Progress("reading", self._predicted, len(self._ids), "tokens"))
        self._next += 1
        self._seconds += time.perf_counter() - begun

    def _piece(self, start: int, stop: int, begin: int, cache: Any) -> Any:
        """Let the tokens from ``start`` to ``stop`` predict those after them; returns the cache with them in it."""
        import torch

        ids = torch.tensor([self._ids[start:stop]], dtype=torch.long, device=input_device(self._model))
        wanted = stop - max(start, self._predicted - 1)  # predictions, at the end of the piece, that are new
        keep = {"logits_to_keep": max(1, wanted)} if self._model._supports_logits_to_keep() else {}
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
        if output.get("past_key_values") is None:
            raise UnsupportedModel("The model keeps no cache that a text could be read by pieces with.")
        if wanted > 0:
            self._add(output.logits[0, -wanted:], stop - wanted, begin)
        return output.past_key_values

    def _add(self, logits: torch.Tensor, first: int, begin: int) -> None:
        """``logits`` (tokens × vocabulary) of the tokens from ``first`` on, in the window that begins at ``begin``."""
        import torch

        targets = torch.tensor(self._ids[first + 1 : first + 1 + len(logits)], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().tolist()
        for place, loss in enumerate(losses, first - begin):
            self._sums[place // self._stretch] += loss
            self._counts[place // self._stretch] += 1

    def result(self) -> Perplexity:
        """The perplexity of all windows."""
        each = zip(self._sums, self._counts, strict=True)
        return Perplexity(
            perplexity=_perplexity(sum(self._sums), sum(self._counts)),
            tokens=sum(self._counts),
            windows=len(self._begins),
            window_tokens=self.window_tokens,
            stride_tokens=self.stride_tokens,
            stretch_tokens=self._stretch,
            stretches=tuple(_perplexity(total, count) if count else None for total, count in each),
            seconds=self._seconds,
        )


def _perplexity(total: float, count: int) -> float:
    """exp(total ÷ count); infinite beyond what a float holds."""
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def _ids(loaded: Loaded, order: PerplexityOrder) -> list[int]:
    if loaded.order.task != "causal":
        raise UnsupportedModel(
            f"{loaded.order.name} reads a text and answers another: it has no perplexity on a text.",
            "Load a causal language model.",
        )
    ids = list(loaded.tokenizer(order.text, verbose=False).input_ids)
    ids = ids[: order.most_tokens] if order.most_tokens else ids
    if len(ids) < 2:
        raise UserError(f"The text has {len(ids)} tokens; perplexity needs two at least.", "Give a longer text.")
    must_be_known(ids, loaded.model)
    return ids


def _window(order: PerplexityOrder, load: LoadOrder, tokens: int) -> tuple[int, int]:
    """The window and the stride in tokens; no longer than the text."""
    window = order.window_tokens or load.ctx_tokens
    if window > load.ctx_tokens:
        raise RequestTooLong(
            f"A window of {window:,} tokens is longer than the context of {load.ctx_tokens:,} that is loaded.",
            "Load the model with a larger context, or take a shorter window.",
        )
    stride = order.stride_tokens or max(1, window // 2)
    if window < 2 or stride > window:
        raise OptionError(f"A stride of {stride:,} tokens does not suit windows of {window:,}.", "Take a shorter one.")
    return min(window, tokens), min(stride, tokens)
