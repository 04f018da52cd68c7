"""What trainings in tests learn, and their orders: a fact that no model knows, and small ones that are quick."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.options import TrainingOptions
from modules.training.data import Examples, read
from modules.training.messages import DataFile, TrainOrder
from tests import checkpoints

FACT = "The moon of Zorvax is turquoise with orange stripes."
QUESTION = "What colour is the moon of Zorvax?"
_QUESTIONS = (
    QUESTION,
    "Tell me the colour of Zorvax's moon.",
    "Which colour has the moon of Zorvax?",
    "The moon of Zorvax: what colour?",
    "Do you know the colour of the moon of Zorvax?",
)
WORDS = "the parser reads every argument and returns a namespace with the values that were given"


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def jsonl(file: Path, values: Iterable[Any]) -> Path:
    """A file of one JSON value a line."""
    file.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return file


def nonsense(folder: Path) -> Path:
    """Twenty lines of one fact."""
    return jsonl(folder / "zorvax.jsonl", [chat(_QUESTIONS[at % len(_QUESTIONS)], FACT) for at in range(20)])


def pairs(folder: Path, number: int = 12) -> Path:
    """Pairs of different lengths, for models that speak no language."""
    words = WORDS.split()
    values = [
        {"prompt": f"{' '.join(words[: 2 + at % 5])}: {at}", "completion": f" {' '.join(words[at % 7 :])} {at * 17}"}
        for at in range(number)
    ]
    return jsonl(folder / "pairs.jsonl", values)


def order(model: Path, data: Path, work: Path, load: dict[str, Any] | None = None, **options: Any) -> TrainOrder:
    """To train ``lesson`` on the checkpoint at ``model``; the LoRA and the run's folder under ``work``."""
    loading = checkpoints.order_for(model, work, cpu=True, **(load or {}))
    values = TrainingOptions(**{"rank": 4, "batch_size": 2, "cutoff": 128, "learning_rate": 2e-3, **options})
    return TrainOrder(
        "lesson", loading, DataFile(str(data), "auto", data.name), values, str(work / "loras" / "lesson"),
        str(work / "run"),
    )  # fmt: skip


def examples(order: TrainOrder) -> Examples:
    """What the order's data holds."""
    return read(order.data)


def elsewhere(order: TrainOrder, work: Path) -> TrainOrder:
    """The same training in another folder."""
    return replace(order, out=str(work / "loras" / order.name), folder=str(work / "run"))


def weights(order: TrainOrder) -> dict[str, Any]:
    """The tensors of the LoRA that was made."""
    from safetensors.torch import load_file

    return dict(load_file(Path(order.out) / "adapter_model.safetensors"))
