"""Answers of the real demo model, in this process."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from modules.errors import InternalError, OptionError, OutOfMemory, RequestTooLong
from modules.options import GenerationOptions
from modules.protocol import ChatMessages, Chunk, Done, Failed, GenerateOrder, LoadOrder, Piece, Shape
from modules.worker.generation import generate
from tests.machine import DTYPE

QUESTION: ChatMessages = ({"role": "user", "content": "Name three colours, and say what each is like."},)


@dataclass(frozen=True)
class LoadedHere:
    """A model as the loader hands it over, as far as generation cares."""

    model: Any
    tokenizer: Any
    order: LoadOrder


@pytest.fixture(scope="module")
def _loaded(demo_model: Path, demo_order: LoadOrder) -> LoadedHere:
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=DTYPE)
    return LoadedHere(model, AutoTokenizer.from_pretrained(demo_model), demo_order)


@pytest.fixture
def loaded(_loaded: LoadedHere) -> Iterator[LoadedHere]:
    """The demo model; changes to its generation config are undone after the test."""
    before: GenerationConfig = _loaded.model.generation_config
    _loaded.model.generation_config = GenerationConfig.from_dict(before.to_dict())
    yield _loaded
    _loaded.model.generation_config = before


@pytest.fixture(scope="module")
def encoder_decoder(_loaded: LoadedHere) -> LoadedHere:
    """A small T5 with random weights, and no end-of-text token of its own that it would hit by chance."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(_loaded.tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    return LoadedHere(model, _loaded.tokenizer, dataclasses.replace(_loaded.order, task="seq2seq", ctx_tokens=64))


def options(max_new_tokens: int = 24, temperature: float = 0.0, **rest: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, **rest})


def answer(loaded: LoadedHere, order: GenerateOrder) -> tuple[str, Done]:
    chunks: list[Chunk] = []
    generate(loaded, order, chunks.append)
    *pieces, last = chunks
    assert isinstance(last, Done), last
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), last


def failure(loaded: LoadedHere, order: GenerateOrder) -> Exception:
    chunks: list[Chunk] = []
    generate(loaded, order, chunks.append)
    assert isinstance(chunks[-1], Failed)
    return chunks[-1].error


def bare(loaded: LoadedHere, messages: ChatMessages, **kwargs: Any) -> tuple[str, int]:
    """The same by transformers alone."""
    tokenizer = loaded.tokenizer
    inputs = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt")
    output = loaded.model.generate(**inputs, **kwargs)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(output, skip_special_tokens=True)), len(output)


def test_the_stream_is_what_a_bare_generate_gives(loaded: LoadedHere) -> None:
    expected, tokens = bare(loaded, QUESTION, max_new_tokens=64, do_sample=False)
    text, done = answer(loaded, GenerateOrder(options(64), QUESTION))
    assert text == expected
    assert done.completion_tokens == tokens
    assert done.finish_reason == "length"
    assert done.seconds > 0 < done.first_token_seconds


def test_sampling_is_what_a_bare_generate_gives(loaded: LoadedHere) -> None:
    chosen = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1}
    torch.manual_seed(7)
    expected, _ = bare(loaded, QUESTION, max_new_tokens=32, do_sample=True, **chosen)
    assert answer(loaded, GenerateOrder(options(32, seed=7, **chosen), QUESTION))[0] == expected


def test_the_same_seed_gives_the_same_answer(loaded: LoadedHere) -> None:
    first, same, other = (answer(loaded, GenerateOrder(options(temperature=1, seed=s), QUESTION))[0] for s in (3, 3, 4))
    assert first == same != other
    torch.manual_seed(0)
    one = answer(loaded, GenerateOrder(options(temperature=1), QUESTION))[0]
    torch.manual_seed(0)
    assert one != answer(loaded, GenerateOrder(options(temperature=1), QUESTION))[0]  # -1 takes a new one


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_each_narrowing_option_reaches_the_choice(loaded: LoadedHere, narrow: dict[str, Any]) -> None:
    counting = "One, two, three, four,"  # no two tokens are equally likely here, as bfloat16 easily has it
    greedy = answer(loaded, GenerateOrder(options(8), prompt=counting))[0]
    free = options(8, temperature=1.5, seed=1)
    assert answer(loaded, GenerateOrder(dataclasses.replace(free, **narrow), prompt=counting))[0] == greedy
    assert answer(loaded, GenerateOrder(free, prompt=counting))[0] != greedy


def test_the_models_own_sampling_defaults_do_not_mix_in(loaded: LoadedHere) -> None:
    free = answer(loaded, GenerateOrder(options(temperature=1.5, seed=1), QUESTION))[0]
    greedy = answer(loaded, GenerateOrder(options(), QUESTION))[0]
    loaded.model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=1.5, num_beams=2
    )
    assert answer(loaded, GenerateOrder(options(temperature=1.5, seed=1), QUESTION))[0] == free
    assert answer(loaded, GenerateOrder(options(), QUESTION))[0] == greedy


