"""One answer: from an order to a stream of text, by ``model.generate``."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from modules.errors import LoadstoneError, OptionError
from modules.options import GenerationOptions
from modules.protocol import Chunk, Done, Failed, FinishReason, GenerateOrder, LoadOrder, Piece, Shape
from modules.worker.decoding import StopText, TextStream
from modules.worker.parts import Parts, reasoning_marks
from modules.worker.prompts import Prompt, Prompter
from modules.worker.tools import tool_format

if TYPE_CHECKING:
    from modules.worker.shaping import Shaping  # imports torch


class Loaded(Protocol):
    """What generation needs of a loaded model."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def order(self) -> LoadOrder: ...


def prompter(loaded: Loaded) -> Prompter:
    """What makes prompts for ``loaded``."""
    return Prompter(loaded.tokenizer, loaded.order.task, loaded.order.ctx_tokens)


def generate(
    loaded: Loaded, order: GenerateOrder, emit: Callable[[Chunk], None], stopped: threading.Event | None = None
) -> None:
    """Generate one answer and hand it out as it grows: ``emit`` gets Piece …, then one Done or Failed.

    ``emit`` is called from within the generation, once a token at most, and should return at once. Setting
    ``stopped`` ends the answer at the next token, with finish reason "cancelled". Only one generation may run
    at a time: the seed is the process's. Raises nothing that the model, or a library, raises: that is Failed,
    and the model is usable afterwards.
    """
    stopped = stopped or threading.Event()
    try:
        answer = Answer(loaded, order, emit, stopped)
        _generate(loaded.model, answer)
        answer.end()
    except Exception as error:
        emit(Failed(typed(error, loaded.order)))
    else:
        return
    # Only here is the traceback gone, which held the tensors of the failed step.
    release()


def typed(error: Exception, order: LoadOrder) -> LoadstoneError:
    """``error`` as one of our tree, without its traceback, which would keep a step's tensors in memory."""
    if isinstance(error, LoadstoneError):
        return error
    from modules.worker.failures import translate

    return translate(error, order, loaded=True).with_traceback(None)


def release() -> None:
    """Give back what a failed step has left."""
    torch = sys.modules["torch"]
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after some of CUDA's errors, nothing works any more in the process
            torch.cuda.empty_cache()


class Answer:
    """One answer as it grows: takes tokens, hands out their text, and knows when it is over and why."""

    def __init__(
        self, loaded: Loaded, order: GenerateOrder, emit: Callable[[Chunk], None], stopped: threading.Event
    ) -> None:
        """Raises what the prompt or the order's shape is refused with."""
        self._tokenizer = loaded.tokenizer
        self._prompt = prompt = prompter(loaded).prompt(order)
        must_be_known(prompt.ids, loaded.model)
        self.options = order.options
        self.limit = min(order.options.max_new_tokens, prompter(loaded).room(prompt))
        self.stopped = stopped
        self._emit = emit
        self._text = TextStream(loaded.tokenizer, prompt.ids if prompt.continues else ())
        self._stop_text = StopText((*prompt.stops, *order.shape.stops))
        self.end_tokens = _end_tokens(loaded.model, loaded.tokenizer)
        self._reason: FinishReason | None = None
        self._tokens = 0
        self._parts = _parts(loaded, order.shape, prompt) if order.shape.split else None
        self._shaping = self._shaped(order)
        self._logprobs: list[tuple[int, dict[str, Any]]] = []  # not told yet, with where each token's text begins
        self._written = 0  # characters of all tokens so far
        self._passed = 0  # of those, the ones that no stop cuts off
        self._begin = self._first = self._last = time.perf_counter()

    def _shaped(self, order: GenerateOrder) -> Shaping | None:
        """What changes and watches the scores; None for an answer that nothing holds, which then costs nothing."""
        shape = order.shape
        if not (
            shape.presence_penalty or shape.frequency_penalty or shape.logit_bias or shape.logprobs is not None
            or shape.json_schema is not None or (shape.tools and shape.tool_choice != "auto")
        ):  # fmt: skip
            return None
        from modules.worker.shaping import Shaping

        parts = self._parts
        return Shaping(
            shape, self._tokenizer, self.end_tokens, parts.tools if parts else None,
            lambda: parts is not None and parts.thinking, self._text.texts, order.options.repetition_penalty,
        )  # fmt: skip

    @property
    def prompt_ids(self) -> list[int]:
        return self._prompt.ids

    def choosing(self) -> dict[str, Any]:
        """The kwargs of ``model.generate`` that choose this answer's tokens and end it.

        Its own processor counts the repetition penalty too, so that log probabilities are the model's own.
        """
        own = {} if self._shaping is None else {"logits_processor": [self._shaping], "repetition_penalty": 1.0}
        return {
            "max_new_tokens": self.limit,
            "eos_token_id": sorted(self.end_tokens) or None,
            "pad_token_id": _pad_token(self._tokenizer, self.end_tokens),
            **sampling(self.options),
            **own,
        }

    def begin(self) -> None:
        """Its turn has come: the time to the first token counts from here."""
        self._begin = self._first = self._last = time.perf_counter()

    def take(self, token: int) -> bool:
        """Note the token that was chosen next; whether the answer is over with it."""
        self._last = time.perf_counter()
        self._first = self._last if not self._tokens else self._first
        self._tokens += 1
        if self._shaping is not None and (told := self._shaping.chosen(token)) is not None:
            self._logprobs.append((self._written, told))
        if token in self.end_tokens:
            self._reason = "stop"
        else:
            text = self._text.push(token)
            self._written += len(text)
            self._hand_out(self._stop_text.push(text))
            if self._stop_text.stopped:
                self._reason = "stop"
            elif self._tokens >= self.limit:
                self._reason = "length"
        return self._reason is not None

    def end(self, held_tokens: int = 0) -> None:
        """Hand out what was held back, and say how the answer ended; "cancelled" where it was not over."""
        if self._reason is None:
            self._reason = "cancelled"
        elif not self._stop_text.stopped:
            self._hand_out(self._stop_text.push(self._text.finish()) + self._stop_text.finish())
        self._emit(self._done(held_tokens))

    def fail(self, error: LoadstoneError) -> None:
        """End the answer with an error."""
        self._emit(Failed(error))

    def _hand_out(self, text: str) -> None:
        self._passed += len(text)
        if self._parts is not None:
            reasoning, text = self._parts.push(text)
            self._tell(text, reasoning)
        elif text:
            self._tell(text)

    def _tell(self, text: str, reasoning: str = "") -> None:
        """Hand out text with the log probabilities of the tokens up to it."""
        if text or reasoning:
            self._emit(Piece(text, self._tokens, reasoning, self._due(self._passed)))

    def _due(self, end: int) -> tuple[dict[str, Any], ...]:
        """The log probabilities that are not told yet, of the tokens whose text begins before ``end``."""
        told = tuple(one for begin, one in self._logprobs if begin < end)
        del self._logprobs[: len(told)]
        return told

    def _done(self, held_tokens: int) -> Done:
        """What there is to say after the last piece, which is handed out before it."""
        if self._parts is not None:
            reasoning, text = self._parts.finish()
            self._tell(text, reasoning)
        # What lies wholly behind the cut of a stop is no part of the answer; else tokens without text may be left.
        if rest := self._due(self._passed if self._stop_text.stopped else self._written + 1):
            self._emit(Piece("", self._tokens, "", rest))
        return Done(
            finish_reason=self._reason or "stop",
            prompt_tokens=len(self._prompt.ids),
            completion_tokens=self._tokens,
            first_token_seconds=self._first - self._begin,
            seconds=self._last - self._first,
            dropped_messages=self._prompt.dropped_messages,
            dropped_tokens=self._prompt.dropped_tokens,
            tool_calls=tuple(self._parts.calls) if self._parts is not None else (),
            held_tokens=held_tokens,
        )


