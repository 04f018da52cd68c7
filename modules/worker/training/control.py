"""What is asked of a training while it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Control:
    """What was asked of the training meanwhile: "", "pause" or "keep". Set on another thread."""

    asked: str = ""
