"""Which models can answer many at once: by what their configuration says, and then by trying."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from modules.protocol import LoadOrder
from modules.worker.batching.extents import Extents
from modules.worker.batching.row import Sequence
from modules.worker.batching.slabs import Slabs
from modules.worker.batching.steps import Steps

log = logging.getLogger(__name__)

_ROPE_BY_LENGTH = ("dynamic", "longrope")  # the angles of all rows would follow the longest one
_SAME_PREDICTION = {"use_cache", "logits_to_keep"}  # inputs that change what is kept or returned, and no score
_MOST_NATS = 0.01  # between the two ways of computing; rounding alone makes far less


def obstacle(model: Any, order: LoadOrder) -> str:
    """Why this model answers one request after another; "" where it can answer many at once, as far as can be read."""
    config = model.config.get_text_config(decoder=True)
    if order.task != "causal" or model.config.is_encoder_decoder:
        return "it has an encoder"
    if not model._supports_attention_backend or config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}"
    if model._is_stateful or model.generation_config.cache_implementation or _prepares_more(model):
        return "it prepares its inputs or its cache in a way of its own"
    if not all(_keeps(layer) for layer in DynamicCache(config=model.config).layers):
        return "not all of its layers keep keys and values"
    if _chunks(config):
        return "its layers see the text in chunks"
    if any(kind in _ROPE_BY_LENGTH for kind in _rope_types(getattr(config, "rope_parameters", None))):
        return "its positions depend on the length of the text"
    return ""


def _keeps(layer: Any) -> bool:
    """Whether the layer keeps keys and values of all tokens, or of the last ones."""
    return type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1)


def _chunks(config: Any) -> bool:
    """Whether some layers keep what a window would, and see less of it: such a cache looks like a window's."""
    types = getattr(config, "layer_types", None)
    return "chunked_attention" in types if types else bool(getattr(config, "attention_chunk_size", None))


def _prepares_more(model: Any) -> bool:
    """Whether generate() would give this model other inputs than a step does: models that also see or hear say how
    they prepare what they were shown, which is nothing for a text."""
    own, usual = type(model), GenerationMixin
    if own._prepare_position_ids_for_generation is not usual._prepare_position_ids_for_generation:
        return True
    if own.prepare_inputs_for_generation is usual.prepare_inputs_for_generation:
        return False
    return not all(_prepares_as_given(model, first=first) for first in (True, False))


def _prepares_as_given(model: Any, *, first: bool) -> bool:
    """Whether generate() would give the model just what a step gives it, with a prompt or with a further token."""
    ids = torch.zeros(1, 3, dtype=torch.long)  # in RAM: nothing is computed
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None]}
    cache = DynamicCache(config=model.config)
    try:
        made = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, use_cache=True, is_first_iteration=first, **given
        )
        kept = {"input_ids": ids, **given}
        rest = {name for name, value in made.items() if value is not None} - kept.keys() - _SAME_PREDICTION
        same = all(torch.equal(value, made[name]) for name, value in kept.items() if made.get(name) is not None)
    except Exception:
        log.exception("how this model prepares its inputs cannot be told")
        return False
    return rest == {"past_key_values"} and made["past_key_values"] is cache and same


def _rope_types(parameters: Any) -> list[str]:
    """Of all kinds of layers: the parameters are nested by kind in some models."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(one.get("rope_type", "default")) for one in (parameters, *nested)]


def agreed(model: Any, steps: Steps, extents: Extents) -> Extents | None:
    """Whether the model predicts the same with two texts in a slab as with each alone: what no configuration tells.
    Where it does, the extents with what a token takes; else None."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    texts = [[(7 * n + 3 * k) % vocabulary for n in range(length)] for k, length in enumerate((11, 5))]
    try:
        alone = [_after(steps, Sequence([*ids])) for ids in texts]
        slabs = Slabs(extents, max(map(len, texts)) + 1)
        for ids in texts:
            row = Sequence([*ids])
            _read(steps, row)
            slabs.add(row)
        _, together = steps.together(slabs.with_adapters(()))
    except Exception:
        log.exception("answers of this model cannot be computed together")
        return None
    moved = [_nats(one[0], other) for one, other in zip(alone, together, strict=True)]
    if not all(nats < _MOST_NATS for nats in moved):  # NaN is not
        log.warning("answers of this model are computed one after another: together they differ by %s nats", moved)
        return None
    return extents.counting(slabs.numbers())


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