class _Stop(Exception):
    """Leaves ``model.generate`` from within its streamer: cheaper than a stopping criterion, which costs tensors."""


class _Streamer:
    """Gives an answer its tokens, as ``model.generate`` makes them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Called by ``model.generate`` with the prompt first, then with each new token, as tensors on the CPU."""
        if self._answer.stopped.is_set():
            raise _Stop
        if not self._prompt_seen:
            self._prompt_seen = True
        elif self._answer.take(int(value)):
            raise _Stop

    def end(self) -> None:
        """Called by ``model.generate`` after the last token."""


def _generate(model: Any, answer: Answer) -> None:
    """Let ``model.generate`` make the answer's tokens. Sets the seed of the process."""
    import torch

    if answer.options.seed < 0:
        torch.seed()
    else:
        torch.manual_seed(answer.options.seed)
    ids = torch.tensor([answer.prompt_ids], dtype=torch.long, device=input_device(model))
    with suppress(_Stop):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=_Streamer(answer), **answer.choosing()
        )


def _parts(loaded: Loaded, shape: Shape, prompt: Prompt) -> Parts:
    """What tells reasoning and tool calls from the text. Raises UnsupportedParameter for tools it cannot read."""
    template = str(loaded.tokenizer.chat_template or "")
    tools = tool_format(template) if shape.tools else None
    offered = {tool["function"]["name"] for tool in shape.tools}
    return Parts(reasoning_marks(template), thinking=prompt.thinking, tools=tools, offered=offered)


def sampling(options: GenerationOptions) -> dict[str, Any]:
    """The kwargs of ``model.generate`` that choose the next token, all of them, so that no default of the model's
    own generation_config.json mixes in. Greedy search gets none of sampling's, which it would warn about."""
    common: dict[str, Any] = {
        "num_beams": 1,  # beams cannot be streamed
        "num_return_sequences": 1,
        "repetition_penalty": options.repetition_penalty,
    }
    if options.temperature == 0:
        return {**common, "do_sample": False}
    return {
        **common,
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p or None,
    }


def input_device(model: Any) -> Any:
    """Where the first layer wants its input. A module whose weights lie on disk has them on "meta"."""
    device = model.get_input_embeddings().weight.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return device if device.type != "meta" else getattr(hook, "execution_device", None) or "cpu"


def must_be_known(ids: Sequence[int], model: Any) -> None:
    """Raises OptionError for a token of the tokenizer's that the model has not: on a GPU it would end the process."""
    last = int(model.get_input_embeddings().weight.shape[0]) - 1
    if ids and max(ids) > last:
        raise OptionError(
            f"The prompt has the token {max(ids)}, and the model knows none beyond {last}.",
            "It may be the name of a special token that was added to the tokenizer alone: leave it out.",
        )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, one or several, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _pad_token(tokenizer: Any, end_tokens: frozenset[int]) -> int | None:
    """A padding token, which ``model.generate`` wants although nothing is padded here."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(end_tokens, default=None)
