"""How a layer attends where every answer has one new token, and its earlier keys and values lie in slabs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modules.worker.batching.slabs import Slab

NAME = "loadstone_slabs"
_ALIGNED = 16  # masks whose rows begin at such multiples are read faster on GPUs
_steps: list[Together] = []  # the one under way; the attention functions of transformers are given no place for it


class Together(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """What the model takes for its cache during one step of the rows of ``slabs``, in their order.

    ``usual``: how it attends at other times, "sdpa" or "eager".
    """

    def __init__(self, slabs: list[Slab], usual: str) -> None:
        super().__init__()
        self._slabs = slabs
        self._usual = usual
        self._layer = 0
        self._masks: dict[tuple[Any, ...], list[torch.Tensor | None]] = {}
        self._lengths = [[row.read for row in slab.rows] for slab in slabs]  # before the step
        self._places: dict[tuple[Any, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Hands the new token's keys and values on to :meth:`attend`, which comes next."""
        self._layer = layer_idx
        return key_states, value_states

    def attend(self, module: Any, query: Any, key: Any, value: Any, **rest: Any) -> Any:
        """Rows × 1 × heads × head size, for rows × heads × 1 × head size; keeps ``key`` and ``value``."""
        parts, begin = [], 0
        forward = sdpa_attention_forward if self._usual == "sdpa" else eager_forward(module)
        sizes = tuple(slab.size(self._layer) for slab in self._slabs)  # the same for all layers of a kind
        masks, places = self._masks_for(query, sizes), self._places_for(key.device, sizes)
        for index, slab in enumerate(self._slabs):
            end = begin + len(slab.rows)
            keys, values, (rows, tokens) = slab.keys[self._layer], slab.values[self._layer], places[index]
            keys[rows, :, tokens] = key[begin:end, :, 0]
            values[rows, :, tokens] = value[begin:end, :, 0]
            _, reach = self._reach(index, sizes[index])
            part, _ = forward(
                module, query[begin:end], keys[: len(rows), :, :reach], values[: len(rows), :, :reach],
                masks[index], **rest,
            )  # fmt: skip
            parts.append(part)
            begin = end
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _reach(self, index: int, size: int) -> tuple[int, int]:
        """How far into places of ``size`` the shortest row goes, and how far any has to look for the longest."""
        shortest, longest = (min(length + 1, size) for length in (min(self._lengths[index]), max(self._lengths[index])))
        if shortest == longest:
            return longest, longest
        return shortest, min(-(-longest // _ALIGNED) * _ALIGNED, size)

    def _masks_for(self, query: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor | None]:
        """By slab: what keeps each row from looking beyond its own end, rows × 1 × 1 × reach."""
        key = (query.device, query.dtype, sizes)
        if key not in self._masks:
            self._masks[key] = [self._mask(index, size, query) for index, size in enumerate(sizes)]
        return self._masks[key]

    def _mask(self, index: int, size: int, query: torch.Tensor) -> torch.Tensor | None:
        lengths, (shortest, reach) = self._lengths[index], self._reach(index, size)
        if shortest == reach:
            return None
        last = torch.tensor(lengths, device=query.device)[:, None]
        beyond = torch.arange(reach, device=query.device)[None, :] > last
        return query.new_zeros(len(lengths), reach).masked_fill_(beyond, -torch.inf)[:, None, None, :]

    def _places_for(self, device: Any, sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By slab: (row, place) of each new key and value."""
        if (device, sizes) not in self._places:
            self._places[device, sizes] = [
                (torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device) % size)
                for lengths, size in zip(self._lengths, sizes, strict=True)
            ]
        return self._places[device, sizes]


def eager_forward(module: Any) -> Any:
    """The eager attention of a layer's own architecture: some have no other, for what they add to the scores. Raises
    AttributeError where it has none that others may call.
    """
    return sys.modules[type(module).__module__].eager_attention_forward


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **rest: Any
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer."""
    return _steps[-1].attend(module, query, key, value, **rest), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def over(model: Any, slabs: list[Slab]) -> Iterator[Together]:
    """Let the model attend to these slabs. transformers makes no mask for attention it does not know."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    # Behind the property, which would set it for the parts that see and hear too.
    usual = [config._attn_implementation_internal for config in configs]
    step = Together(slabs, usual[-1])
    _steps.append(step)
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield step
    finally:
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation_internal = name
        _steps.pop()
