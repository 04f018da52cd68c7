"""Messages or a raw prompt → token ids that fit the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from modules.errors import BrokenTemplate, OptionError, RequestTooLarge, RequestTooLong, UnsupportedParameter, UserError
from modules.options import GenerationOptions
from modules.protocol import ChatMessages, CountOrder, GenerateOrder, Shape, Task
from modules.worker.parts import reasoning_marks
from modules.worker.templates import LIMIT_S, bounded
from modules.worker.tokenizing import MOST_TEXT_BYTES, ids_within, last_ids, refuse_large, size_bytes, too_many
from modules.worker.tools import tool_format

_LEAST_ROOM = 16  # tokens of answer without which a prompt counts as too long
_MOST_WRITTEN = 8  # times as much as the messages, beside a million characters, is what a chat template may write
_ROOM_SHARE = 4  # messages are dropped until an answer has this part of the context, where it asks for so much


@dataclass(frozen=True)
class Prompt:
    """``stops`` end the answer where the model has no end-of-turn token of its own.

    ``thinking``: the chat template has opened the model's reasoning, which the answer goes on with.
    ``continues``: the answer goes on with the prompt's text, amidst a sentence maybe, instead of beginning one.
    """

    ids: list[int]
    stops: tuple[str, ...] = ()
    dropped_messages: int = 0
    dropped_tokens: int = 0  # of a raw prompt
    thinking: bool = False
    continues: bool = False


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
            return self._plain_prompt(order)
        if not order.whole:
            return self._chat(order)
        return self._whole_chat(order)

    def _whole_chat(self, order: GenerateOrder) -> Prompt:
        limit = self._limit()
        prompt = None
        if not too_many(self.tokenizer, sum(_characters(order.messages, self._marks())), limit):
            prompt = self._encoded(order, order.messages, limit)
        if prompt is None or len(prompt.ids) > limit:
            raise self._too_long("conversation", prompt.ids if prompt else None, _length(order.messages))
        return prompt

    def _limit(self) -> int:
        """How many tokens of prompt leave room for a token of answer."""
        return self.ctx_tokens if self.task == "seq2seq" else self.ctx_tokens - 1

    def _too_long(self, what: str, ids: Sequence[int] | None, characters: int) -> RequestTooLong:
        """``ids``: None where they were not counted, since the text alone tells that they are too many."""
        size = f"{len(ids):,} tokens" if ids is not None else f"{characters:,} characters"
        return RequestTooLong(
            f"The {what} has {size}; a context of {self.ctx_tokens:,} tokens takes {self._limit():,} and the answer."
        )

    def _plain_prompt(self, order: GenerateOrder) -> Prompt:
        """The prompt of an order without messages."""
        if order.whole:
            found = list(order.prompt_ids) or ids_within(self.tokenizer, self._raw, order.prompt, self._limit())
            if found is None or len(found) > self._limit():
                raise self._too_long("prompt", found, len(order.prompt))
            ids, dropped = found, 0
        else:
            limit = self.ctx_tokens - self._room(order.options.max_new_tokens)
            whole, unread = (list(order.prompt_ids), 0) if order.prompt_ids else self._right_end(order.prompt, limit)
            ids = self._cut_left(whole, limit)
            dropped = len(whole) - len(ids) + unread
        if order.prompt_ids:
            self._must_be_known(ids)
        return Prompt(ids, dropped_tokens=dropped, continues=self.task == "causal")

    def _right_end(self, text: str, limit: int) -> tuple[list[int], int]:
        """The ids of the text, or of its right end that has more than ``limit`` already; and about how many come before
        those, by how long they are, since the rest is not tokenized."""
        read = ""

        def encode(part: str) -> list[int]:
            nonlocal read
            read = part
            return self._raw(part)

        ids = last_ids(self.tokenizer, encode, text, limit)
        unread = max(0, len(text) - len(read))
        return ids, round(unread * len(ids) // len(read), -2) if unread else 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands, without what a prompt gets in front. Raises RequestTooLarge."""
        refuse_large(size_bytes(text), "bytes of text")
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included. Raises OptionError for an id that the tokenizer does not know, and
        RequestTooLarge for more than a text that may be encoded can have.
        """
        refuse_large(len(ids), "tokens")
        self._must_be_known(ids)
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _must_be_known(self, ids: Sequence[int]) -> None:
        """Raises OptionError for an id beyond the vocabulary, which on a GPU would end the process with the model."""
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise OptionError(f"The tokenizer has no token {token}; its last is {size - 1}.")

    def count(self, order: CountOrder) -> int:
        """How many tokens the prompt has, nothing left out. Raises RequestTooLarge."""
        texts = [order.prompt, *(str(message["content"]) for message in order.messages)]
        refuse_large(sum(map(size_bytes, texts)), "bytes of text")
        if not order.messages:
            return len(self._raw(order.prompt))
        prompt = self._encoded(GenerateOrder(GenerationOptions(), order.messages), order.messages, MOST_TEXT_BYTES)
        if prompt is None:
            raise RequestTooLarge("The model's chat template makes too long a text of the messages.")
        return len(prompt.ids)

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer to ``prompt`` can have at most. A separate decoder has the whole context."""
        return self.ctx_tokens if self.task == "seq2seq" else self.ctx_tokens - len(prompt.ids)

    def _room(self, wanted: int) -> int:
        """How many tokens to keep free for an answer of ``wanted`` tokens."""
        return 0 if self.task == "seq2seq" else min(wanted, max(1, self.ctx_tokens // _ROOM_SHARE))

    def _chat(self, order: GenerateOrder) -> Prompt:
        wanted = order.options.max_new_tokens
        most = self.ctx_tokens - min(self._room(wanted), _LEAST_ROOM)
        starts = _turn_starts(order.messages)
        first, characters = self._first_turn(order.messages, starts, most)

        def from_turn(turn: int) -> Prompt | None:
            messages = order.messages
            if turn:
                messages = (*_system(messages), *_rest(messages)[starts[turn] :])
            return self._encoded(order, messages, most)

        prompt = None
        if not too_many(self.tokenizer, characters, most):
            prompt = _first_that_fits(from_turn, range(first, len(starts)), self.ctx_tokens - self._room(wanted))
        if prompt is None or len(prompt.ids) > most:
            length = _length(_rest(order.messages)[starts[-1] :])
            size = f"{len(prompt.ids):,} tokens" if prompt is not None else f"{length:,} characters"
            raise RequestTooLong(
                f"The last message makes a prompt of {size}; a context of {self.ctx_tokens:,} tokens takes {most:,} "
                "and the answer."
            )
        return prompt

    def _first_turn(self, messages: ChatMessages, starts: list[int], most: int) -> tuple[int, int]:
        """The first turn with which the messages may have ``most`` tokens, or the last; and how many characters they
        have with it at least."""
        system = sum(_characters(_system(messages), None))
        sizes = _characters(_rest(messages), self._marks())
        behind = system + sum(sizes)
        for turn, (start, end) in enumerate(pairwise([*starts, len(sizes)])):
            if not too_many(self.tokenizer, behind, most) or turn == len(starts) - 1:
                return turn, behind
            behind -= sum(sizes[start:end])
        return 0, behind

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

    def _encoded(self, order: GenerateOrder, messages: ChatMessages, most: int) -> Prompt | None:
        """The prompt of these messages, which are the order's or some of them; None as :func:`ids_within` has it."""
        dropped, continue_last = len(order.messages) - len(messages), order.continue_last
        if continue_last and not messages[-1]["content"]:
            messages, continue_last = messages[:-1], False  # nothing to go on with: answer
        continues = continue_last and self.task == "causal"
        if not self.tokenizer.chat_template:
            _refuse_without_template(order.shape)
            raw = ids_within(self.tokenizer, self._raw, self.plain(messages, continue_last), most)
            return None if raw is None else Prompt(raw, ("\nUser:",), dropped, continues=continues)
        text = self._rendered(messages, continue_last, self._extras(order.shape))
        ids = ids_within(self.tokenizer, self._ids, text, most)
        if ids is None:
            return None
        marks = self._marks()
        thinking = marks is not None and text.rstrip().endswith(marks[0])
        return Prompt(ids, (), dropped, thinking=thinking, continues=continues)

    def _marks(self) -> tuple[str, str] | None:
        return reasoning_marks(self.tokenizer.chat_template or "")

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


def _first_that_fits(from_turn: Callable[[int], Prompt | None], turns: range, limit: int) -> Prompt | None:
    """The prompt with the most turns that has at most ``limit`` tokens, by halving; else the one of the last turn."""

    def fits(prompt: Prompt | None) -> bool:
        return prompt is not None and len(prompt.ids) <= limit

    prompt = from_turn(turns[0])
    if fits(prompt) or len(turns) == 1:
        return prompt
    best, low, high = None, turns[0] + 1, turns[-1]
    while low <= high:
        middle = (low + high) // 2
        prompt = from_turn(middle)
        if fits(prompt):
            best, high = prompt, middle - 1
        else:
            low = middle + 1
    return best or from_turn(turns[-1])


def _length(messages: ChatMessages) -> int:
    """In characters."""
    return sum(len(str(message["content"])) for message in messages)


def _characters(messages: ChatMessages, marks: tuple[str, str] | None) -> list[int]:
    """How many characters of each message a chat template shows at least: some leave out reasoning, and blanks."""
    shown = (str(message["content"]) for message in messages)
    return [len((text.rpartition(marks[1])[2] if marks else text).strip()) for text in shown]


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
