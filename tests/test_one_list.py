"""Names that many rooms need are declared in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modules.checkpoint import LORA_CONFIG, LORA_PICKLE, LORA_WEIGHTS, OTHER_WEIGHTS
from modules.errors import UnsupportedModel, UserError
from modules.hub.choosing import RemoteFile, choose
from modules.library import Library

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", [LORA_CONFIG, LORA_WEIGHTS, LORA_PICKLE])
def test_the_name_of_a_lora_s_file_is_written_once(name: str) -> None:
    written = [
        file.name for file in (ROOT / "modules").rglob("*.py") if re.search(f'"{name}"', file.read_text("utf-8"))
    ]
    assert written == ["checkpoint.py"]


@pytest.mark.parametrize("ending", OTHER_WEIGHTS)
def test_what_no_loader_takes_is_known_here_and_on_the_hub(tmp_path: Path, ending: str) -> None:
    folder, name = tmp_path / "other", f"weights{ending}"
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    said = OTHER_WEIGHTS[ending]
    with pytest.raises(UnsupportedModel, match=said):
        Library([tmp_path]).facts("other")
    files = [RemoteFile(name, 1), RemoteFile("model.safetensors", 1), RemoteFile("config.json", 1)]
    assert said in choose("user/model", files).left_out[name]
    with pytest.raises(UserError, match="no weights that Loadstone loads"):
        choose("user/model", files[:1])
