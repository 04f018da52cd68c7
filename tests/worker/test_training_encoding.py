"""Examples as the model gets them: which tokens carry loss, what is cut, what is packed, what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.errors import BrokenData
from modules.options import TrainingOptions
from modules.training.data import Example, Examples, read
from modules.training.messages import DataFile, PreviewOrder
from modules.worker.training.dataset import collator, make_lesson, split, steps_for
from modules.worker.training.encoding import Encoded, Encoder, encode_all, token_texts
from modules.worker.training.preview import preview
from tests import checkpoints, trainings

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Anna."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Bern."},
)
# Marks its answers itself; writes an end that its author wants learned, and a header that is not.
MARKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes earlier answers in another way than the last one, as templates do that leave old reasoning out.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(thought) {{ m.content }}<end>"
    "{% else %}{{ m.content }}<end>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


def learned(tokenizer: Any, example: Example) -> list[str]:
    """What carries loss of each piece that the example becomes, as text."""
    return [
        tokenizer.decode([token for token, carries in zip(one.ids, one.learned, strict=True) if carries])
        for one in Encoder(tokenizer).encode(example)
    ]


def chat(*turns: dict[str, str]) -> Example:
    return Example("line 1", 1, messages=turns)


@pytest.mark.parametrize("options", [TrainingOptions(), TrainingOptions(evaluation_share=0.5, seed=3)], ids=str)
def test_no_conversation_is_both_learned_and_measured_on(tokenizer: Any, options: TrainingOptions) -> None:
    tokenizer.chat_template = FORGETFUL
    talks = tuple(Example(f"line {number}", number, messages=TURNS) for number in range(1, 21))
    found = Examples(talks, "chat")
    examples = list(encode_all(found, tokenizer, 512, lambda *_: None))
    assert len(examples) == 2 * len(talks)
    train, evaluation = split(examples, options)
    assert len(train) + len(evaluation) == len(examples)
    assert len(evaluation) == pytest.approx(len(examples) * options.evaluation_share, abs=1)
    assert {one.number for one in train}.isdisjoint(one.number for one in evaluation)
    kept = make_lesson(examples, options)
    assert {row[0].number for row in kept.train}.isdisjoint(row[0].number for row in kept.evaluation)
    before = make_lesson(examples, options, whole=False)  # as runs go on that began so
    assert {row[0].number for row in before.train} & {row[0].number for row in before.evaluation}


def test_one_conversation_alone_is_learned() -> None:
    pieces = [Encoded(1, [1, 2, at], [False, True, True]) for at in range(4)]
    assert split(pieces, TrainingOptions()) == (pieces, [])


def test_examples_of_one_piece_are_drawn_as_ever() -> None:
    singles = [Encoded(at + 1, [1, 2, at], [False, True, True]) for at in range(40)]
    running = [Encoded(0, [1, 2, at], [False, True, True]) for at in range(40)]
    for examples in (singles, running):
        assert split(examples, TrainingOptions()) == split(examples, TrainingOptions(), whole=False)


def test_the_assistants_turns_alone_are_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, chat(*TURNS)) == ["Anna.<|im_end|>In Bern.<|im_end|>"]
    (one,) = Encoder(tokenizer).encode(chat(*TURNS))
    whole = tokenizer.apply_chat_template(list(TURNS), tokenize=False)
    assert tokenizer.decode(one.ids) == whole.rstrip()


def test_what_the_prompt_of_an_answer_writes_is_not_learned(tokenizer: Any) -> None:
    (one,) = Encoder(tokenizer).encode(chat(*TURNS[:3]))
    prompt = tokenizer.apply_chat_template(list(TURNS[:2]), add_generation_prompt=True, return_dict=False)
    assert one.ids[: len(prompt)] == prompt
    assert not any(one.learned[: len(prompt)])
    assert all(one.learned[len(prompt) :])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKING, ["Anna.<|im_end|>In Bern.<|im_end|>"]),
        (FORGETFUL, ["(thought) Anna.<end>", "(thought) In Bern.<end>"]),
    ],
)
def test_templates_that_mark_answers_or_rewrite_them(tokenizer: Any, template: str, expected: list[str]) -> None:
    tokenizer.chat_template = template
    assert learned(tokenizer, chat(*TURNS)) == expected


def test_without_a_template_an_answer_ends_as_the_model_ends_texts(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    (said,) = learned(tokenizer, chat(*TURNS))
    assert said == f" Anna. In Bern.{tokenizer.eos_token}"


def test_a_slow_tokenizer_learns_the_same() -> None:
    """It does not tell where in the text a token stands."""
    fast = AutoTokenizer.from_pretrained(checkpoints.llama())
    fast.chat_template = MARKING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (by_offsets,) = Encoder(fast).encode(chat(*TURNS))

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(fast, name)

        def __call__(self, text: str, **how: Any) -> Any:
            assert "return_offsets_mapping" not in how
            return fast(text, **how)

    (by_prefixes,) = Encoder(Slow()).encode(chat(*TURNS))
    assert by_prefixes.ids == by_offsets.ids
    assert by_prefixes.learned == by_offsets.learned


def test_pairs_and_texts(tokenizer: Any) -> None:
    assert learned(tokenizer, Example("line 1", 1, prompt="1 + 1 =", completion=" 2")) == [f" 2{tokenizer.eos_token}"]
    assert learned(tokenizer, Example("line 1", 1, text="All of it.")) == [f"All of it.{tokenizer.eos_token}"]


def test_what_the_template_refuses_is_named_by_its_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    examples = (Example("line 4", 4, text="fine"), Example("line 7", 7, messages=TURNS))
    with pytest.raises(BrokenData, match=r"1 of 2 examples. line 7: .*no system here"):
        list(encode_all(Examples(examples, "chat"), tokenizer, 64, lambda *_: None))


def encoded(*lengths: int) -> list[Encoded]:
    return [
        Encoded(at, [5 + (at * 7 + place) % 500 for place in range(length)], [False] + [True] * (length - 1))
        for at, length in enumerate(lengths)
    ]


def test_examples_are_cut_and_those_that_teach_nothing_left_out() -> None:
    late = Encoded(9, list(range(20)), [False] * 15 + [True] * 5)
    lesson = make_lesson([*encoded(4, 12), late], TrainingOptions(cutoff=8, evaluation_share=0))
    assert [len(row[0].ids) for row in lesson.train] == [4, 8]
    counts = lesson.counts
    assert (counts.total, counts.cut, counts.left_out, counts.longest) == (3, 2, 1, 20)
    assert (lesson.tokens, lesson.learned_tokens) == (12, 10)
    with pytest.raises(BrokenData, match="longest has 20 tokens"):
        make_lesson([late], TrainingOptions(cutoff=8))


@pytest.mark.parametrize(("number", "share", "aside"), [(20, 0.1, 2), (3, 0.1, 1), (2, 0.5, 1), (1, 0.5, 0), (9, 0, 0)])
def test_what_is_measured_on_is_drawn_by_the_seed(number: int, share: float, aside: int) -> None:
    examples = encoded(*range(4, 4 + number))
    options = TrainingOptions(evaluation_share=share, seed=3)
    train, evaluation = split(examples, options)
    assert (len(train), len(evaluation)) == (number - aside, aside)
    assert split(examples, options) == (train, evaluation)
    assert sorted(one.number for one in [*train, *evaluation]) == list(range(number))


def test_packed_examples_fill_rows_and_do_not_see_each_other() -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints.llama(), dtype=torch.float32).eval()
    examples = encoded(5, 9, 3, 12, 7)
    options = TrainingOptions(cutoff=16, evaluation_share=0, packing=True)
    rows = make_lesson(examples, options).train
    assert len(rows) == 3
    assert max(sum(len(one.ids) for one in row) for row in rows) <= 16

    def total(batch: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(model(**batch, use_cache=False).loss) * int((batch["labels"][:, 1:] != -100).sum())

    packed = total(collator(0, packing=True)(rows))
    alone = sum(total(collator(0, packing=False)([[one]])) for one in examples)
    together = total(collator(0, packing=False)([[one] for one in examples]))
    assert packed == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "steps"),
    [(20, {"batch_size": 4, "epochs": 3}, 15), (21, {"batch_size": 4, "epochs": 1}, 6),
     (20, {"batch_size": 2, "accumulation": 4, "epochs": 1.5}, 5), (3, {"max_steps": 7}, 7)],
)  # fmt: skip
def test_steps_are_counted_as_they_are_made(rows: int, options: dict[str, Any], steps: int) -> None:
    assert steps_for(rows, TrainingOptions(**options)) == steps


def test_tokens_are_shown_with_their_spaces(tokenizer: Any) -> None:
    ids = tokenizer("Two  words, naïve 🙂").input_ids
    texts = token_texts(tokenizer, ids)
    assert texts[0] == "Two"
    assert "".join(text for text in texts if "�" not in text).replace(" ", "").startswith("Twowords,na")
    assert " words" in texts


def test_a_preview_tells_what_the_training_will_see(demo_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints.llama())
    file = trainings.jsonl(tmp_path / "d.jsonl", [trainings.chat("Who?", "Anna. " * at) for at in (1, 2, 60)])
    data = DataFile(str(file), "auto", "d.jsonl")
    options = TrainingOptions(cutoff=60, evaluation_share=0, batch_size=2, epochs=2)
    made = preview(PreviewOrder(data, options, 3), model, tokenizer)
    assert (made.total, made.counted, made.cut, made.steps, made.data_format) == (3, 3, 1, 4, "chat")
    assert made.matmul_flops > 1e6
    assert any("1 of 3 examples are longer than the cut-off" in note for note in made.notes)
    shown = made.examples[2]
    assert (len(shown.tokens), shown.cut, shown.line) == (60, made.longest - 60, 3)
    said = "".join(token.text for token in made.examples[0].tokens if token.learned)
    assert said == "Anna. <|im_end|>"
    lesson = make_lesson(encode_all(read(data), tokenizer, 60, lambda *_: None), options)
    assert (made.tokens, made.learned_tokens) == (lesson.tokens, lesson.learned_tokens)
    assert lesson.steps(options) == made.steps
    json.dumps([token.text for token in shown.tokens])


def test_a_preview_of_a_running_text(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints.llama())
    file = tmp_path / "book.txt"
    file.write_text("A sentence of some words. " * 100, encoding="utf-8")
    made = preview(PreviewOrder(DataFile(str(file)), TrainingOptions(cutoff=64), 2), model, tokenizer)
    assert made.data_format == "text"
    assert made.total == -(-made.tokens // 64)
    assert all(token.learned for token in made.examples[1].tokens[1:])
