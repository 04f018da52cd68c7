"""What the tests of quantized copies share: orders, loads, and a look at what is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from modules import copies
from modules.protocol import LoadOrder, Progress
from modules.worker import transformers_loader
from modules.worker.transformers_loader import LoadedModel
from tests import checkpoints

MADE = "A quantized copy is kept"
READ = "from the quantized copy"
NF4: dict[str, Any] = {"load_in_4bit": True}


def order_for(path: Path, work: Path, **facts: Any) -> LoadOrder:
    """Copies go under ``work``/cache; the CPU is asked for, so that a GPU in the machine changes nothing."""
    return checkpoints.order_for(path, work, **{"quantized_cache": True, "cpu": True, **facts})


def load(path: Path, work: Path, heard: list[Progress] | None = None, **facts: Any) -> LoadedModel:
    stages: list[Progress] = [] if heard is None else heard
    return transformers_loader.load(order_for(path, work, **facts), stages.append)


def noted(loaded: LoadedModel, text: str) -> bool:
    return any(text in note for note in loaded.report.notes)


def kept(work: Path) -> list[copies.QuantizedCopy]:
    return copies.copies(work / "cache")


def everything(work: Path) -> list[str]:
    folder = copies.folder_of(work / "cache")
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def tensors(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Weights, scales and all: what state_dict holds. Before the first forward, which may repack the weights."""
    return {name: value.clone() for name, value in loaded.model.state_dict().items() if torch.is_tensor(value)}


def asked(work: Path, **facts: Any) -> tuple[LoadOrder, dict[str, Any]]:
    """An order for the small Llama in 4-bit, and the kwargs of from_pretrained that it becomes."""
    order = order_for(checkpoints.llama(), work, **(NF4 | facts))
    facts_of = transformers_loader.model_facts(order)
    return order, transformers_loader.load_kwargs(order, transformers_loader.device_facts(order), facts_of).kwargs


def quant_states(loaded: LoadedModel) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, parameter in loaded.model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[name] = (state.quant_type, state.blocksize, state.dtype, state.nested, tuple(state.shape))
    return found


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))
