"""What the tests of downloads share: a Hub on localhost, and huggingface_hub as it is outside of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from tests.hub_models import tiny_files
from tests.hub_server import Hub, Repo


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The network is allowed (there is only localhost), and no token or cache of this machine is read."""
    home = tmp_path / "hf-home"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    yield
    huggingface_hub.utils.close_session()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub that holds a small whole model as ``user/model``."""
    with Hub({"user/model": Repo({"main": tiny_files()})}) as running:
        yield running
