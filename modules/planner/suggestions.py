"""Ways to make a model fit, each with its price, in the order in which a knowledgeable friend would name them.

What has to be unloaded is no way of its own: a load ends what is in its way, and the plan says what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modules.options import LOAD_OPTIONS, stretched_context
from modules.planner.devices import GIB
from modules.planner.offload import offload_of
from modules.planner.solving import Answer, Question, solve
from modules.units import format_bytes

MOST = 4
_CONTEXT_STEP = 256
_USEFUL_CONTEXT = 2048  # tokens; a shorter one is a worse loss than 8-bit weights
_LEAST_CONTEXT = 512
_PLAIN: Mapping[str, bool] = {"load_in_4bit": False, "load_in_8bit": False}
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
    """``options``: the values to change."""

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Way:
    """A suggestion that would fit. ``answer``: how it would lie. ``seconds``: about how much longer each token takes
    for weights that lie on no GPU, though there are some, or on disk."""

    suggestion: Suggestion
    answer: Answer
    seconds: float

    @property
    def lies(self) -> object:
        return self.answer.placement.devices, self.answer.precision, self.answer.loads


def suggestions(question: Question) -> tuple[Suggestion, ...]:
    """Up to four ways that would fit: first those with nothing beside what computes, then by what that costs."""
    ways: dict[object, _Way] = {}
    for way in [*_in_order(_quick(question))] or _in_order(question):
        ways.setdefault(way.lies, way)  # of two that come to the same, the first
    return tuple(way.suggestion for way in sorted(ways.values(), key=lambda way: way.seconds)[:MOST])


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


def _quick(question: Question) -> Question:
    """The same, answered in order alone: a split out of order takes long to find, and is seldom there."""
    return replace(question, search=False)


def _loaded_in(way: str, where: str = "", more: str = "") -> str:
    """What a suggestion says of one of :data:`_WAYS`; ``{weights}`` stands for their bytes."""
    return f"Load in {way}: {{weights}} of weights{where}. {_WAYS[way][0]}{more}."


def _in_order(question: Question) -> Iterator[_Way]:
    yield from _as_usual(question)
    yield from _wider(question)
    if _can(question, bf16=True) and solve(question).precision.dtype == "float32":
        cost = "no loss to speak of" if question.machine.cpu_bf16 else "but many times slower on this processor"
        yield from _one(question, f"Hold the weights as bfloat16: half the memory of float32, {cost}.", bf16=True)
    shorter = _shorter_context(question)
    if shorter >= _USEFUL_CONTEXT:
        yield from _context(question, shorter)
    yield from _quantized(question)
    if 0 < shorter < _USEFUL_CONTEXT:
        yield from _context(question, shorter)
    yield from _elsewhere(question)


def _one(question: Question, text: str, **changes: Any) -> Iterator[_Way]:
    """The way, where it would fit. ``{weights}`` in the text is what the weights then take."""
    answer = solve(question.but(**changes))
    if not answer.fits:
        return
    away = offload_of(answer, question.calibration)
    if away.seconds and "{kept}" not in text:
        text += " That keeps {kept}: each token takes {longer} longer, or more."
    text = text.format(weights=format_bytes(_weights(answer)), kept=away.kept, longer=away.longer)
    leaves_gpus = question.gpus and not answer.rooms.gpus  # all weights come through the processor for each token
    moved_s = _weights(answer) / question.calibration.ram_to_gpu_bytes_per_s if leaves_gpus else 0.0
    yield _Way(Suggestion(text, changes), answer, away.seconds + moved_s)


def _can(question: Question, **changes: Any) -> bool:
    """Whether the options are not so yet, and the checkpoint lets them be changed."""
    plain = not question.checkpoint.quantization
    return plain and any(getattr(question.options, name) != value for name, value in changes.items())


def _weights(answer: Answer) -> int:
    return sum(device.weights_bytes for device in answer.devices)


def _as_usual(question: Question) -> Iterator[_Way]:
    """Give up what was set and takes memory by itself."""
    options, tokens = question.options, question.ctx_tokens
    if options.batch_tokens > tokens:
        text = f"Let answers share {tokens:,} tokens, as usual, and not {options.batch_tokens:,}: more of them wait."
        yield from _one(question, text, batch_tokens=0)
    if options.attn_implementation == "eager":
        text = "Compute attention as usual and not by eager, which keeps all scores of a prompt: nothing is lost."
        yield from _one(question, text, attn_implementation=LOAD_OPTIONS["attn_implementation"].default)


def _wider(question: Question) -> Iterator[_Way]:
    """Lift limits that the user set, where more is free; a GPU that is left out stays so, if it can."""
    given, gpus = question.options.gpu_memory, question.machine.gpus
    if given:
        asked = [*given, *(0.0 for _ in gpus)][: len(gpus)]
        whole = tuple(float(-(-gpu.total_bytes // GIB)) if gib else 0.0 for gib, gpu in zip(asked, gpus, strict=True))
        left_out = [index for index, gib in enumerate(asked) if not gib]
        text = "Let the model take all that is free of the GPUs{more}, not only what is set."
        more = " that it may use" if left_out else ""
        yield from _one(question, text.format(more=more), gpu_memory=whole if left_out else ())
        if left_out:
            names = " and ".join(f"GPU {index}" for index in left_out)
            yield from _one(question, f"Let the model take all that is free of {names} too.", gpu_memory=())
    if question.options.cpu_memory:
        yield from _one(question, "Let the model take all that is free of RAM, not only what is set.", cpu_memory=0.0)


def _quantized(question: Question) -> Iterator[_Way]:
    """8-bit, and the first of the 4-bit ways that does."""
    options = question.options
    if question.checkpoint.quantization:
        return
    if _can(question, load_in_8bit=True) and not options.load_in_4bit:
        yield from _one(question, _loaded_in(_EIGHT_BIT, more="; each takes longer"), **_WAYS[_EIGHT_BIT][1])
    ways = [_FOUR_BIT] if not options.load_in_4bit else []
    ways += [_DOUBLE] if not (options.load_in_4bit and options.use_double_quant) else []
    for way in ways:
        if found := list(_one(question, _loaded_in(way), **_WAYS[way][1])):
            yield from found
            return
    small = question.but(**_FOUR_DOUBLE)
    if tokens := _shorter_context(small):
        text = f"Load in 4-bit with double quantization, and a context of {tokens:,} tokens: both are losses."
        yield from _one(question, text, **_FOUR_DOUBLE, ctx_size=tokens)


def _context(question: Question, tokens: int) -> Iterator[_Way]:
    words = tokens * 3 // 4 // 100 * 100
    text = f"Shorten the context to {tokens:,} tokens, about {words:,} words: the model sees no more of a conversation."
    yield from _one(question, text, ctx_size=tokens)


def _shorter_context(question: Question) -> int:
    """The longest shorter context that fits, in tokens, on the GPUs alone if one does; 0 = none that is of use."""
    most = question.ctx_tokens - 1
    alone = longest_context(question, most, _USEFUL_CONTEXT, on_gpus=True)
    return alone or longest_context(question, most, _LEAST_CONTEXT)


def longest_context(question: Question, most: int, least: int, *, on_gpus: bool = False) -> int:
    """The longest context in steps between two bounds with which the model fits in order; 0 = not even the least.

    ``on_gpus``: with nothing of it in RAM or on disk beside a GPU.
    """

    quick = _quick(question)

    def fits(steps: int) -> bool:
        answer = solve(quick.but(ctx_size=steps * _CONTEXT_STEP))
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
    most = stretched_context(question.options, question.checkpoint.context_limit) or _LONGEST_CONTEXT
    longest = longest_context(question, most, question.ctx_tokens, on_gpus=not answer.offloads)
    return max(0, longest - question.ctx_tokens)


def _elsewhere(question: Question) -> Iterator[_Way]:
    """Layers in RAM, on disk, or everything on the CPU."""
    options = question.options
    on_gpu = bool(question.machine.gpus) and not options.cpu
    kept = "Keep {kept}: each token then takes {longer} longer, or more."
    if on_gpu and not (options.cpu_memory or options.auto_devices):
        yield from _one(question, kept, auto_devices=True)
    if not options.disk:
        yield from _one(question, kept, disk=True)
        if question.quantizes and not on_gpu:  # what is quantized on a CPU stays in RAM
            text = kept.replace("{kept}", "{kept}, in 16 bit")
            yield from _one(question, text, **_PLAIN, bf16=True, disk=True)
    if on_gpu:
        yield from _on_the_cpu(question)


def _on_the_cpu(question: Question) -> Iterator[_Way]:
    alone: Mapping[str, Any] = {"cpu": True, "gpu_memory": (), "auto_devices": False}
    text = "Run on the CPU alone, in RAM{how}: {{weights}} of weights; every token takes many times longer."
    found = list(_one(question, text.format(how=""), **alone))
    if not found and not question.checkpoint.quantization:
        found = list(_one(question, text.format(how=", in 4-bit"), **alone, **_FOUR))
    yield from found
