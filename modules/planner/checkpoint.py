"""What the planner reads of a model: config.json, and its tensors' names, types and shapes."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modules.checkpoint import read_json, weight_files
from modules.library import ModelFacts
from modules.library import config as reading
from modules.library.tensors import TensorInfo, main_dtype, safetensors_tensors
from modules.protocol import Task


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One model, as far as memory goes. Two are the same only if they are one object: layouts are kept by it."""

    name: str
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)  # empty for .bin files
    quantization: str = ""  # as stored: "gptq", "awq", "bitsandbytes", "gguf", …; "" = plain weights
    task: Task = "causal"
    file_format: str = "safetensors"
    size_bytes: int = 0  # of the weight files
    stored_dtype: str = ""  # of most numbers that are not packed: "bfloat16"; "" = not known
    context_limit: int = 0  # in tokens; 0 = not known
    unpacked: bool = False  # weights that are stored packed are plain ones in ``tensors``

    @property
    def prequantized(self) -> bool:
        """Whether packed weights stay packed; those of GGUF files are unpacked while loading."""
        return bool(self.quantization) and self.file_format != "gguf" and not self.unpacked

    @cached_property
    def written_to_offload(self) -> bool:
        """Whether layers kept on disk are written there. Those of safetensors are read where they are, but for what
        the loader converts (transformers 5.23, core_model_loading): experts that it merges, weights that it unpacks.
        """
        merges = "auto_map" not in self.config and any(_ONE_EXPERT.search(name) for name in self.tensors)
        return self.file_format != "safetensors" or self.unpacked or merges


_GGUF_INNER = ("ffn_up.weight", "ffn_gate.weight")
_GGUF_EXPERTS = ("ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_gate_up_exps.weight")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_KEPT = 8
_known: list[tuple[ModelFacts, Checkpoint]] = []
_lock = threading.Lock()


def from_facts(facts: ModelFacts) -> Checkpoint:
    """The library's facts as the planner takes them: the same object for the same facts, for the last few."""
    with _lock:
        for known, checkpoint in _known:
            if known is facts:
                return checkpoint
    made = _from_facts(facts)
    with _lock:
        _known.insert(0, (facts, made))
        del _known[_KEPT:]
    return made


def _from_facts(facts: ModelFacts) -> Checkpoint:
    return Checkpoint(
        name=facts.model.name,
        config=facts.config or _gguf_config(facts),
        tensors=facts.tensors,
        quantization=facts.quantization,
        task=facts.task,
        file_format=facts.model.file_format,
        size_bytes=facts.size_bytes,
        stored_dtype=_stored_dtype(facts.tensors, facts.config),
        context_limit=facts.context_tokens,
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """The safetensors checkpoint in ``folder``. Raises BrokenCheckpoint and its kin, as the library does."""
    config = read_json(folder / "config.json")
    files = weight_files(folder, "safetensors")
    tensors = safetensors_tensors(files)
    text = reading.text_part(config)
    return Checkpoint(
        name=folder.name,
        config=config,
        tensors=tensors,
        quantization=reading.quantization(config, {})[0],
        task="seq2seq" if config.get("is_encoder_decoder") else "causal",
        size_bytes=sum(file.stat().st_size for file in files),
        stored_dtype=_stored_dtype(tensors, config),
        context_limit=reading.context_tokens(text),
    )


def _stored_dtype(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    """The dtype of most floating-point numbers, as a loader sees it: by the headers, else by config.json."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in ("F32", "F16", "BF16")}
    return main_dtype(floats) or reading.dtype(reading.text_part(config))


def _gguf_config(facts: ModelFacts) -> dict[str, Any]:
    """What config.json would say of a GGUF file, from its header."""
    embedding = facts.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "model_type": facts.model_type,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        "vocab_size": embedding.shape[0] if embedding else 0,
        "hidden_size": embedding.shape[-1] if embedding else 0,
    }
    if inner := _most_rows(facts.tensors, _GGUF_INNER):
        config["intermediate_size"] = inner
    if facts.experts_used and (inner := _most_rows(facts.tensors, _GGUF_EXPERTS)):
        config |= {"moe_intermediate_size": inner, "num_experts_per_tok": facts.experts_used}
    return {**config, "rope_theta": facts.rope_theta} if facts.has_rope else config


def _most_rows(tensors: Mapping[str, TensorInfo], endings: tuple[str, ...]) -> int:
    """The most rows of a matrix, or of a stack of them, whose name ends so; 0 where there is none."""
    rows = (info.shape[-2] for name, info in tensors.items() if name.endswith(endings) and len(info.shape) >= 2)
    return max(rows, default=0)
