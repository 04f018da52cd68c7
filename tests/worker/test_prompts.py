"""Prompts of the demo model's own template, of others', and of none; and what is left out where they are too long."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from modules.errors import RequestTooLong, UserError
from modules.options import GenerationOptions
from modules.protocol import ChatMessages, CountOrder, GenerateOrder, Task
from modules.worker.prompts import Prompter

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
