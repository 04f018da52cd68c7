"""Prompts of the demo model's own template, of others', and of none; and what is left out where they are too long."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from modules.errors import RequestTooLarge, RequestTooLong, UserError
from modules.options import GenerationOptions
from modules.protocol import ChatMessages, CountOrder, GenerateOrder, Task
from modules.worker.prompts import Prompter
from modules.worker.tokenizing import MOST_TEXT_BYTES

GEMMA_LIKE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)
DEAF = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


def chat(*texts: str, system: str = "") -> ChatMessages:
    """User and assistant in turns."""
    turns = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(texts)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


def prompter(tokenizer: Any, template: str | None = "", ctx_tokens: int = 2048, task: Task = "causal") -> Prompter:
    changed = copy.deepcopy(tokenizer)
    if template != "":
        changed.chat_template = template
    return Prompter(changed, task, ctx_tokens)


def text_of(maker: Prompter, messages: ChatMessages, continue_last: bool = False) -> str:
    order = GenerateOrder(GenerationOptions(), messages, continue_last=continue_last)
    return str(maker.tokenizer.decode(maker.prompt(order).ids))


def test_messages_go_through_the_models_template(tokenizer: Any) -> None:
    messages = chat("Hi", "Hello!", "Who are you?", system="Be brief.")
    expected = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
    assert prompter(tokenizer).prompt(GenerateOrder(GenerationOptions(), messages)).ids == expected


def test_the_last_message_is_continued(tokenizer: Any) -> None:
    text = text_of(prompter(tokenizer), chat("Count.", "One, two,"), continue_last=True)
    assert text.endswith("<|im_start|>assistant\nOne, two,")


def test_an_empty_last_message_is_an_answer_not_yet_begun(tokenizer: Any) -> None:
    maker = prompter(tokenizer)
    assert text_of(maker, chat("Count.", ""), continue_last=True) == text_of(maker, chat("Count."))


@pytest.mark.parametrize("template", [GEMMA_LIKE, DEAF])
def test_a_template_without_a_system_role_gets_it_with_the_first_question(tokenizer: Any, template: str) -> None:
    text = text_of(prompter(tokenizer, template), chat("Hi", "Hello!", "Bye", system="Be brief."))
    assert text.startswith("[user]Be brief.\n\nHi[assistant]Hello![user]Bye")


def test_what_a_template_refuses_is_said(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="roles must alternate"):
        text_of(prompter(tokenizer, GEMMA_LIKE), (*chat("Hi"), *chat("Hi again")))
    with pytest.raises(UserError, match="refuses these messages"):
        text_of(prompter(tokenizer, "{{ broken"), chat("Hi"))


def test_without_a_template_messages_become_a_plain_completion_prompt(tokenizer: Any) -> None:
    maker = prompter(tokenizer, None)
    order = GenerateOrder(GenerationOptions(), chat("Hi", "Hello!", "Bye", system="Be brief."))
    prompt = maker.prompt(order)
    assert maker.tokenizer.decode(prompt.ids) == "Be brief.\n\nUser: Hi\nAssistant: Hello!\nUser: Bye\nAssistant:"
    assert prompt.stops == ("\nUser:",)
    assert text_of(maker, chat("Hi", "Hel"), continue_last=True) == "User: Hi\nAssistant: Hel"


def test_an_instruction_for_an_encoder_decoder_stands_as_it_is(tokenizer: Any) -> None:
    maker = prompter(tokenizer, None, task="seq2seq")
    assert text_of(maker, chat("translate to German: Hi")) == "translate to German: Hi"


def test_a_raw_prompt_stands_as_it_is(tokenizer: Any) -> None:
    maker = prompter(tokenizer)
    order = GenerateOrder(GenerationOptions(), prompt="Once upon a time 🤖")
    assert maker.tokenizer.decode(maker.prompt(order).ids) == "Once upon a time 🤖"
    assert maker.prompt(GenerateOrder(GenerationOptions())).ids == [tokenizer.bos_token_id]


@pytest.mark.parametrize("template", ["", None])
def test_raw_prompts_and_continued_messages_are_texts_that_the_answer_goes_on_with(
    tokenizer: Any, template: str | None
) -> None:
    def continues(task: Task, *texts: str, **order: Any) -> bool:
        asked = GenerateOrder(GenerationOptions(), chat(*texts), **order)
        return prompter(tokenizer, template, task=task).prompt(asked).continues

    for whole in (False, True):
        assert continues("causal", prompt="Once", whole=whole)
        assert continues("causal", prompt_ids=(300,), whole=whole)
        assert continues("causal", "Count.", "One,", continue_last=True, whole=whole)
        assert not continues("causal", "Count.", whole=whole)
        assert not continues("causal", "Count.", "", continue_last=True, whole=whole)  # not yet begun
        assert not continues("seq2seq", prompt="Once", whole=whole)  # a decoder begins a text of its own
        assert not continues("seq2seq", "Count.", "One,", continue_last=True, whole=whole)


def test_the_oldest_turns_are_left_out_and_counted(tokenizer: Any) -> None:
    texts = [f"{'question' if at % 2 == 0 else 'answer'} {at} " + "word " * 30 for at in range(41)]
    messages = chat(*texts, system="Be brief.")
    maker = prompter(tokenizer, ctx_tokens=512)
    order = GenerateOrder(GenerationOptions(max_new_tokens=100), messages)
    prompt = maker.prompt(order)
    text = maker.tokenizer.decode(prompt.ids)
    kept = [message for message in messages if message["content"].strip() in text]
    assert kept == [messages[0], *messages[1 + prompt.dropped_messages :]]
    assert kept[1]["role"] == "user"  # no answer without its question
    assert len(prompt.ids) + 100 <= 512
    one_turn_more = (messages[0], *messages[1 + prompt.dropped_messages - 2 :])
    assert maker.count(CountOrder(one_turn_more)) + 100 > 512  # no more than needed is left out


def test_nothing_is_left_out_of_what_fits(tokenizer: Any) -> None:
    assert prompter(tokenizer).prompt(GenerateOrder(GenerationOptions(), chat("a", "b", "c"))).dropped_messages == 0


def test_a_long_answer_that_is_asked_for_does_not_push_the_conversation_out(tokenizer: Any) -> None:
    messages = chat(*["word " * 50] * 5)
    order = GenerateOrder(GenerationOptions(max_new_tokens=100_000), messages)
    maker = prompter(tokenizer, ctx_tokens=512)
    prompt = maker.prompt(order)
    assert prompt.dropped_messages == 0
    assert 0 < maker.room(prompt) < 512


def test_a_last_message_that_does_not_fit_is_refused_with_numbers(tokenizer: Any) -> None:
    maker = prompter(tokenizer, ctx_tokens=256)
    order = GenerateOrder(GenerationOptions(max_new_tokens=50), chat("Hi", "Hello!", "word " * 1000))
    with pytest.raises(RequestTooLong, match=r"1,0\d\d tokens; a context of 256"):
        maker.prompt(order)


def test_a_raw_prompt_loses_its_left_end(tokenizer: Any) -> None:
    maker = prompter(tokenizer, ctx_tokens=64)
    text = " ".join(map(str, range(1000)))
    prompt = maker.prompt(GenerateOrder(GenerationOptions(max_new_tokens=10), prompt=text))
    assert text.endswith(maker.tokenizer.decode(prompt.ids))
    assert len(prompt.ids) == 64 - 10


def test_a_raw_prompt_that_fits_is_whole_where_it_is_to_be_however_long_the_answer_may_get(tokenizer: Any) -> None:
    maker = prompter(tokenizer, ctx_tokens=64)
    text = "word" + " word" * 59
    prompt = maker.prompt(GenerateOrder(GenerationOptions(max_new_tokens=100), prompt=text, whole=True))
    assert maker.tokenizer.decode(prompt.ids) == text
    assert maker.room(prompt) == 4


def test_a_leading_special_token_survives_the_cut_and_is_not_doubled(tokenizer: Any) -> None:
    maker = prompter(tokenizer, ctx_tokens=64)
    begin = maker.tokenizer.bos_token
    prompt = maker.prompt(GenerateOrder(GenerationOptions(max_new_tokens=10), prompt=begin + "word " * 200))
    assert prompt.ids[0] == maker.tokenizer.bos_token_id
    assert prompt.ids[1] != maker.tokenizer.bos_token_id
    assert len(prompt.ids) == 64 - 10


def test_counting_is_what_generating_uses(tokenizer: Any) -> None:
    maker = prompter(tokenizer)
    messages = chat("How many tokens?")
    assert maker.count(CountOrder(messages)) == len(maker.prompt(GenerateOrder(GenerationOptions(), messages)).ids)
    assert maker.count(CountOrder(prompt="one two")) == 2


class Counting:
    """The tokenizer, and how many characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **kwargs)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


