"""What the tests share: the real demo model, made once and kept between runs, and real worker processes."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library of the Hub reads it; nothing here may need the network

from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / ".cache" / "fixtures"


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder that holds the models made for tests, kept between runs."""
    folder = FIXTURES / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def demo_model(models_dir: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct as bfloat16 safetensors. Treat it as read-only."""
    from modules import demo

    with FileLock(FIXTURES / "models.lock"):
        return models_dir / demo.bring(models_dir, lambda _: None)
