"""The three RoPE options as changed ``rope_parameters`` of a transformers configuration. No ML package is imported.

Formulas: NTK-aware scaling multiplies theta by alpha^(d/(d−2)), so that the lowest frequency falls by exactly
alpha and the highest stays (bloc97, 2023); position interpolation divides every frequency by one factor (Chen et
al. 2023, arXiv:2306.15595). d is the number of rotary dimensions of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from modules.errors import OptionConflict
from modules.options import LoadOptions, stretched_context

# Configurations that nest their RoPE by layer type: only these layers see the whole context.
FULL_ATTENTION = "full_attention"
_PLAIN_TYPES = ("default", "linear")  # scalings that linear compression composes with
_FREE_OF_LIMIT = ("default", "linear", "llama3")  # scalings that never look at max_position_embeddings


def asked(options: LoadOptions) -> bool:
    """Whether any of the three options is on."""
    return options.alpha_value > 1 or options.rope_freq_base > 0 or options.compress_pos_emb > 1


def stretched_config(config: Any, options: LoadOptions) -> Any:
    """A copy of ``config`` whose (text) RoPE follows the options; ``config`` itself where none is on.

    Raises OptionConflict for a model without RoPE, or one whose own scaling compression would destroy.
    """
    if not asked(options):
        return config
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise OptionConflict(
            f"{config.model_type} has no rotary position embedding (RoPE), so its context cannot be stretched.",
            "Turn alpha_value, rope_freq_base and compress_pos_emb off.",
            fix={"alpha_value": 1.0, "rope_freq_base": 0.0, "compress_pos_emb": 1.0},
        )
    text.rope_parameters = changed_parameters(parameters, options, partial(head_dim, text))
    if all(entry["rope_type"] in _FREE_OF_LIMIT for entry in layers(text.rope_parameters).values()):
        limit = getattr(text, "max_position_embeddings", 0) or 0
        text.max_position_embeddings = stretched_context(options, limit)
    return changed


def changed_parameters(
    parameters: Mapping[str, Any], options: LoadOptions, head_dim: Callable[[str], int]
) -> dict[str, Any]:
    """``rope_parameters`` after the options. Of nested ones only the full-attention layers change.

    ``head_dim``: dimensions of a head, by the layers' type; "" where all are alike.
    """
    if not is_nested(parameters):
        return _changed_entry(parameters, options, head_dim(""))
    stretched = (FULL_ATTENTION,) if parameters.get(FULL_ATTENTION) else tuple(parameters)
    return {
        name: _changed_entry(entry, options, head_dim(name)) if name in stretched and entry else entry
        for name, entry in parameters.items()
    }


def _changed_entry(entry: Mapping[str, Any], options: LoadOptions, head_dim: int) -> dict[str, Any]:
    changed = dict(entry)
    rope_type = changed.setdefault("rope_type", "default")
    if options.rope_freq_base > 0:
        changed["rope_theta"] = options.rope_freq_base
    if options.alpha_value > 1:
        d = rotary_dim(changed, head_dim)
        changed["rope_theta"] = changed["rope_theta"] * options.alpha_value ** (d / (d - 2))
    if options.compress_pos_emb > 1:
        if rope_type not in _PLAIN_TYPES:
            raise OptionConflict(
                f"compress_pos_emb would destroy the model's own RoPE scaling ({rope_type}).",
                "Turn compress_pos_emb off; alpha_value works with the model's scaling.",
                fix={"compress_pos_emb": 1.0},
            )
        changed["rope_type"] = "linear"
        changed["factor"] = changed.get("factor", 1.0) * options.compress_pos_emb
    return changed


def is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether the parameters are one set a layer type, rather than one for all layers."""
    return "rope_theta" not in parameters and any(isinstance(entry, Mapping) for entry in parameters.values())


def layers(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Layer type → its parameters; the type is ``""`` where one set serves all layers."""
    if not is_nested(parameters):
        return {"": parameters}
    return {name: entry for name, entry in parameters.items() if isinstance(entry, Mapping)}


def rotary_dim(entry: Mapping[str, Any], head_dim: int) -> int:
    """How many dimensions of a head rotate; "proportional" RoPE spreads its exponents over the whole head."""
    partial = 1.0 if entry.get("rope_type") == "proportional" else entry.get("partial_rotary_factor") or 1.0
    return int(head_dim * partial)


def head_dim(config: Any, layer_type: str = "") -> int:
    """Dimensions of one attention head, in layers of that type where they differ."""
    if config.is_heterogeneous:
        types = list(getattr(config, "layer_types", None) or ())
        config = config.per_layer_config[types.index(layer_type) if layer_type in types else 0]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_numbers(config: Any) -> int:
    """How many numbers the keys and values of one token are in all layers, none of which has a window."""
    count = getattr(config, "num_hidden_layers", 0) or 0
    layers = [config.per_layer_config[index] for index in range(count)] if config.is_heterogeneous else [config] * count
    heads = [getattr(one, "num_key_value_heads", None) or getattr(one, "num_attention_heads", 0) for one in layers]
    return sum(2 * head_dim(one) * int(count) for one, count in zip(layers, heads, strict=True) if count)


def inverse_frequencies(entry: Mapping[str, Any], head_dim: int) -> list[float] | None:
    """The d/2 inverse frequencies in radians a token, 1/(theta^(2i/d) · factor); None for other scalings."""
    if entry["rope_type"] not in _PLAIN_TYPES:
        return None
    d = rotary_dim(entry, head_dim)
    factor = entry.get("factor", 1.0) if entry["rope_type"] == "linear" else 1.0
    return [1.0 / (entry["rope_theta"] ** (i / d) * factor) for i in range(0, d, 2)]
