"""What a model is, read from its configuration and its headers: no weights, no ML package."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.checkpoint import check_files, read_json, safetensors_header, weight_files
from modules.errors import LoadstoneError, UnsupportedModel
from modules.library.gguf_header import GgufHeader, read_header
from modules.library.scan import Model
from modules.options import Circumstances
from modules.protocol import Task
from modules.units import format_bytes, format_count, format_tokens

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "partial_rotary_factor")
# ggml's numbers for the types that fill most files: enum ggml_type in ggml.h.
_GGML_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
               12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"}  # fmt: skip


@dataclass(frozen=True)
class CodeFile:
    name: str
    sha256: str


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as the header names it: "BF16", "I32", "Q4_1"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """One model, described. Numbers that the files do not tell are 0 or None."""

    model: Model
    architecture: str
    model_type: str
    task: Task
    parameters: int | None
    dtype: str  # of most weights: "bfloat16"; "" = not known
    quantization: str  # "" | "gptq" | "awq" | "bitsandbytes" | "gguf" | …
    quantization_detail: str  # "4-bit nf4", "Q4_1"
    size_bytes: int
    context_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    has_rope: bool
    rope_theta: float
    rope_scaling: str
    code_files: tuple[CodeFile, ...]
    has_fast_tokenizer: bool
    has_slow_tokenizer: bool
    has_chat_template: bool
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # config.json; empty for GGUF
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)  # empty for .bin

    def circumstances(self, gpu_names: tuple[str, ...], values: Mapping[str, object]) -> Circumstances:
        """What the options need to know to say whether they apply."""
        return Circumstances(
            model_chosen=True, quantization=self.quantization, has_rope=self.has_rope,
            rope_scaling=self.rope_scaling, has_custom_code=bool(self.code_files),
            has_slow_tokenizer=self.has_slow_tokenizer, has_fast_tokenizer=self.has_fast_tokenizer,
            gpu_names=gpu_names, context_tokens=self.context_tokens, values=dict(values),
        )  # fmt: skip

    def summary(self) -> str:
        """``135 M · bf16 · 269 MB · 8k context``."""
        parts = [
            self.architecture,
            format_count(self.parameters) if self.parameters else "",
            self.quantization_detail or _SHORT.get(self.dtype, self.dtype),
            format_bytes(self.size_bytes),
            f"{format_tokens(self.context_tokens)} context" if self.context_tokens else "",
            "brings Python code" if self.code_files else "",
        ]
        return " · ".join(part for part in parts if part)


def read_facts(model: Model) -> ModelFacts:
    """Describe the model. Raises what :func:`modules.checkpoint.check_files` raises, and UnsupportedModel."""
    if model.file_format == "gguf":
        return _gguf_facts(model)
    check_files(model.path, model.file_format)
    config = read_json(model.path / "config.json")
    tensors = _tensors(model)
    quantization, detail = _quantization(config)
    text = _text_config(config)
    heads = _number(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    rope = _rope(text)
    names = {file.name for file in model.path.iterdir()}
    files = weight_files(model.path, model.file_format)
    return ModelFacts(
        model=model,
        architecture=_architecture(config),
        model_type=str(config.get("model_type", "")),
        task="seq2seq" if config.get("is_encoder_decoder") else "causal",
        parameters=_parameters(tensors, quantization),
        dtype=_main_dtype(tensors) or str(config.get("dtype") or config.get("torch_dtype") or ""),
        quantization=quantization,
        quantization_detail=detail,
        size_bytes=sum(file.stat().st_size for file in files),
        context_tokens=_number(text, *_CONTEXT_KEYS),
        layers=_number(text, "num_hidden_layers", "n_layer", "num_layers"),
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim", "d_kv") or (hidden // heads if heads else 0),
        has_rope=rope is not None,
        rope_theta=rope[0] if rope else 0.0,
        rope_scaling=rope[1] if rope else "",
        code_files=_code_files(model.path, config),
        has_fast_tokenizer="tokenizer.json" in names or not _slow_names(names),
        has_slow_tokenizer=_slow_names(names),
        has_chat_template=_has_chat_template(model.path, names),
        config=config,
        tensors=tensors,
    )


def _tensors(model: Model) -> dict[str, TensorInfo]:
    if model.file_format != "safetensors":
        return {}
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
        for file in weight_files(model.path, "safetensors")
        for name, entry in safetensors_header(file).items()
        if name != "__metadata__"
    }


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config") or config.get("llm_config") or {}
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    return str(names[0]) if isinstance(names, list) and names else ""


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that holds a whole number; 0 where none does."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _quantization(config: Mapping[str, Any]) -> tuple[str, str]:
    """The method that the checkpoint names, and a few words on it; two empty texts for plain weights."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return "", ""
    method = str(stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "unknown")).lower()
    method = "bitsandbytes" if method.startswith("bitsandbytes") else method
    if method == "bitsandbytes":
        detail = f"4-bit {stored.get('bnb_4bit_quant_type', '')}" if stored.get("load_in_4bit") else "8-bit"
        return method, detail.strip()
    bits = stored.get("bits") or stored.get("w_bit")
    return method, f"{f'{bits}-bit ' if bits else ''}{method.upper()}"


