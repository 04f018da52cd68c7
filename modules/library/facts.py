"""What a model is, read from its configuration and its headers: no weights, no ML package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.checkpoint import (
    LORA_CONFIG,
    OTHER_WEIGHTS,
    check_files,
    code_hashes,
    code_references,
    read_json,
    refuse_hidden_code,
    weight_files,
)
from modules.errors import BrokenCheckpoint, LoadstoneError, ModelNotFound, NotAModel, UnsupportedModel
from modules.library import config as reading
from modules.library.gguf_header import GgufHeader, read_header
from modules.library.scan import PIPELINE_CONFIG, UNFINISHED, Model
from modules.library.tensors import TensorInfo, main_dtype, main_type, parameters, safetensors_tensors
from modules.options import Circumstances
from modules.protocol import Task
from modules.units import format_bytes, format_count, format_tokens

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SENTENCEPIECE = frozenset({"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"})
# Architectures that number positions by a table, learned or computed, which ends at the model's limit.
_POSITION_TABLES = frozenset({
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "codegen", "ctrl", "electra", "ernie", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "marian",
    "mbart", "megatron-bert", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "rembert", "roc_bert", "trocr", "xlm",
})  # fmt: skip
# … and those whose table begins behind the padding token's number, which counts as places too.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
_GGUF_POSITIONS = "position_embd.weight"
_LEGACY_QUANTIZATION = ("quantize_config.json", "quant_config.json")  # of GPTQ, of AWQ


@dataclass(frozen=True)
class CodeFile:
    """A Python file that a model brings. ``sha256`` is "" for code that lies in another repository."""

    name: str
    sha256: str


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
    size_bytes: int  # of the weight files
    context_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    has_rope: bool
    rope_theta: float
    rope_scaling: str
    positions: int  # how many there are, and no context can be longer; 0: any number
    code_files: tuple[CodeFile, ...]
    has_fast_tokenizer: bool
    has_slow_tokenizer: bool
    has_chat_template: bool
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # config.json; empty for GGUF
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)  # empty for .bin
    heads: int = 0  # of the queries; of GGUF only, as the next one: elsewhere config tells
    experts_used: int = 0  # for each token; 0: the model is no mixture

    def circumstances(self, gpu_names: tuple[str, ...], values: Mapping[str, object]) -> Circumstances:
        """What the options need to know to say whether they apply."""
        return Circumstances(
            model_chosen=True, quantization=self.quantization, has_rope=self.has_rope,
            rope_scaling=self.rope_scaling, has_custom_code=bool(self.code_files),
            has_slow_tokenizer=self.has_slow_tokenizer, has_fast_tokenizer=self.has_fast_tokenizer,
            gpu_names=gpu_names, context_tokens=self.context_tokens, values=dict(values),
        )  # fmt: skip

    def summary(self) -> str:
        """``LlamaForCausalLM · 135 M · bf16 · 269 MB · 8k context``."""
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
    """Describe the model.

    Raises ModelNotFound where it is gone, NotAModel and UnsupportedModel for what is something else, and
    BrokenCheckpoint or UnsafeCheckpoint as :func:`modules.checkpoint.check_files` does.
    """
    try:
        if not model.path.exists():
            raise ModelNotFound(f"{model.name} is not there any more: {model.path}.")
        if model.file_format == "gguf":
            check_files(model.path, "gguf")
            return _gguf_facts(model)
        _refuse_other_things(model.path)
        check_files(model.path, model.file_format)
        return _folder_facts(model)
    except OSError as error:
        raise BrokenCheckpoint(f"{model.name} cannot be read: {error.strerror}.", "Check its permissions.") from None


def _refuse_other_things(folder: Path) -> None:
    """Raise for what lies in a model folder and is no model, so that it is named for what it is."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        raise NotAModel(f"{folder.name} is empty.")
    if LORA_CONFIG in names:
        raise NotAModel(f"{folder.name} is a LoRA, not a model ({LORA_CONFIG}).", "Move it to loras/.")
    if PIPELINE_CONFIG in names:
        raise NotAModel(f"{folder.name} is an image pipeline ({PIPELINE_CONFIG}).", "Loadstone loads language models.")
    if unfinished := [name for name in names if name.endswith(UNFINISHED)]:
        raise BrokenCheckpoint(f"The download of {folder.name} is not finished: {unfinished[0]}.")
    for name in names:
        if (path := folder / name).suffix in (".safetensors", ".bin") and path.exists() and not path.stat().st_size:
            raise BrokenCheckpoint(f"{name} in {folder.name} is empty: its download did not finish.")
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".index.json"))]
    other = next((name for name in names if Path(name).suffix in OTHER_WEIGHTS), None)
    if other and not weights:
        raise UnsupportedModel(
            f"{folder.name} holds {OTHER_WEIGHTS[Path(other).suffix]} ({other}), which no loader takes.",
            "Get the model as safetensors or as a .gguf file.",
        )


def _folder_facts(model: Model) -> ModelFacts:
    folder = model.path
    config = read_json(folder / "config.json")
    text = reading.text_part(config)
    tokenizer = _optional_json(folder / "tokenizer_config.json")
    legacy = next((data for name in _LEGACY_QUANTIZATION if (data := _optional_json(folder / name))), {})
    quantization, detail, bits = reading.quantization(config, legacy)
    files = weight_files(folder, model.file_format)
    tensors = safetensors_tensors(files) if model.file_format == "safetensors" else {}
    names = {entry.name for entry in folder.iterdir()}
    layers, kv_heads, head_dim = reading.attention(text)
    rope = reading.rope(text)
    return ModelFacts(
        model=model,
        architecture=reading.architecture(config),
        model_type=str(config.get("model_type", "")),
        task="seq2seq" if config.get("is_encoder_decoder") is True else "causal",
        parameters=parameters(tensors, quantization, bits),
        dtype=(not quantization and main_dtype(tensors)) or reading.dtype(text),
        quantization=quantization,
        quantization_detail=detail,
        size_bytes=sum(file.stat().st_size for file in files),
        context_tokens=reading.context_tokens(text),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        has_rope=rope is not None,
        rope_theta=rope[0] if rope else 0.0,
        rope_scaling=rope[1] if rope else "",
        positions=0 if rope else _positions(text),
        code_files=_code_files(folder),
        has_fast_tokenizer="tokenizer.json" in names or names.isdisjoint(_SENTENCEPIECE),
        has_slow_tokenizer=not names.isdisjoint(_SENTENCEPIECE),
        has_chat_template=_has_chat_template(names, tokenizer),
        config=config,
        tensors=tensors,
    )


def _positions(text: Mapping[str, Any]) -> int:
    """How many positions a model without RoPE has; 0 for relative ones, for ALiBi, and where it is not known."""
    model_type, limit = str(text.get("model_type", "")), reading.context_tokens(text)
    if model_type in _POSITIONS_AFTER_PADDING:
        padding = text.get("pad_token_id")
        return max(0, limit - 1 - (padding if isinstance(padding, int) else 1))
    return limit if model_type in _POSITION_TABLES else 0


def _optional_json(path: Path) -> Mapping[str, Any]:
    """The object in a file that a model can do without; empty where it is missing or damaged."""
    try:
        return read_json(path)
    except LoadstoneError:
        return {}


def _has_chat_template(names: set[str], tokenizer: Mapping[str, Any]) -> bool:
    return not names.isdisjoint({"chat_template.jinja", "chat_template.json"}) or bool(tokenizer.get("chat_template"))


def _code_files(folder: Path) -> tuple[CodeFile, ...]:
    """Every Python file, where the configuration of the model or the tokenizer names code (auto_map).

    Code of other repositories, which would be fetched, is named without a hash: nobody can allow it as seen. Raises
    UnsafeCheckpoint where other code than those files would run.
    """
    references = code_references(folder, _optional_json)
    if not references:
        return ()
    hashes = code_hashes(folder)
    refuse_hidden_code(folder, references, hashes)
    foreign = sorted({reference for named in references.values() for reference in named if "--" in reference})
    return (
        *(CodeFile(name, sha256) for name, sha256 in hashes.items()),
        *(CodeFile(reference, "") for reference in foreign),
    )


def _gguf_facts(model: Model) -> ModelFacts:
    header = read_header(model.path)
    if not header.architecture:
        raise UnsupportedModel(f"{model.name} does not say which architecture it is (general.architecture).")
    tensors = {name: TensorInfo(kind, shape) for name, (kind, shape) in header.tensors.items()}
    heads, width = int(header.number("attention.head_count")), int(header.number("embedding_length"))
    scaling = str(header.metadata.get(f"{header.architecture}.rope.scaling.type", "none"))
    has_rope = _gguf_has_rope(header)
    return ModelFacts(
        model=model,
        architecture=header.architecture,
        model_type=header.architecture.replace("-", "_"),  # gpt-oss; as config.json has it
        task="seq2seq" if header.architecture == "t5" else "causal",
        parameters=sum(tensor.elements for tensor in tensors.values()),
        dtype="",
        quantization="gguf",
        quantization_detail=main_type(tensors),
        size_bytes=model.path.stat().st_size,
        context_tokens=int(header.number("context_length")),
        layers=int(header.number("block_count")),
        kv_heads=int(header.number("attention.head_count_kv")) or heads,
        head_dim=int(header.number("attention.key_length")) or (width // heads if heads else 0),
        has_rope=has_rope,
        rope_theta=(header.number("rope.freq_base") or reading.DEFAULT_THETA) if has_rope else 0.0,
        rope_scaling="" if scaling == "none" else scaling,
        positions=int(header.number("context_length")) if _GGUF_POSITIONS in tensors else 0,
        code_files=(),
        has_fast_tokenizer=True,
        has_slow_tokenizer=False,
        has_chat_template=bool(header.metadata.get("tokenizer.chat_template")),
        tensors=tensors,
        heads=heads,
        experts_used=int(header.number("expert_used_count")),
    )


def _gguf_has_rope(header: GgufHeader) -> bool:
    return any(key.startswith(f"{header.architecture}.rope.") for key in header.metadata)
