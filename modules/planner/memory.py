"""What a loaded model needs beside its weights: KV cache, working memory, the process itself. All in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from modules.library import config as reading
from modules.options import LoadOptions, kept_tokens
from modules.planner.architectures import EAGER
from modules.planner.buffers import head_dimension
from modules.planner.formats import Precision
from modules.planner.layout import Layout
from modules.precision import DTYPE_BYTES
from modules.protocol import HEAP_LIMIT_BYTES, READ_AT_ONCE_EAGER

Config = Mapping[str, Any]
_WINDOWED = frozenset({"sliding_attention", "hybrid_sliding", "reference_sliding_attention"})
_NO_CACHE = frozenset({"conv", "linear_attention", "mamba", "mamba2", "mlp", "moe", "recurrent"})
# Every n-th layer sees the whole context, where older configurations do not list their layers.
_FULL_EVERY = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2}


@dataclass(frozen=True)
class Calibration:
    """What cannot be read from a model: measured once, replaced by what this machine's loads show.

    ``hidden_copies`` and ``inner_copies``: how many tensors of tokens × hidden and tokens × intermediate size are
    alive at the worst point of a prompt's forward pass. ``prompt_tokens``: the longest prompt that is computed in
    one pass. ``tensors_in_flight``: how many of the largest tensors exist twice while they are loaded.
    ``mapped_share``: how much of the files counts as the process's memory while its weights are converted; the
    kernel gives such pages up when memory is short, so they count for the peak, not for whether a model fits.

    Measured on a CPU with SmolLM2-135M: 403 MiB before a load; with bfloat16 weights (256 MiB), a cache of 45 MiB and
    a prompt of 1,900 tokens 769 MiB at most; converting to float32 (513 MiB) 1,224; in 8-bit (155) 1,367; in nf4 (111)
    1,259.
    """

    gpu_fixed_bytes: int = 600 * 2**20  # CUDA context, kernels, the allocator's rounding to segments
    ram_fixed_bytes: int = 430 * 2**20  # a process with torch, transformers and a tokenizer
    ram_beside_gpu_bytes: int = 1200 * 2**20  # the same with CUDA's libraries; not measured yet
    bitsandbytes_ram_bytes: int = 450 * 2**20  # more, where it quantizes and computes on a CPU
    mapped_share: float = 1.0
    hidden_copies: float = 6.0
    inner_copies: float = 3.0
    prompt_tokens: int = 8192
    tensors_in_flight: float = 1.0
    logits_copies: float = 3.0
    ram_to_gpu_bytes_per_s: float = 12e9  # over PCI Express, from memory that is not pinned
    disk_bytes_per_s: float = 2e9
    gpu_correction_bytes: int = 0  # what loads like this one have taken more on each GPU, by earlier loads
    ram_correction_bytes: int = 0

    def corrected(self, *, gpu_bytes: int, ram_bytes: int) -> Calibration:
        """With what earlier loads have shown, for one kind of load."""
        return replace(self, gpu_correction_bytes=gpu_bytes, ram_correction_bytes=ram_bytes)


DEFAULT = Calibration()


@dataclass(frozen=True)
class KvCache:
    """The cache by decoder layer: bytes for each token, and the most tokens that it keeps of one answer (0 = all).

    ``repeats``: 2 where cross-attention keeps a cache of the same size beside the layer's own.
    """

    token_bytes: tuple[int, ...]
    windows: tuple[int, ...]
    repeats: int = 1

    def layer_bytes(self, layer: int, options: LoadOptions, ctx_tokens: int) -> int:
        """Of one layer at a context of ``ctx_tokens``, with as many answers at once as the options plan for."""
        return self.token_bytes[layer] * kept_tokens(options, ctx_tokens, self.windows[layer]) * self.repeats


@lru_cache(maxsize=64)
def kv_cache(layout: Layout, task: str, precision: Precision) -> KvCache:
    """The cache that transformers' DynamicCache keeps for this model, at the dtype the model computes in."""
    text = layout.text
    element = DTYPE_BYTES[precision.dtype]
    types = _layer_types(text, layout.layers)
    layers = [(reading.layer(text, index), kind) for index, kind in enumerate(types)]
    token_bytes = tuple(
        0 if _caches_nothing(own, kind) else _numbers_per_token(own, kind) * element for own, kind in layers
    )
    windows = tuple(_window(own, kind) for own, kind in layers)
    return KvCache(token_bytes, windows, 2 if task == "seq2seq" else 1)


def _caches_nothing(text: Config, kind: str) -> bool:
    """``text``: the layer's own, which may leave its attention out."""
    left_out = text.get("skip")
    return kind in _NO_CACHE or (isinstance(left_out, list) and any("att" in str(name) for name in left_out))


