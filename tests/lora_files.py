"""LoRAs made of numbers, without training: for what is told from names, headers and configurations alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, int]]


def write(
    folder: Path, shapes: Shapes, rank: int = 4, *, tensors: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """A LoRA for modules of these shapes (module → outputs, inputs), ``*`` for each of two layers.

    ``tensors`` come on top, by their whole names.
    """
    held: dict[str, Any] = {}
    shapes = {name.replace("*", layer): shape for name, shape in shapes.items() for layer in "01"}
    for module, (outputs, inputs) in shapes.items():
        held[f"{PREFIX}{module}.lora_A.weight"] = np.ones((rank, inputs), np.float32)
        held[f"{PREFIX}{module}.lora_B.weight"] = np.zeros((outputs, rank), np.float32)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "rank_pattern": {}}
    folder.mkdir(parents=True)
    save_file({**held, **(tensors or {})}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder
