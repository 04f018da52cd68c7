"""A look at the data as the model will see it, by the tokenizer of the model that is loaded."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from modules.errors import BrokenData
from modules.options import TrainingOptions
from modules.training import data
from modules.training.data import Examples
from modules.training.messages import Preview, PreviewExample, PreviewOrder, PreviewToken
from modules.worker.training.dataset import Counts, cut, split, steps_for
from modules.worker.training.encoding import Encoded, encode_all, token_texts

_MOST_EXAMPLES = 2000  # that are counted; the rest are taken to be like them
_MOST_CHARACTERS = 2_000_000  # of a running text
_MOST_TOKENS = 2048  # of an example that are shown
_SIZES = (128, 256, 512, 1024)  # of the matrix that is multiplied
_LONG_S = 0.01  # a larger one would take eight times as long


def preview(order: PreviewOrder, model: Any, tokenizer: Any) -> Preview:
    """The first examples, and counts. Raises BrokenData, which names the lines."""
    found = data.read(order.data)
    some, whole_share = _some(found)
    encoded = list(encode_all(some, tokenizer, order.options.cutoff, lambda *_: None))
    kept, counts = cut(encoded, order.options.cutoff)
    total = round(counts.total * whole_share)
    notes = () if whole_share == 1 else (f"Counted on the first {counts.total:,} of about {total:,} examples.",)
    if not kept:
        raise BrokenData(
            f"None of {counts.total} examples teaches anything within the cut-off of {order.options.cutoff} tokens.",
            f"The longest has {counts.longest:,} tokens: raise the cut-off.",
        )
    return Preview(
        data_format=found.data_format,
        examples=tuple(_shown(one, order.options.cutoff, tokenizer) for one in encoded[: order.examples]),
        total=total, counted=counts.total, tokens=counts.tokens, learned_tokens=counts.learned_tokens,
        cut=counts.cut, left_out=counts.left_out, longest=counts.longest,
        steps=_steps(kept, counts, whole_share, order.options), matmul_flops=matmul_flops(model),
        notes=(*found.notes, *notes, *counts.notes()),
    )  # fmt: skip


def _some(found: Examples) -> tuple[Examples, float]:
    """What is counted, and how many times as much there is."""
    if found.plain:
        text = found.examples[0].text
        part = replace(found.examples[0], text=text[:_MOST_CHARACTERS])
        return replace(found, examples=(part,)), max(1.0, len(text) / _MOST_CHARACTERS)
    some = found.examples[:_MOST_EXAMPLES]
    return replace(found, examples=some), len(found.examples) / len(some)


def _shown(example: Encoded, cutoff: int, tokenizer: Any) -> PreviewExample:
    short = example.cut_to(min(cutoff, _MOST_TOKENS))
    texts = token_texts(tokenizer, short.ids)
    # The first token carries no loss: there is nothing that it could be predicted from.
    learned = [place > 0 and one for place, one in enumerate(short.learned)]
    tokens = tuple(PreviewToken(text, one) for text, one in zip(texts, learned, strict=True))
    return PreviewExample(example.number, tokens, len(example.ids) - len(short.ids))


def _steps(kept: list[Encoded], counts: Counts, share: float, options: TrainingOptions) -> int:
    train, _ = split(kept, options)
    rows = len(train) * share
    if options.packing:
        rows = sum(len(one.ids) for one in train) * share / options.cutoff + 1
    return steps_for(max(1, round(rows)), options)


def matmul_flops(model: Any) -> float:
    """Multiplications and additions per second of a product as large as can be made in a moment, where the model
    computes: a processor without bfloat16 takes seconds for one that a GPU makes in microseconds."""
    parameter = next(iter(model.parameters()))
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    if dtype == torch.float16 and parameter.device.type == "cpu":
        dtype = torch.bfloat16  # as it is trained
    rate = 0.0
    for size in _SIZES:
        matrix = torch.ones((size, size), dtype=dtype, device=parameter.device)
        seconds = min(_seconds(matrix) for _ in range(2))  # the first one may set something up
        rate = 2 * size**3 / seconds
        if seconds > _LONG_S:
            break
    return rate


def _seconds(matrix: torch.Tensor) -> float:
    _wait(matrix)
    begin = time.perf_counter()
    matrix @ matrix
    _wait(matrix)
    return time.perf_counter() - begin


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
