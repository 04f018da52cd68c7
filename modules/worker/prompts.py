"""Messages or a raw prompt → token ids that fit the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modules.errors import BrokenTemplate, OptionError, RequestTooLong, UnsupportedParameter, UserError
from modules.options import GenerationOptions
from modules.protocol import ChatMessages, CountOrder, GenerateOrder, Shape, Task
from modules.worker.parts import reasoning_marks
from modules.worker.templates import LIMIT_S, bounded
from modules.worker.tools import tool_format

_LEAST_ROOM = 16  # tokens of answer without which a prompt counts as too long
_MOST_WRITTEN = 8  # times as much as the messages, beside a million characters, is what a chat template may write
_ROOM_SHARE = 4  # messages are dropped until an answer has this part of the context, where it asks for so much


@dataclass(frozen=True)
class Prompt:
    """``stops`` end the answer where the model has no end-of-turn token of its own.

    ``thinking``: the chat template has opened the model's reasoning, which the answer goes on with.
    """

    ids: list[int]
    stops: tuple[str, ...] = ()
    dropped_messages: int = 0
    thinking: bool = False


@dataclass(frozen=True)
class Prompter:
    """Makes the prompts of one model. A tokenizer without a chat template gets this completion prompt::

        <system text>

        User: <text>
        Assistant: <text>
        User: <text>
        Assistant:

    and ``\\nUser:`` ends the answer. An encoder-decoder model without a template gets a lone user message as
    it stands, since such models are trained on bare instructions.
    """

    tokenizer: Any
    task: Task
    ctx_tokens: int
    template_limit_s: float = LIMIT_S

    def prompt(self, order: GenerateOrder) -> Prompt:
        """The prompt that leaves room for an answer: the oldest messages, or a raw prompt's left end, are left out.

        The system message and everything from the last user message on stay. Raises RequestTooLong where they
        do not fit, OptionError for ids that are no tokens, UserError where the model's template refuses the messages,
        and BrokenTemplate where it runs on.
        """
        if not order.messages:
            self._must_be_known(order.prompt_ids)
            ids = list(order.prompt_ids) or self._raw(order.prompt)
            if order.whole:
                self._must_fit(ids, "prompt")
                return Prompt(ids)
            return Prompt(self._cut_left(ids, self.ctx_tokens - self._room(order.options.max_new_tokens)))
        if order.whole:
            prompt = self._encoded(order, order.messages)
            self._must_fit(prompt.ids, "conversation")
            return prompt
        return self._chat(order)

    def _must_fit(self, ids: list[int], what: str) -> None:
        """Raises RequestTooLong where there is no room for a token of answer."""
        limit = self.ctx_tokens if self.task == "seq2seq" else self.ctx_tokens - 1
        if len(ids) > limit:
            raise RequestTooLong(
                f"The {what} has {len(ids):,} tokens; a context of {self.ctx_tokens:,} tokens takes {limit:,} and the "
                "answer."
            )

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands, without what a prompt gets in front."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included. Raises OptionError for an id that the tokenizer does not know."""
        self._must_be_known(ids)
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _must_be_known(self, ids: Sequence[int]) -> None:
        """Raises OptionError for an id beyond the vocabulary, which on a GPU would end the process with the model."""
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise OptionError(f"The tokenizer has no token {token}; its last is {size - 1}.")

    def count(self, order: CountOrder) -> int:
        """How many tokens the prompt has, nothing left out."""
        if not order.messages:
            return len(self._raw(order.prompt))
        return len(self._encoded(GenerateOrder(GenerationOptions(), order.messages), order.messages).ids)

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer to ``prompt`` can have at most. A separate decoder has the whole context."""
        return self.ctx_tokens if self.task == "seq2seq" else self.ctx_tokens - len(prompt.ids)

    def _room(self, wanted: int) -> int:
        """How many tokens to keep free for an answer of ``wanted`` tokens."""
        return 0 if self.task == "seq2seq" else min(wanted, max(1, self.ctx_tokens // _ROOM_SHARE))

    def _chat(self, order: GenerateOrder) -> Prompt:
        wanted = order.options.max_new_tokens
        limit = self.ctx_tokens - self._room(wanted)
        starts = _turn_starts(order.messages)

        def from_turn(turn: int) -> Prompt:
            messages = order.messages
            if turn:
                messages = (*_system(messages), *_rest(messages)[starts[turn] :])
            return self._encoded(order, messages)

        prompt = _first_that_fits(from_turn, len(starts), limit)
        limit = self.ctx_tokens - min(self._room(wanted), _LEAST_ROOM)
        if len(prompt.ids) > limit:
            raise RequestTooLong(
                f"The last message makes a prompt of {len(prompt.ids):,} tokens; a context of {self.ctx_tokens:,} "
                f"tokens takes {limit:,} and the answer."
            )
        return prompt

    def _raw(self, text: str) -> list[int]:
        """The ids of ``text``, with the special tokens that the model wants in front, and none that would end it."""
        ids: list[int] = self.tokenizer(text).input_ids
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            ids = ids[1:]  # the text brings its own
        if self.task == "causal" and ids[-1:] == [end] and not text.endswith(self.tokenizer.eos_token or "\0"):
            ids = ids[:-1]
        return ids or [token for token in (begin, end, 0) if token is not None][:1]

    def _cut_left(self, ids: list[int], limit: int) -> list[int]:
        if len(ids) <= limit:
            return ids
        head = ids[:1] if limit > 1 and ids[0] == self.tokenizer.bos_token_id else []
        return head + ids[len(ids) - limit + len(head) :]

    def _encoded(self, order: GenerateOrder, messages: ChatMessages) -> Prompt:
        """The prompt of these messages, which are the order's or some of them."""
        dropped, continue_last = len(order.messages) - len(messages), order.continue_last
        if continue_last and not messages[-1]["content"]:
            messages, continue_last = messages[:-1], False  # nothing to go on with: answer
        if not self.tokenizer.chat_template:
            _refuse_without_template(order.shape)
            return Prompt(self._raw(self.plain(messages, continue_last)), ("\nUser:",), dropped)
        text = self._rendered(messages, continue_last, self._extras(order.shape))
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        marks = reasoning_marks(self.tokenizer.chat_template)
        return Prompt(ids, (), dropped, thinking=marks is not None and text.rstrip().endswith(marks[0]))

    def _extras(self, shape: Shape) -> dict[str, Any]:
        """What the template gets beside the messages. Raises UnsupportedParameter for what it does not read."""
        for name in shape.template_values:
            if name not in self.tokenizer.chat_template:
                raise UnsupportedParameter(f"{name}: the model's chat template does not read it.")
        if shape.tools:
            tool_format(self.tokenizer.chat_template)
            return {**shape.template_values, "tools": list(shape.tools)}
        return shape.template_values

    def plain(self, messages: ChatMessages, continue_last: bool) -> str:
        """The text of these messages without a chat template; not ``continue_last``: up to where an answer begins."""
        if self.task == "seq2seq" and len(messages) == 1:
            return str(messages[0]["content"])
        lines = [
            f"{text}\n" if role == "system" else f"{role.capitalize()}: {text}"
            for role, text in ((message["role"], message["content"]) for message in messages)
        ]
        return "\n".join(lines if continue_last else [*lines, "Assistant:"])

    def _rendered(self, messages: ChatMessages, continue_last: bool, extras: dict[str, Any]) -> str:
        """The text of the chat template. A template that takes no system message gets it in the first user message."""
        system = [message["content"].strip() for message in _system(messages)]
        try:
            text = self._render(messages, continue_last, extras)
            if all(part in text for part in system):  # some templates leave it out without a word
                return text
        except BrokenTemplate:
            raise
        except Exception as error:
            if not system:
                raise _refusal(error) from error
        try:
            return self._render(_folded(messages, "\n\n".join(system)), continue_last, extras)
        except BrokenTemplate:
            raise
        except Exception as error:
            raise _refusal(error) from error

    def _render(self, messages: ChatMessages, continue_last: bool, extras: dict[str, Any]) -> str:
        def text() -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=not continue_last,
                    continue_final_message=continue_last,
                    **extras,
                )
            )

        written = bounded(text, self.template_limit_s)
        most = 1_000_000 + _MOST_WRITTEN * len(repr((messages, extras)))
        if len(written) > most:
            raise BrokenTemplate(
                f"The model's chat template makes {len(written):,} characters of messages for which {most:,} are many."
            )
        return written


