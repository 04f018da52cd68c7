"""Ways to make a model fit, each with its price, in the order in which a knowledgeable friend would name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modules.devices import Machine
from modules.planner.offload import offload_of
from modules.planner.solving import Answer, Question, solve
from modules.units import format_bytes

MOST = 4
_CONTEXT_STEP = 256
_USEFUL_CONTEXT = 2048  # tokens; a shorter one is a worse loss than 8-bit weights
_LEAST_CONTEXT = 512
_FOUR: Mapping[str, bool] = {"load_in_4bit": True, "load_in_8bit": False, "bf16": False}
_FOUR_DOUBLE: Mapping[str, bool] = {**_FOUR, "use_double_quant": True}
_WORSE = "Answers get slightly worse"
# How weights can be quantized while loading, the least loss first: what it costs, and the options.
_EIGHT_BIT, _FOUR_BIT, _DOUBLE = "8-bit", "4-bit", "4-bit with double quantization"
_WAYS: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    _EIGHT_BIT: ("Answers stay close to the original", {"load_in_8bit": True, "bf16": False}),
    _FOUR_BIT: (_WORSE, _FOUR),
    _DOUBLE: (_WORSE, _FOUR_DOUBLE),
}
_LONGEST_CONTEXT = 1 << 20  # tokens, where the model does not say


@dataclass(frozen=True)
class Suggestion:
    """``options``: the values to change. ``unload``: the running model has to be unloaded instead."""

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    unload: bool = False


def suggestions(question: Question, freed: Machine | None = None) -> tuple[Suggestion, ...]:
    """Up to four ways that would fit. ``freed``: the machine as it were without the model that is running."""
    found: list[Suggestion] = []
    for suggestion in _in_order(question, freed):
        found.append(suggestion)
        if len(found) == MOST:
            break
    return tuple(found)


def on_gpus_alone(question: Question) -> tuple[Suggestion, ...]:
    """For a model that fits with a part of it beside the GPUs: the ways to quantize it so that none is."""
    if question.checkpoint.quantization:
        return ()
    found: list[Suggestion] = []
    for way, (_, changes) in _WAYS.items():
        if way == _EIGHT_BIT and question.quantizes:
            continue
        answer = solve(question.but(**changes))
        if answer.fits and not answer.offloads:
            where = ", all on the GPUs" if answer.rooms.gpus[1:] else ", all on the GPU"
            found.append(Suggestion(_loaded_in(way, where).format(weights=format_bytes(_weights(answer))), changes))
            if way != _EIGHT_BIT:
                break
    return tuple(found)


def _loaded_in(way: str, where: str = "", more: str = "") -> str:
    """What a suggestion says of one of :data:`_WAYS`; ``{weights}`` stands for their bytes."""
    return f"Load in {way}: {{weights}} of weights{where}. {_WAYS[way][0]}{more}."


def _in_order(question: Question, freed: Machine | None) -> Iterator[Suggestion]:
    if freed is not None and solve(replace(question, machine=freed)).fits:
        yield Suggestion("Unload the running model first: it is in the way, and can be loaded again.", unload=True)
    yield from _wider(question)
    if _can(question, bf16=True) and solve(question).precision.dtype == "float32":
        cost = "no loss to speak of" if question.machine.cpu_bf16 else "but many times slower on this processor"
        yield from _one(question, f"Hold the weights as bfloat16: half the memory of float32, {cost}.", bf16=True)
    shorter = _shorter_context(question)
    if shorter and shorter >= _USEFUL_CONTEXT:
        yield _context(question, shorter)
    yield from _quantized(question)
    if shorter and shorter < _USEFUL_CONTEXT:
        yield _context(question, shorter)
    yield from _elsewhere(question)


def _one(question: Question, text: str, **changes: Any) -> Iterator[Suggestion]:
    """The suggestion, where it would fit. ``{weights}`` in the text is what the weights then take."""
    answer = solve(question.but(**changes))
    if answer.fits:
        yield Suggestion(text.format(weights=format_bytes(_weights(answer))), changes)


def _can(question: Question, **changes: Any) -> bool:
    """Whether the options are not so yet, and the checkpoint lets them be changed."""
    plain = not question.checkpoint.quantization
    return plain and any(getattr(question.options, name) != value for name, value in changes.items())


def _weights(answer: Answer) -> int:
    return sum(device.weights_bytes for device in answer.devices)


def _wider(question: Question) -> Iterator[Suggestion]:
    """Lift limits that the user set, where more is free."""
    given = {
        name: empty for name, empty in (("gpu_memory", ()), ("cpu_memory", 0.0)) if getattr(question.options, name)
    }
    names = {"gpu_memory": "the GPUs", "cpu_memory": "RAM"}
    for name, empty in given.items():
        yield from _one(question, f"Let the model take all that is free of {names[name]}, not only what is set.",
                        **{name: empty})  # fmt: skip


def _quantized(question: Question) -> Iterator[Suggestion]:
    options = question.options
    if _can(question, load_in_8bit=True) and not options.load_in_4bit:
        yield from _one(question, _loaded_in(_EIGHT_BIT, more="; each takes longer"), **_WAYS[_EIGHT_BIT][1])
    if question.checkpoint.quantization:
        return
    if not options.load_in_4bit:
        way = list(_one(question, _loaded_in(_FOUR_BIT), **_FOUR))
        if way:
            yield from way
            return
    if not options.use_double_quant:
        way = list(_one(question, _loaded_in(_DOUBLE), **_FOUR_DOUBLE))
        if way:
            yield from way
            return
    yield from _quantized_and_shorter(question.but(**_FOUR_DOUBLE))


def _quantized_and_shorter(question: Question) -> Iterator[Suggestion]:
    if tokens := _shorter_context(question):
        changes = {**_FOUR_DOUBLE, "ctx_size": tokens}
        text = "Load in 4-bit with double quantization, and a context of {tokens:,} tokens: both are losses."
        yield Suggestion(text.format(tokens=tokens), changes)


def _context(question: Question, tokens: int) -> Suggestion:
    words = tokens * 3 // 4 // 100 * 100
    return Suggestion(
        f"Shorten the context to {tokens:,} tokens, about {words:,} words: the model sees no more of a conversation.",
        {"ctx_size": tokens},
    )


def _shorter_context(question: Question) -> int:
    """The longest shorter context that fits, in tokens; 0 = none that is of use."""
    return longest_context(question, question.ctx_tokens - 1, _LEAST_CONTEXT)


def longest_context(question: Question, most: int, least: int, *, on_gpus: bool = False) -> int:
    """The longest context in steps between two bounds with which the model fits in order; 0 = not even the least.

    ``on_gpus``: with nothing of it in RAM or on disk beside a GPU.
    """

    def fits(steps: int) -> bool:
        answer = solve(question.but(ctx_size=steps * _CONTEXT_STEP), search=False)
        return answer.fits and not (on_gpus and answer.offloads)

    low, high = -(-least // _CONTEXT_STEP), most // _CONTEXT_STEP
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP


def spare_context(question: Question, answer: Answer) -> int:
    """How many more tokens of context than asked for would fit, up to the model's own limit.

    Where ``answer``, that of the question, lies on the GPUs alone, it still would with so many.
    """
    most = question.checkpoint.context_limit or _LONGEST_CONTEXT
    longest = longest_context(question, most, question.ctx_tokens, on_gpus=not answer.offloads)
    return max(0, longest - question.ctx_tokens)


def _elsewhere(question: Question) -> Iterator[Suggestion]:
    """Layers in RAM, on disk, or everything on the CPU."""
    options, machine = question.options, question.machine
    on_gpu = bool(machine.gpus) and not options.cpu
    if on_gpu and not (options.cpu_memory or options.auto_devices):
        yield from _kept_elsewhere(question, auto_devices=True)
    if not options.disk:
        yield from _kept_elsewhere(question, disk=True)
    if on_gpu:
        yield from _one(
            question, "Run on the CPU alone, in RAM: {weights} of weights; every token takes many times longer.",
            cpu=True, gpu_memory=(), auto_devices=False,
        )  # fmt: skip


def _kept_elsewhere(question: Question, **changes: Any) -> Iterator[Suggestion]:
    answer = solve(question.but(**changes))
    if answer.fits:
        away = offload_of(answer, question.calibration)
        yield Suggestion(f"Keep {away.kept}: each token then takes {away.longer} longer, or more.", changes)
