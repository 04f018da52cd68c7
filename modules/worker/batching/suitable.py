"""Which models can answer many at once: by what their configuration says, and then by trying."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from modules.protocol import LoadOrder
from modules.worker.batching.row import Sequence
from modules.worker.batching.slabs import Slabs
from modules.worker.batching.steps import Steps

log = logging.getLogger(__name__)

_ROPE_BY_LENGTH = ("dynamic", "longrope")  # the angles of all rows would follow the longest one
_MOST_NATS = 0.01  # between the two ways of computing; rounding alone makes far less


def obstacle(model: Any, order: LoadOrder) -> str:
    """Why this model answers one request after another; "" where it can answer many at once, as far as can be read."""
    config = model.config.get_text_config(decoder=True)
    if order.task != "causal" or model.config.is_encoder_decoder:
        return "it has an encoder"
    if not model._supports_attention_backend or model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}"
    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if own or model._is_stateful or model.generation_config.cache_implementation:
        return "it prepares its inputs or its cache in a way of its own"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "not all of its layers see the whole context"
    if any(kind in _ROPE_BY_LENGTH for kind in _rope_types(getattr(config, "rope_parameters", None))):
        return "its positions depend on the length of the text"
    return ""


def _rope_types(parameters: Any) -> list[str]:
    """Of all kinds of layers: the parameters are nested by kind in some models."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(one.get("rope_type", "default")) for one in (parameters, *nested)]


def agrees(model: Any, steps: Steps) -> bool:
    """Whether the model predicts the same with two texts in a slab as with each alone: what no configuration tells."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    texts = [[(7 * n + 3 * k) % vocabulary for n in range(length)] for k, length in enumerate((11, 5))]
    try:
        alone = [_after(steps, Sequence([*ids])) for ids in texts]
        slabs = Slabs(10**6, 10**6)
        for ids in texts:
            row = Sequence([*ids])
            _read(steps, row)
            slabs.add(row)
        _, together = steps.together(slabs.with_adapters(()))
    except Exception:
        log.exception("answers of this model cannot be computed together")
        return False
    moved = [_nats(one[0], other) for one, other in zip(alone, together, strict=True)]
    if not (same := all(nats < _MOST_NATS for nats in moved)):  # NaN is not
        log.warning("answers of this model are computed one after another: together they differ by %s nats", moved)
    return same


def _read(steps: Steps, row: Sequence) -> None:
    steps.read(row, len(row.ids))
    row.ids.append(row.ids[0])


def _after(steps: Steps, row: Sequence) -> torch.Tensor:
    _read(steps, row)
    return steps.alone(row)


def _nats(one: torch.Tensor, other: torch.Tensor) -> float:
    """KL divergence of what two rows of scores predict."""
    return float(
        torch.nn.functional.kl_div(other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="sum")
    )