def _rope(text: Mapping[str, Any]) -> tuple[float, str] | None:
    """(theta, the model's own scaling or ""), or None for a model without RoPE."""
    if not any(key in text for key in _ROPE_KEYS):
        return None
    parameters = text.get("rope_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    if nested:
        parameters = parameters.get("full_attention") or nested[0]
    scaling = text.get("rope_scaling")
    scaling = scaling if isinstance(scaling, Mapping) else {}
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or ""
    theta = parameters.get("rope_theta") or text.get("rope_theta") or 10000.0
    return float(theta), "" if kind == "default" else str(kind)


def _parameters(tensors: Mapping[str, TensorInfo], quantization: str) -> int | None:
    """How many numbers the model has; None where packed weights or ``.bin`` files do not tell."""
    if not tensors or quantization:
        return None
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in _DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return _DTYPES[max(sizes, key=lambda name: sizes[name])] if sizes else ""


def _code_files(folder: Path, config: Mapping[str, Any]) -> tuple[CodeFile, ...]:
    """Every Python file, where the configuration of the model or the tokenizer names code (auto_map)."""
    tokenizer = folder / "tokenizer_config.json"
    try:
        named = bool(config.get("auto_map")) or (tokenizer.exists() and bool(read_json(tokenizer).get("auto_map")))
    except LoadstoneError:
        named = True
    if not named:
        return ()
    files = sorted(path for path in folder.rglob("*.py") if path.is_file())
    return tuple(
        CodeFile(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
    )


def _slow_names(names: set[str]) -> bool:
    """Whether there is a SentencePiece model, from which the slow tokenizer is made."""
    return not names.isdisjoint({"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"})


def _has_chat_template(folder: Path, names: set[str]) -> bool:
    if "chat_template.jinja" in names or "chat_template.json" in names:
        return True
    try:
        return "tokenizer_config.json" in names and "chat_template" in read_json(folder / "tokenizer_config.json")
    except LoadstoneError:
        return False


def _gguf_facts(model: Model) -> ModelFacts:
    header = read_header(model.path)
    if not header.architecture:
        raise UnsupportedModel(f"{model.name} does not say which architecture it is (general.architecture).")
    tensors = {
        name: TensorInfo(_GGML_TYPES.get(kind, f"type {kind}"), shape) for name, (kind, shape) in header.tensors.items()
    }
    heads = int(header.value("attention.head_count", 0) or 0)
    width = int(header.value("embedding_length", 0) or 0)
    return ModelFacts(
        model=model,
        architecture=header.architecture,
        model_type=header.architecture,
        task="causal",
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        dtype="",
        quantization="gguf",
        quantization_detail=_gguf_type(tensors),
        size_bytes=model.path.stat().st_size,
        context_tokens=int(header.value("context_length", 0) or 0),
        layers=int(header.value("block_count", 0) or 0),
        kv_heads=int(header.value("attention.head_count_kv", heads) or heads),
        head_dim=int(header.value("attention.key_length", 0) or (width // heads if heads else 0)),
        has_rope=_gguf_has_rope(header),
        rope_theta=float(header.value("rope.freq_base", 10000.0)),
        rope_scaling=str(header.value("rope.scaling.type", "")).replace("none", ""),
        code_files=(),
        has_fast_tokenizer=True,
        has_slow_tokenizer=False,
        has_chat_template="tokenizer.chat_template" in header.metadata,
        tensors=tensors,
    )


def _gguf_has_rope(header: GgufHeader) -> bool:
    return any(".rope." in key for key in header.metadata)


def _gguf_type(tensors: Mapping[str, TensorInfo]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name]) if sizes else ""