def test_greedy_and_sampled_answers_print_no_warning(loaded: LoadedHere, capfd: pytest.CaptureFixture[str]) -> None:
    loaded.model.generation_config.update(temperature=0.6, top_p=0.9, top_k=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(loaded, GenerateOrder(options(4), QUESTION))
        answer(loaded, GenerateOrder(options(4, temperature=0.7, seed=1), QUESTION))
    assert capfd.readouterr().err == ""


def test_the_models_end_token_ends_the_answer(loaded: LoadedHere) -> None:
    messages: ChatMessages = ({"role": "user", "content": "What is the capital of France? One word."},)
    text, done = answer(loaded, GenerateOrder(options(200), messages))
    assert done.finish_reason == "stop"
    assert done.completion_tokens < 200
    assert "<|im_end|>" not in text


def test_every_end_token_of_the_generation_config_counts(loaded: LoadedHere) -> None:
    text, _ = answer(loaded, GenerateOrder(options(), QUESTION))
    tokens = loaded.tokenizer(text, add_special_tokens=False).input_ids
    end = tokens[10]
    loaded.model.generation_config.eos_token_id = [2, end]
    shorter, done = answer(loaded, GenerateOrder(options(), QUESTION))
    assert done.finish_reason == "stop"
    assert done.completion_tokens == tokens.index(end) + 1
    assert shorter == loaded.tokenizer.decode(tokens[: tokens.index(end)])


def test_an_answer_can_be_stopped_at_the_next_token(loaded: LoadedHere) -> None:
    stopped = threading.Event()
    chunks: list[Chunk] = []

    def emit(chunk: Chunk) -> None:
        chunks.append(chunk)
        if isinstance(chunk, Piece) and chunk.tokens >= 3:
            stopped.set()

    generate(loaded, GenerateOrder(options(500), QUESTION), emit, stopped)
    done = chunks[-1]
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    assert done.completion_tokens <= 4


def test_who_gave_up_before_the_turn_costs_no_prefill(loaded: LoadedHere) -> None:
    stopped = threading.Event()
    stopped.set()
    chunks: list[Chunk] = []
    calls: list[int] = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(loaded, GenerateOrder(options(), QUESTION), chunks.append, stopped)
    handle.remove()
    assert calls == []
    assert isinstance(chunks[-1], Done)
    assert chunks[-1].finish_reason == "cancelled"


def test_the_answer_is_cut_to_the_room_in_the_context(loaded: LoadedHere) -> None:
    narrow = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, ctx_tokens=80))
    _, done = answer(narrow, GenerateOrder(options(1000), QUESTION))
    assert done.prompt_tokens + done.completion_tokens == 80
    assert done.finish_reason == "length"


def test_dropped_messages_are_told(loaded: LoadedHere) -> None:
    narrow = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, ctx_tokens=128))
    messages = tuple({"role": role, "content": "word " * 40} for role in ("user", "assistant", "user"))
    _, done = answer(narrow, GenerateOrder(options(4), messages))
    assert done.dropped_messages == 2
    assert done.left_out == "of the oldest, 2 messages did not fit"


def test_what_was_cut_from_a_raw_prompt_is_told(loaded: LoadedHere) -> None:
    narrow = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, ctx_tokens=128))
    _, done = answer(narrow, GenerateOrder(options(4), prompt="word " * 300))
    whole = len(loaded.tokenizer("word " * 300).input_ids)
    assert done.dropped_tokens == whole - done.prompt_tokens > 0
    assert done.left_out == f"of the front, {done.dropped_tokens} tokens did not fit"
    _, done = answer(loaded, GenerateOrder(options(4), prompt="word " * 300))
    assert (done.dropped_tokens, done.left_out) == (0, "")


def test_what_was_cut_from_a_long_raw_prompt_is_told_in_hundreds(loaded: LoadedHere) -> None:
    narrow = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, ctx_tokens=128))
    _, done = answer(narrow, GenerateOrder(options(4), prompt="word " * 50_000))
    whole = len(loaded.tokenizer("word " * 50_000).input_ids)
    assert done.dropped_tokens == pytest.approx(whole - done.prompt_tokens, rel=0.05)


def test_what_does_not_fit_fails_before_the_model_is_asked(loaded: LoadedHere) -> None:
    narrow = dataclasses.replace(loaded, order=dataclasses.replace(loaded.order, ctx_tokens=32))
    assert isinstance(failure(narrow, GenerateOrder(options(), QUESTION)), RequestTooLong)


def test_a_raw_prompt_is_continued(loaded: LoadedHere) -> None:
    text, _ = answer(loaded, GenerateOrder(options(8), prompt="One, two, three, four,"))
    assert text.startswith(" five")


def test_the_last_message_is_continued(loaded: LoadedHere) -> None:
    messages = (*QUESTION, {"role": "assistant", "content": "One, two, three, four,"})
    text, _ = answer(loaded, GenerateOrder(options(8), messages, continue_last=True))
    assert text.startswith(" five")