LONG = "The quick brown fox jumps over 13 lazy dogs; " * 200_000  # 9 MB
MEDIUM = LONG[-100_000:]  # 100 kB, less than what surely is too long by its length


@pytest.mark.parametrize("text", [LONG, MEDIUM], ids=["long", "medium"])
@pytest.mark.parametrize("template", ["", None])
def test_of_a_text_that_is_much_too_long_only_a_little_is_tokenized(
    tokenizer: Any, text: str, template: str | None
) -> None:
    counting = Counting(prompter(tokenizer, template).tokenizer)
    maker = Prompter(counting, "causal", 512)
    chatting = GenerateOrder(GenerationOptions(), chat("Hi", "Hello!", text))
    for order in (
        GenerateOrder(GenerationOptions(), prompt=text, whole=True),
        dataclasses.replace(chatting, whole=True),
        chatting,
    ):
        with pytest.raises(RequestTooLong, match=r"[\d,]{7,} characters; a context of 512 tokens takes"):
            maker.prompt(order)
    assert counting.characters < 50_000


def test_a_long_history_is_tokenized_near_its_end_alone(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    maker = Prompter(counting, "causal", 512)
    messages = chat(*["word " * 20_000, "word " * 20_000] * 50, "A question", system="Be brief.")
    prompt = maker.prompt(GenerateOrder(GenerationOptions(max_new_tokens=50), messages))
    assert prompt.dropped_messages == 100
    assert "Be brief." in tokenizer.decode(prompt.ids)
    assert counting.characters < 200_000


def test_reasoning_that_the_template_leaves_out_makes_no_conversation_too_long(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    messages = chat("Hi", "<think>" + LONG + "</think>Hello!", "Bye")
    for whole in (True, False):
        prompt = prompter(tokenizer, template, 64).prompt(
            GenerateOrder(GenerationOptions(max_new_tokens=8), messages, whole=whole)
        )
        assert tokenizer.decode(prompt.ids) == "HiHello!Bye"


def test_a_long_raw_prompts_right_end_is_what_it_is_without_the_rest(tokenizer: Any) -> None:
    begin = tokenizer.bos_token
    counting = Counting(tokenizer)
    maker = Prompter(counting, "causal", 512)
    for text in (LONG, begin + LONG, begin + MEDIUM):
        prompt = maker.prompt(GenerateOrder(GenerationOptions(max_new_tokens=12), prompt=text))
        expected = tokenizer(MEDIUM).input_ids[-500:]
        if text.startswith(begin):
            expected[0] = tokenizer.bos_token_id
        assert prompt.ids == expected
    assert counting.characters < 50_000


def test_what_is_counted_and_encoded_has_a_bound_of_its_own(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    maker = Prompter(counting, "causal", 512)
    text = "é" * (MOST_TEXT_BYTES // 2) + "e"
    for refused in (
        lambda: maker.encode(text),
        lambda: maker.count(CountOrder(prompt=text)),
        lambda: maker.count(CountOrder(chat(text[1:], "ee"))),
        lambda: maker.decode([5] * (MOST_TEXT_BYTES + 1)),
    ):
        with pytest.raises(RequestTooLarge, match=r"1,048,57\d .* too many: the tokenizer takes 1,048,576") as caught:
            refused()
        assert "in parts" in caught.value.hint
    assert counting.characters == 0
    assert maker.decode(maker.encode(MEDIUM)) == MEDIUM  # longer than the context
