"""What an adapter's folder holds, read and checked before the model is touched."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from modules.checkpoint import (
    LORA_CONFIG,
    LORA_KINDS,
    LORA_PICKLE,
    LORA_WEIGHTS,
    check_lora_config,
    read_json,
    safetensors_header,
)
from modules.errors import AdapterError, AdapterNotFound, BrokenCheckpoint
from modules.protocol import AdapterChoice

PREFIX = "base_model.model."  # of every tensor's name in the file; then it goes on as in the model

Fingerprint: TypeAlias = tuple[tuple[int, int], ...]  # mtime in ns and bytes of each file


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's configuration and the shapes of its tensors. No tensor has been read yet."""

    name: str
    folder: Path
    config: PeftConfig
    shapes: dict[str, tuple[int, ...]]  # by the names in the file
    fingerprint: Fingerprint

    @property
    def kind(self) -> str:
        """ "LoRA" (DoRA and rsLoRA included), "LoHa" or "LoKr"."""
        return LORA_KINDS[self.config.peft_type.value]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU and in memory of their own: the file may change. Raises AdapterError."""
        try:
            tensors = load_safetensors((self.folder / LORA_WEIGHTS).read_bytes())
        except FileNotFoundError:
            raise _gone(self.name, self.folder) from None
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{LORA_WEIGHTS} of the LoRA {self.name} cannot be read: {error}.") from error
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != self.shapes:
            raise AdapterError(f"{LORA_WEIGHTS} of the LoRA {self.name} changed while it was read.", "Apply it again.")
        if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise AdapterError(f"{len(broken)} tensors of the LoRA {self.name} hold NaN or infinity: {broken[0]}, …")
        return tensors


def fingerprint(folder: Path) -> Fingerprint | None:
    """What changes when the adapter's files do; None where one of them is not there."""
    try:
        stats = [os.stat(folder / name) for name in (LORA_CONFIG, LORA_WEIGHTS)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def read(choice: AdapterChoice) -> AdapterFiles:
    """Check the files of one LoRA and read what describes it. Raises AdapterError and AdapterNotFound."""
    folder = _folder(choice)
    try:
        data = read_json(folder / LORA_CONFIG)
        found = fingerprint(folder)
        _check_weights_are_there(choice.name, folder)
        header = safetensors_header(folder / LORA_WEIGHTS)
    except BrokenCheckpoint as error:
        raise AdapterError(f"The LoRA {choice.name}: {error.message}") from None
    except OSError:
        raise _gone(choice.name, folder) from None
    if found is None:
        raise _gone(choice.name, folder)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise AdapterError(f"The LoRA {choice.name} holds no tensors.")
    return AdapterFiles(choice.name, folder, _config(choice.name, data), shapes, found)


def _folder(choice: AdapterChoice) -> Path:
    for text in (choice.name, choice.path):
        if any(".." in kind(text).parts for kind in (PurePosixPath, PureWindowsPath)) or "\0" in text:
            raise AdapterError(f"The LoRA's name leaves its folder: {text!r}.", "Name a folder under loras/.")
    folder = Path(choice.path)
    if not folder.is_absolute() or not folder.is_dir():
        raise _gone(choice.name, folder)
    return folder


def _gone(name: str, folder: Path) -> AdapterNotFound:
    return AdapterNotFound(f"The LoRA {name} is not there: there is no folder {folder}, or its files are gone.")


def _check_weights_are_there(name: str, folder: Path) -> None:
    if (folder / LORA_WEIGHTS).is_file():
        return
    if (folder / LORA_PICKLE).exists():
        raise AdapterError(
            f"The LoRA {name} is stored as a pickle ({LORA_PICKLE}), which can run code when it is opened.",
            "Get it as safetensors, from a source you trust. Nothing was changed.",
        )
    raise AdapterError(f"The LoRA {name} has no {LORA_WEIGHTS}.")


def _config(name: str, data: dict[str, Any]) -> PeftConfig:
    """The configuration, for inference. Raises AdapterError for what cannot be attached and taken off again."""
    check_lora_config(name, data)
    return _parsed(name, data)


def _parsed(name: str, data: dict[str, Any]) -> PeftConfig:
    try:
        config = PeftConfig.from_peft_type(**json.loads(json.dumps(data)))
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterError(f"{LORA_CONFIG} of the LoRA {name} cannot be read: {error}.") from error
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # the file's weights replace them
    return config