def test_only_what_goes_on_with_a_text_begins_with_the_blank_that_the_decoder_takes_away(
    loaded: LoadedHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    strip = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # Llama 2's
    monkeypatch.setattr(loaded.tokenizer.backend_tokenizer, "decoder", strip)
    assert loaded.tokenizer.decode(loaded.tokenizer(" five").input_ids) == "five"
    text, tokens = told(loaded, "never")
    assert text.startswith(" five")
    assert "".join(tokens) == text
    ids = tuple(loaded.tokenizer(COUNTING).input_ids)
    assert answer(loaded, GenerateOrder(options(8), prompt_ids=ids))[0].startswith(" five")
    begun = (*QUESTION, {"role": "assistant", "content": COUNTING})
    assert answer(loaded, GenerateOrder(options(8), begun, continue_last=True))[0].startswith(" five")
    blank = Shape(logit_bias={str(loaded.tokenizer(" five").input_ids[0]): 100.0})
    assert answer(loaded, GenerateOrder(options(2), QUESTION, shape=blank))[0] == "five five"


def test_without_a_template_the_answer_ends_before_the_next_question(
    loaded: LoadedHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    shots = [("What is 1+1?", "Two."), ("What is 2+1?", "Three."), ("What is 3+1?", "Four.")]
    messages = [{"role": r, "content": c} for shot in shots for r, c in zip(("user", "assistant"), shot, strict=True)]
    order = GenerateOrder(options(60), (*messages, {"role": "user", "content": "What is 4+1?"}))
    text, done = answer(loaded, order)
    assert text.strip() == "Five."
    assert done.finish_reason == "stop"


def test_an_encoder_decoder_gets_the_prompt_in_its_encoder(encoder_decoder: LoadedHere) -> None:
    ids = encoder_decoder.tokenizer("translate: Hi", return_tensors="pt").input_ids
    output = encoder_decoder.model.generate(ids, max_new_tokens=12, do_sample=False)[0, 1:]
    expected = encoder_decoder.tokenizer.decode(output, skip_special_tokens=True)
    text, done = answer(encoder_decoder, GenerateOrder(options(12), prompt="translate: Hi"))
    assert text == expected
    assert done.completion_tokens == 12
    assert done.prompt_tokens == ids.shape[1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory), (RuntimeError("odd"), InternalError)],
)
def test_a_generation_that_fails_leaves_the_model_usable(
    loaded: LoadedHere, error: Exception, kind: type[Exception]
) -> None:
    expected = answer(loaded, GenerateOrder(options(8), QUESTION))[0]
    handle = loaded.model.model.layers[-1].register_forward_hook(_raising_at_call(3, error))
    told = failure(loaded, GenerateOrder(options(), QUESTION))
    handle.remove()
    assert isinstance(told, kind)
    assert told.__traceback__ is None  # it would keep the step's tensors in memory
    assert answer(loaded, GenerateOrder(options(8), QUESTION))[0] == expected


def _raising_at_call(call: int, error: Exception) -> Callable[..., None]:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    return hook


def told(loaded: LoadedHere, stop: str, count: int = 12) -> tuple[str, list[str]]:
    """The text up to ``stop``, and the tokens whose log probabilities are told."""
    chunks: list[Chunk] = []
    order = GenerateOrder(options(count), prompt=COUNTING, shape=Shape(stops=(stop,), logprobs=0))
    generate(loaded, order, chunks.append)
    pieces = [chunk for chunk in chunks if isinstance(chunk, Piece)]
    return "".join(piece.text for piece in pieces), [one["token"] for piece in pieces for one in piece.logprobs]


COUNTING = "One, two, three, four,"


def test_a_token_that_the_tokenizer_alone_knows_is_refused(loaded: LoadedHere) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens("[MADE-UP]")
    with_more = LoadedHere(loaded.model, tokenizer, loaded.order)
    error = failure(with_more, GenerateOrder(options(8), prompt="Hello [MADE-UP] there"))
    assert isinstance(error, OptionError)
    assert str(len(tokenizer) - 1) in error.message


def test_log_probabilities_end_where_a_stop_cuts_the_text(loaded: LoadedHere) -> None:
    whole, tokens = told(loaded, "never")
    assert "".join(tokens) == whole
    assert len(tokens) == 12
    for at, token in enumerate(tokens[:6]):
        if at == tokens.index(token):
            text, found = told(loaded, token)  # wholly behind the cut
            assert (text, found) == ("".join(tokens[:at]), tokens[:at])
    first, second = tokens[1:3]
    text, found = told(loaded, first[1:] + second)  # from within one token to the end of another
    assert (text, found) == (tokens[0] + first[:1], tokens[:2])
    text, found = told(loaded, second + "never")  # held back, and then no stop
    assert (text, found) == (whole, tokens)
