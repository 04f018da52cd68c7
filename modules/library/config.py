"""What a config.json says of a model. Pure functions on its object; whatever it holds, none of them raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.checkpoint import UNNAMED_QUANTIZATION

Config = Mapping[str, Any]

DEFAULT_THETA = 10_000.0
_MAX_THETA = 1e18  # far above any model's; more is a damaged file
_CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length",
    "n_ctx",
)  # fmt: skip
_TEXT_KEYS = ("text_config", "llm_config", "language_config")
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
# Old configurations of these rotate too, and do not say so.
_ROPE_UNSAID = frozenset({"falcon", "gemma", "gpt_neox", "llama", "mistral", "mixtral", "phi", "qwen2", "stablelm"})


def text_part(config: Config) -> Config:
    """The language model's part of a configuration that nests it, over the rest; or all of it."""
    inner = next((value for key in _TEXT_KEYS if isinstance(value := config.get(key), Mapping)), {})
    return {**config, **inner}


def architecture(config: Config) -> str:
    """``LlamaForCausalLM``; ``""`` where it is not said."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def number(text: Config, *keys: str) -> int:
    """The first of the keys that holds a whole number above 0; 0 where none does."""
    values = (text.get(key) for key in keys)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def context_tokens(text: Config) -> int:
    """The longest context in tokens, as transformers takes it; 0 where it is not said."""
    return number(text, *_CONTEXT_KEYS)


def attention(text: Config) -> tuple[int, int, int]:
    """(layers, key-value heads, head dimension), each 0 where it is not said."""
    layers = number(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = number(text, "num_attention_heads", "n_head", "num_heads")
    hidden = number(text, "hidden_size", "n_embd", "d_model")
    kv_heads = 1 if text.get("multi_query") is True else number(text, "num_key_value_heads") or heads
    return layers, kv_heads, number(text, "head_dim", "d_kv") or (hidden // heads if heads else 0)


def layer(text: Config, index: int) -> Config:
    """The configuration of one layer: ``text``, with what ``per_layer_config`` says of the layer alone.

    transformers writes the numbers of layers there with as many digits as the largest has: "05".
    """
    layers = _object(text, "per_layer_config")
    own = next((found for digits in range(1, 5) if (found := _object(layers, f"{index:0{digits}}"))), {})
    return {**text, **own} if own else text


def dtype(text: Config) -> str:
    """``bfloat16``; ``""`` where it is not said."""
    value = text.get("dtype") or text.get("torch_dtype") or ""
    return value.removeprefix("torch.") if isinstance(value, str) else ""


def rope(text: Config) -> tuple[float, str] | None:
    """(theta, the model's own scaling or ""), or None for a model without RoPE.

    Reads ``rope_parameters`` (transformers 5, nested by layer type or not), ``rope_theta`` and ``rope_scaling``.
    """
    said = any(key in text for key in _ROPE_KEYS) or str(text.get("model_type")) in _ROPE_UNSAID
    if not said or text.get("alibi") is True:  # Falcon has either
        return None
    parameters = _object(text, "rope_parameters")
    if nested := [value for value in parameters.values() if isinstance(value, Mapping)]:
        parameters = _object(parameters, "full_attention") or nested[0]
    scaling = _object(text, "rope_scaling")
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type")
    stated = (parameters.get("rope_theta"), text.get("rope_theta"), text.get("rotary_emb_base"))
    theta = next((float(v) for v in stated if isinstance(v, int | float) and 0 < v < _MAX_THETA), DEFAULT_THETA)
    return theta, kind if isinstance(kind, str) and kind != "default" else ""


def quantization(config: Config, legacy: Config) -> tuple[str, str, int]:
    """(method, a few words on it, bits of a weight or 0); ("", "", 0) for plain weights.

    ``legacy`` is what older GPTQ and AWQ folders keep in a file of its own; empty where there is none.
    """
    stored = _object(config, "quantization_config") or _object(config, "compression_config")
    mlx = _mlx(stored) or _mlx(_object(config, "quantization"))
    stored = stored or mlx or legacy
    if not stored:
        return "", "", 0
    method = "mlx" if mlx else _method(stored)
    if method == "bitsandbytes":
        bits = 4 if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else 8
        return method, f"4-bit {stored.get('bnb_4bit_quant_type', 'fp4')}" if bits == 4 else "8-bit", bits
    bits = number(stored, "bits", "w_bit", "nbits")
    name = method.upper() if len(method) <= 5 else method
    return method, f"{bits}-bit {name}" if bits else name, bits


def _mlx(stored: Config) -> Config:
    """What mlx-lm writes, as ``quantization`` and later as ``quantization_config`` too; empty where it is not that."""
    others = ("quant_method", "desc_act", "w_bit", "load_in_4bit")
    return stored if {"group_size", "bits"} <= stored.keys() and not any(key in stored for key in others) else {}


def _method(stored: Config) -> str:
    method = str(stored.get("quant_method") or "").lower()
    if method.startswith("bitsandbytes") or (not method and "load_in_4bit" in stored):
        return "bitsandbytes"
    if not method:
        return "awq" if "w_bit" in stored else "gptq" if "desc_act" in stored else UNNAMED_QUANTIZATION
    return method


def _object(config: Config, key: str) -> Config:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