def _refuse_without_template(shape: Shape) -> None:
    """Raises UnsupportedParameter for what only a chat template could tell the model."""
    for name in ("tools", *shape.template_values) if shape.tools else shape.template_values:
        raise UnsupportedParameter(f"{name}: the model has no chat template that could read it.")


def _refusal(error: Exception) -> UserError:
    return UserError(
        f"The model's chat template refuses these messages: {error}",
        "Most templates want user and assistant to take turns, the user first.",
    )


def _first_that_fits(from_turn: Callable[[int], Prompt], turns: int, limit: int) -> Prompt:
    """The prompt with the most turns that has at most ``limit`` tokens, by halving; else the one of the last turn."""
    prompt = from_turn(0)
    if len(prompt.ids) <= limit:
        return prompt
    best, low, high = None, 1, turns - 1
    while low <= high:
        middle = (low + high) // 2
        prompt = from_turn(middle)
        if len(prompt.ids) <= limit:
            best, high = prompt, middle - 1
        else:
            low = middle + 1
    return best or from_turn(turns - 1)


def _system(messages: ChatMessages) -> ChatMessages:
    return tuple(message for message in messages if message["role"] == "system")


def _rest(messages: ChatMessages) -> ChatMessages:
    return tuple(message for message in messages if message["role"] != "system")


def _turn_starts(messages: ChatMessages) -> list[int]:
    """Where a cut may be among the messages that are not the system's: at the first, and before any user message.

    So that an answer never stands without its question, which many templates refuse.
    """
    starts = [at for at, message in enumerate(_rest(messages)) if at and message["role"] == "user"]
    return [0, *starts]


def _folded(messages: ChatMessages, system: str) -> ChatMessages:
    """The messages with the system's text at the front of the first user message."""
    rest = list(_rest(messages))
    for at, message in enumerate(rest):
        if message["role"] == "user":
            rest[at] = {**message, "content": f"{system}\n\n{message['content']}"}
            return tuple(rest)
    return ({"role": "user", "content": system}, *rest)
