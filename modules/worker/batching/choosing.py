"""How one answer chooses its tokens from its scores."""

from __future__ import annotations

import copy
import math
import secrets
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modules.errors import InternalError
from modules.options import GenerationOptions
from modules.worker.generation import Answer

_NARROWING = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_LIKELIEST = 256  # looked at first: sorting a vocabulary of 49,152 takes 6 ms, finding so many 0.1


def defaults(model: Any) -> GenerationConfig:
    """How ``model.generate`` chooses where it is told nothing. Making it takes longer than the rest of a chooser.

    Raises ValueError for a model whose config.json has been changed to say how to generate.
    """
    config: GenerationConfig = model._prepare_generation_config(None)[0]
    return config


class Chooser:
    """Chooses tokens as ``model.generate`` would for this answer alone, with chances of its own.

    What changes the scores is transformers' own, in its order: also what the model's generation_config.json asks for.
    The choice among what is left is made here, since theirs sorts the vocabulary and draws a number for each token
    of it: a tenth of the time of a small model's step, and as much again for each answer beside it.
    """

    def __init__(self, model: Any, defaults: GenerationConfig, answer: Answer, device: Any) -> None:
        kwargs = answer.choosing()
        own = LogitsProcessorList(kwargs.pop("logits_processor", ()))
        # As generate() of transformers 5.23 does it, by its own functions; there are no public ones.
        config = copy.copy(defaults)
        config.update(**kwargs)
        model._prepare_special_tokens(config, True, device=device)
        made = model._get_logits_processor(
            config, input_ids_seq_length=len(answer.prompt_ids), logits_processor=own, device=device
        )
        self._narrows = all(isinstance(one, _NARROWING) for one in made[_first_narrowing(made) :])
        self._processors = LogitsProcessorList(made[: _first_narrowing(made)] if self._narrows else made)
        self._options = answer.options
        self._ids = torch.tensor([answer.prompt_ids], dtype=torch.long, device=device)
        self._samples = bool(config.do_sample)
        self._seed = answer.options.seed if answer.options.seed >= 0 else secrets.randbits(64)
        self._drawn = 0

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, whatever went before."""
        return not self._samples and not self._processors

    def __call__(self, scores: torch.Tensor) -> int:
        """``scores``: float32, 1 × vocabulary; may be changed."""
        if self._processors:
            scores = self._processors(self._ids, scores)
        if self._samples:
            key = key_of(self._seed, self._drawn)
            token = drawn(scores[0], self._options if self._narrows else None, key)
            self._drawn += 1
        else:
            token = int(scores.argmax(dim=-1))
        if self._processors:
            self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=-1)
        return token


def likeliest(scores: torch.Tensor, wanted: bool) -> list[int]:
    """The likeliest token of each row, taken from the device at once; -1 for a row whose scores are no numbers.

    ``scores``: rows × vocabulary. Not ``wanted``: any token for the others, since amax, which finds NaN too, takes
    a twentieth of argmax's time on a CPU.
    """
    best = scores.amax(dim=-1)
    tokens = scores.argmax(dim=-1) if wanted else torch.zeros_like(best, dtype=torch.long)
    found: list[int] = tokens.where(best.isfinite(), -1).tolist()
    return found


def no_numbers(name: str) -> InternalError:
    """What an answer ends with whose scores are NaN or infinite: any choice from them would be junk."""
    return InternalError(
        f"{name} computes no numbers for the next token: they have grown too large for its precision.",
        "Load it with --bf16 where it runs in float16, and check the LoRAs and their weights.",
    )


def _first_narrowing(processors: list[Any]) -> int:
    """Where the processors begin that only narrow the choice: they come last."""
    for index, processor in enumerate(processors):
        if isinstance(processor, _NARROWING):
            return index
    return len(processors)


def drawn(scores: torch.Tensor, options: GenerationOptions | None, key: int) -> int:
    """A token by chance, each as likely as the softmax of ``scores`` says; the same ``key`` draws the same one.

    ``scores``: of the vocabulary, float32. By temperature, then top-k, top-p and min-p as transformers means them;
    ``options`` None: by the scores as they are.

    Gumbel-max, with the noise of each token made from its id: where rounding moves the scores of two runs by 10⁻⁶,
    the choice is the same but for one time in a million. One random number and sums would differ once in a hundred
    draws from a flat distribution.
    """
    ids: torch.Tensor | None = None
    if options is not None:
        scores = scores / options.temperature
        if 0 < options.top_k < len(scores):
            scores, ids = scores.topk(options.top_k)
        if options.top_p < 1:
            scores, ids = _top_p(scores, ids, options.top_p)
        if options.min_p:
            scores = scores.where(scores >= scores.max() + math.log(options.min_p), -torch.inf)
    if ids is None:
        ids = torch.arange(len(scores), device=scores.device)
    return int(ids[(scores.double() - (-_uniform(key, ids).log()).log()).argmax()])


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's


def key_of(seed: int, step: int) -> int:
    """A number for each seed and step, unlike all others (SplitMix64)."""
    mixed = (seed + (step + 1) * _GOLDEN) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * _FIRST % 2**64
    mixed = (mixed ^ (mixed >> 27)) * _SECOND % 2**64
    return mixed ^ (mixed >> 31)


def _uniform(key: int, ids: torch.Tensor) -> torch.Tensor:
    """A number between 0 and 1 for each id, without either: SplitMix64 in torch's int64, which wraps around."""
    mixed = ids * _signed(_GOLDEN) + _signed(key)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_SECOND)
    mixed = mixed ^ _shifted(mixed, 31)
    return (_shifted(mixed, 12).double() + 0.5) * 2.0**-52


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in at the left."""
    return (numbers >> bits).bitwise_and(2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _top_p(scores: torch.Tensor, ids: torch.Tensor | None, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens that together have the probability ``top_p``, at least one: scores and ids, best first."""
    whole = scores.logsumexp(0)
    count = _LIKELIEST if ids is None else len(scores)
    while True:
        best, places = scores.topk(min(count, len(scores)))
        sums = (best - whole).exp().cumsum(0)
        if count >= len(scores) or sums[-1] >= top_p:
            break
        count *= 16
    kept = 1 + int((sums[:-1] < top_p).sum())
    return best[:kept], places[:kept] if ids is None else ids[places[:kept]]