def _numbers_per_token(text: Config, kind: str) -> int:
    """Keys and values of one token in one layer, in numbers."""
    kv_heads, head_dim = reading.attention(text)[1], head_dimension(text, kind)
    if (latent := reading.number(text, "kv_lora_rank")) and (rope := reading.number(text, "qk_rope_head_dim")):
        # Latent attention: what is cached is compressed, one for all heads; beside it the keys of an indexer.
        return latent + rope + reading.number(text, "index_head_dim")
    if kind == "full_attention" and text.get("attention_k_eq_v", True):
        kv_heads = reading.number(text, "num_global_key_value_heads") or kv_heads
    kv_heads = reading.number(text, "decoder_attention_heads") or kv_heads
    if not head_dim and kv_heads:
        head_dim = reading.number(text, "d_model") // kv_heads
    return 2 * kv_heads * head_dim


def _window(text: Config, kind: str) -> int:
    if kind in _WINDOWED:
        return reading.number(text, "sliding_window")
    return reading.number(text, "attention_chunk_size") if kind == "chunked_attention" else 0


def _layer_types(text: Config, layers: int) -> tuple[str, ...]:
    """The kind of attention of each layer, as configurations list it or as their numbers imply it."""
    listed = text.get("layer_types") or text.get("layers_block_type") or text.get("block_types")
    if isinstance(listed, list) and listed:
        types = [str(listed[index % len(listed)]) for index in range(layers)]
    else:
        types = [_implied(text, index) for index in range(layers)]
    shared = reading.number(text, "num_kv_shared_layers")
    if 0 < shared < layers:  # the last layers read the caches of earlier ones
        types[layers - shared :] = ["mlp"] * shared
    return tuple(types)


def _implied(text: Config, index: int) -> str:
    if not reading.number(text, "sliding_window") or text.get("use_sliding_window") is False:
        return "full_attention"
    if text.get("use_sliding_window") and index < reading.number(text, "max_window_layers"):
        return "full_attention"
    every = reading.number(text, "sliding_window_pattern", "_sliding_window_pattern")
    every = every or _FULL_EVERY.get(str(text.get("model_type")), 0)
    return "full_attention" if every and (index + 1) % every == 0 else "sliding_attention"


def cache_growth_bytes(cache: KvCache, options: LoadOptions, ctx_tokens: int) -> int:
    """What a cache in RAM takes more while it grows: a layer's keys are copied for every token.

    Small tensors leave holes in the heap, in every layer, of which about half are filled again (measured); larger
    ones, which the C library gives back when they are freed, exist twice in one layer at a time.
    """
    layers = [cache.layer_bytes(layer, options, ctx_tokens) for layer in range(len(cache.token_bytes))]
    small = [size for size in layers if size // 2 < HEAP_LIMIT_BYTES]  # keys and values are two tensors
    return sum(small) // 2 + max((size // 2 for size in layers if size // 2 >= HEAP_LIMIT_BYTES), default=0)


def working_bytes(
    layout: Layout, precision: Precision, calibration: Calibration, ctx_tokens: int, options: LoadOptions
) -> int:
    """What a device that computes needs while a prompt passes through it, while many answers get their next token, or
    while its weights arrive."""
    text = layout.text
    element = DTYPE_BYTES[precision.dtype]
    hidden = reading.number(text, "hidden_size", "n_embd", "d_model")
    inner = reading.number(text, "moe_intermediate_size", "intermediate_size", "n_inner", "d_ff", "ffn_dim")
    inner *= reading.number(text, "num_experts_per_tok") if "moe_intermediate_size" in text else 1
    # With flash_attention_2 an answer is computed by itself, and reads its prompt in one piece.
    at_once = ctx_tokens if options.attn_implementation == "flash_attention_2" else calibration.prompt_tokens
    tokens = min(ctx_tokens, at_once)
    numbers = tokens * (calibration.hidden_copies * hidden + calibration.inner_copies * (inner or 4 * hidden))
    logits = calibration.logits_copies * reading.number(text, "vocab_size") * 4
    numbers += _scores(text, options, tokens, ctx_tokens)
    unpacked = 2 * layout.largest_linear if precision.quantization else 0  # one layer at a time, in 16 bit
    prompt, step = numbers * element + logits, options.max_batch * logits
    return int(max(max(prompt, step) + unpacked, arriving_bytes(layout, precision, calibration)))


def _scores(text: Config, options: LoadOptions, tokens: int, ctx_tokens: int) -> int:
    """Numbers in the matrix of attention scores and its softmax, where attention keeps them (eager)."""
    model_type = str(text.get("model_type", ""))
    always = options.attn_implementation == "auto" and model_type in EAGER
    if not always and options.attn_implementation != "eager":
        return 0
    heads = reading.number(text, "num_attention_heads", "n_head", "num_heads")
    if EAGER.get(model_type):  # a part of the prompt at a time, which sees all before it
        return 3 * heads * min(tokens, READ_AT_ONCE_EAGER) * ctx_tokens
    return 3 * heads * tokens * tokens


def arriving_bytes(layout: Layout, precision: Precision, calibration: Calibration) -> int:
    """The most that exists twice while weights are loaded: the tensor under way, as stored and as kept."""
    return int(calibration.tensors_in_flight * layout.largest_tensor * DTYPE_BYTES[precision.dtype])
