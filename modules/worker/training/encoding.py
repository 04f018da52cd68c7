"""Examples → token ids, and which of them carry loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modules.errors import BrokenData, BrokenTemplate
from modules.protocol import ChatMessages
from modules.training.data import Example, Examples
from modules.worker.prompts import Prompter
from modules.worker.templates import bounded

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks itself what the assistant says
_NAMED = 5  # bad examples that a message names
_LOOK_BACK = 8  # tokens before one that decide how its text is written

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One example as the model gets it, before it is cut. ``learned``: for each token, whether it carries loss."""

    number: int  # of the line or the example in the data
    ids: list[int]
    learned: list[bool]

    def cut_to(self, tokens: int) -> Encoded:
        return Encoded(self.number, self.ids[:tokens], self.learned[:tokens])

    @property
    def teaches(self) -> bool:
        """Whether there is anything to predict: the first token never is."""
        return any(self.learned[1:])


def encode_all(found: Examples, tokenizer: Any, cutoff: int, progress: Callable[[int, int], None]) -> Iterator[Encoded]:
    """Every example, not cut yet; a running text in pieces of the cut-off. Raises BrokenData, which names the lines."""
    encoder = Encoder(tokenizer)
    bad: list[str] = []
    for done, example in enumerate(found.examples):
        if done % 100 == 0:
            progress(done, len(found.examples))
        try:
            encoded = list(encoder.encode(example))
        except (ValueError, BrokenTemplate) as error:
            bad.append(f"{example.where}: {error}")
            continue
        if found.plain:
            yield from _pieces(encoded[0], cutoff)
        else:
            yield from encoded
    if bad:
        more = f" And {len(bad) - _NAMED} more." if len(bad) > _NAMED else ""
        raise BrokenData(
            f"The model cannot read {len(bad)} of {len(found.examples)} examples. {'; '.join(bad[:_NAMED])}.{more}",
            "Most chat templates want user and assistant to take turns, the user first.",
        )


def _pieces(text: Encoded, cutoff: int) -> Iterator[Encoded]:
    for start in range(0, len(text.ids), cutoff):
        yield Encoded(0, text.ids[start : start + cutoff], text.learned[start : start + cutoff])


class Encoder:
    """Encodes examples for one model. Loss is on what the assistant says and on what ends its turn."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.chat_template or "")
        self._plain = Prompter(tokenizer, "causal", 0)

    def encode(self, example: Example) -> Iterator[Encoded]:
        """One or more, where only parts of a conversation can be taught at a time. Raises ValueError where the chat
        template refuses it, BrokenTemplate where that does not end."""
        if example.messages:
            return self._chat(example)
        end = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        if example.text:
            ids = self._whole(example.text) + end
            return iter([Encoded(example.number, ids, [True] * len(ids))])
        prompt = self._whole(example.prompt) if example.prompt else []
        answer = [*self._tokenizer(example.completion, add_special_tokens=False).input_ids, *end]
        learned = [False] * len(prompt) + [True] * len(answer)
        return iter([Encoded(example.number, prompt + answer, learned)])

    def _whole(self, text: str) -> list[int]:
        """With what the model wants in front, and without what would end it."""
        ids = list(self._tokenizer(text).input_ids)
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids

    # --- conversations ---

    def _chat(self, example: Example) -> Iterator[Encoded]:
        if _GENERATION.search(self._template) and (marked := self._marked(example)) is not None:
            yield marked
            return
        text = self._render(example.messages, False)
        answers = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
        spans = [self._span(example.messages[: place + 1]) for place in answers]
        if all(text.startswith(upto) for upto, _ in spans):
            yield self._encoded(example.number, text, [span for _, span in spans])
            return
        # The template writes earlier turns differently from the last one, as those that leave old reasoning out do:
        # each answer is taught by itself, as the model will be asked for it.
        for upto, span in spans:
            yield self._encoded(example.number, upto, [span])

    def _marked(self, example: Example) -> Encoded | None:
        """By the template's own marks; None where they mark nothing."""

        def render() -> Any:
            return self._tokenizer.apply_chat_template(
                list(example.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )

        made = self._refusing(lambda: bounded(render))
        mask = [bool(one) for one in made.get("assistant_masks", [])]
        return Encoded(example.number, list(made["input_ids"]), mask) if any(mask) else None

    def _span(self, messages: ChatMessages) -> tuple[str, Span]:
        """The text up to the last message, an assistant's, and where in it that answer stands: what the template writes
        beyond the prompt for it, its end mark included."""
        upto = self._render(messages, False).rstrip()
        if len(messages) == 1:
            return upto, (max(0, upto.find(str(messages[0]["content"]))), len(upto))
        prompt = self._render(messages[:-1], True)
        return upto, (_common(prompt, upto), len(upto))

    def _encoded(self, number: int, text: str, spans: list[Span]) -> Encoded:
        text = text[: spans[-1][1]]  # nothing behind the last answer teaches anything
        if not self._tokenizer.is_fast:
            return self._by_prefixes(number, text, spans)
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in made["offset_mapping"]]
        learned = [any(first <= start < end for first, end in spans) for start in starts]
        return self._with_end(number, list(made["input_ids"]), learned)

    def _by_prefixes(self, number: int, text: str, spans: list[Span]) -> Encoded:
        """For tokenizers that do not tell where in the text a token stands."""
        ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)

        def tokens_of(end: int) -> int:
            prefix = self._tokenizer(text[:end], add_special_tokens=False).input_ids
            return _common(prefix, ids)

        ranges = [(tokens_of(start), tokens_of(end)) for start, end in spans]
        learned = [any(first <= place < end for first, end in ranges) for place in range(len(ids))]
        return self._with_end(number, ids, learned)

    def _with_end(self, number: int, ids: list[int], learned: list[bool]) -> Encoded:
        """Without a template nothing else ends the answer."""
        end = self._tokenizer.eos_token_id
        if not self._template and end is not None:
            return Encoded(number, [*ids, end], [*learned, True])
        return Encoded(number, ids, learned)

    def _render(self, messages: ChatMessages, asked: bool) -> str:
        """``asked``: with what stands before an answer."""
        if not self._template:
            return self._plain.plain(messages, not asked)

        def render() -> str:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked))

        return str(self._refusing(lambda: bounded(render)))

    def _refusing(self, render: Callable[[], Any]) -> Any:
        try:
            return render()
        except BrokenTemplate:
            raise
        except Exception as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from error


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of what both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token's text, with the space before it where it has one; what is part of a character is shown as �."""
    texts = []
    for place in range(len(ids)):
        before = tokenizer.decode(ids[max(0, place - _LOOK_BACK) : place], clean_up_tokenization_spaces=False)
        both = tokenizer.decode(ids[max(0, place - _LOOK_BACK) : place + 1], clean_up_tokenization_spaces=False)
        alone = both[len(before) :] if both.startswith(before) and len(both) > len(before) else ""
        texts.append(alone or tokenizer.decode([ids[place]], clean_up_tokenization_spaces=False))
    return texts
