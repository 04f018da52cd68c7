"""Buffers that a loaded model has and its files do not: rotary frequencies, masks, numbers beside embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modules.library import config as reading
from modules.library.tensors import TensorInfo
from modules.planner.architectures import NO_ROTARY_BUFFERS, POSITIONS_BY_CHOICE, SCALED_EMBEDDINGS
from modules.planner.formats import Part

Config = Mapping[str, Any]


def buffers(text: Config, decoder: str, layers: int) -> Iterator[tuple[str, Part]]:
    """(module, buffer) of each, in the language model whose layers lie under the module ``decoder``."""
    yield from _rotary(text, f"{decoder}.rotary_emb" if decoder else "rotary_emb")
    yield from _by_architecture(text, decoder, layers)


def tower_buffers(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Part]]:
    """(module, buffer) of the position numbers, int64, that image towers keep beside their position embedding."""
    for name, tensor in tensors.items():
        if name.endswith(".embeddings.position_embedding.weight"):
            yield name.removesuffix(".position_embedding.weight"), Part("buffer", 1, fixed_bytes=8 * tensor.shape[0])


def _rotary(text: Config, module: str) -> Iterator[tuple[str, Part]]:
    """The frequencies and a copy of the unscaled ones, float32, for each layer type that has its own."""
    model_type = str(text.get("model_type", ""))
    unused = text.get("position_embedding_type", "rope") != "rope" if model_type in POSITIONS_BY_CHOICE else False
    if unused or model_type in NO_ROTARY_BUFFERS or reading.rope(text) is None:
        return
    parameters = text.get("rope_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, Mapping)}
    if not nested and model_type in ("gemma3_text", "gemma3", "modernbert-decoder"):  # as older files do not say
        nested = {"full_attention": {}, "sliding_attention": {}}
    listed = text.get("layer_types")
    used = {str(kind) for kind in listed} if isinstance(listed, list) and listed else set(nested)
    for kind, own in nested.items() if nested else [("", parameters)]:
        if kind and kind not in used:
            continue
        index = listed.index(kind) if isinstance(listed, list) and kind in listed else 0
        numbers = -(-rotary_dimension(reading.layer(text, index), own, kind) // 2)
        yield module, Part("buffer", 2 * numbers, 1, fixed_bytes=2 * numbers * 4)


def rotary_dimension(text: Config, parameters: Config, kind: str = "") -> int:
    """How many numbers of a head turn. ``parameters``: the RoPE parameters of layers of the ``kind``."""
    head_dim = head_dimension(text, kind)
    if own := reading.number(text, "qk_rope_head_dim"):
        return own  # latent attention: a part of the head, as a number
    if parameters.get("rope_type") == "proportional":
        return head_dim  # the numbers that do not turn have the frequency 0
    shares = (parameters.get("partial_rotary_factor"), text.get("partial_rotary_factor"), text.get("rotary_pct"))
    share = next((value for value in shares if isinstance(value, int | float) and value > 0), 1.0)
    return int(head_dim * share)


def head_dimension(text: Config, kind: str) -> int:
    """Numbers of a head's key in layers of the ``kind``: Gemma 4 has larger heads where a layer sees everything.

    ``text``: the configuration of such a layer. Newer files name what differs; older ones of Gemma 4 leave it unsaid.
    """
    usual = reading.number(text, "kv_channels") or reading.attention(text)[2]
    if kind != "full_attention" or "per_layer_config" in text:
        return usual
    default = 512 if str(text.get("model_type", "")).startswith("gemma4") else usual
    return reading.number(text, "global_head_dim") or default


def _by_architecture(text: Config, decoder: str, layers: int) -> Iterator[tuple[str, Part]]:
    model_type = str(text.get("model_type", ""))
    context = reading.context_tokens(text)
    if model_type.startswith(SCALED_EMBEDDINGS):
        yield f"{decoder}.embed_tokens", Part("buffer", 1)
        if reading.number(text, "hidden_size_per_layer_input"):
            yield f"{decoder}.embed_tokens_per_layer", Part("buffer", 1)
    elif model_type in ("m2m_100", "nllb-moe", "xglm"):  # sines, two more than positions
        numbers = (context + 2) * reading.number(text, "d_model")
        for side in (decoder, decoder.replace("decoder", "encoder")) if "decoder" in decoder else (decoder,):
            yield f"{side}.embed_positions", Part("buffer", numbers)
    elif model_type == "minicpm3":
        yield f"{decoder}.embed_tokens", Part("buffer", 1, fixed_bytes=8)
    elif model_type == "gpt_bigcode":
        yield f"{decoder}.wte", Part("buffer", context**2, fixed_bytes=context**2)
    elif model_type == "gpt_neo":
        for index in range(layers):
            yield f"{decoder}.h.{index}", Part("buffer", context**2, fixed_bytes=context**2)
    elif model_type in ("gptj", "codegen"):
        numbers = context * (reading.number(text, "rotary_dim") or reading.attention(text)[2])
        for index in range(layers):
            yield f"{decoder}.h.{index}", Part("buffer", numbers, fixed_bytes=4 * numbers)
