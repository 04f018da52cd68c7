"""Python code that nobody was shown is refused before anything of the model runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modules.checkpoint import code_hashes
from modules.errors import CustomCodeRefused, LoadstoneError, UnsafeCheckpoint
from modules.worker.transformers_loader import check_source, load
from tests import checkpoints


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """A model with harmless code, and other code that a link leads to."""
    folder = checkpoints.copied(checkpoints.custom_code(), tmp_path / "model")
    own = (folder / "modeling_own.py").read_text()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n{own}")
    (folder / "code").symlink_to(".hidden")
    return folder


def name_code(folder: Path, module: str, name: str = "config.json") -> None:
    config = json.loads((folder / "config.json").read_text())
    auto_map = {kind: f"{module}.{text.rpartition('.')[2]}" for kind, text in config["auto_map"].items()}
    (folder / name).write_text(json.dumps(config | {"auto_map": auto_map}))


@pytest.mark.parametrize("by_hashes", [True, False], ids=["as seen", "all trusted"])
@pytest.mark.parametrize("module", ["code/modeling", "{outside}/modeling"])
def test_code_that_was_not_shown_does_not_run(
    folder: Path, tmp_path: Path, marker: Path, module: str, by_hashes: bool
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "modeling.py").write_text((folder / "code" / "modeling.py").read_text())
    name_code(folder, module.format(outside=tmp_path / "outside"))
    seen = code_hashes(folder) if by_hashes else {}
    assert set(seen) <= {"modeling_own.py"}
    with pytest.raises(UnsafeCheckpoint, match=r"config\.json takes Python code of model that is not among its files"):
        load(checkpoints.order_for(folder, tmp_path, custom_code_allowed=True, code_hashes=seen), lambda _: None)
    assert not marker.exists()


def test_nor_where_a_configuration_for_another_version_names_it(folder: Path, tmp_path: Path) -> None:
    order = checkpoints.order_for(folder, tmp_path, custom_code_allowed=True, code_hashes=code_hashes(folder))
    check_source(order)
    for module, error in (("code/modeling", UnsafeCheckpoint), ("org/name--modeling", CustomCodeRefused)):
        name_code(folder, module, "config.4.0.0.json")
        with pytest.raises(LoadstoneError, match=r"config\.4\.0\.0\.json") as caught:
            check_source(order)
        assert type(caught.value) is error


def test_nor_a_way_to_generate(folder: Path, tmp_path: Path, marker: Path) -> None:
    (folder / ".hidden" / "modeling.py").rename(folder / ".hidden" / "generate.py")
    (folder / "code").rename(folder / "custom_generate")
    order = checkpoints.order_for(folder, tmp_path, custom_code_allowed=True, code_hashes=code_hashes(folder))
    with pytest.raises(UnsafeCheckpoint, match=r"custom_generate/generate\.py"):
        load(order, lambda _: None)
    assert not marker.exists()


def test_code_in_a_folder_that_was_shown_runs(folder: Path, tmp_path: Path, marker: Path) -> None:
    (folder / "code").unlink()
    (folder / ".hidden").rename(folder / "code")
    name_code(folder, "code/modeling")
    seen = code_hashes(folder)
    assert set(seen) == {"modeling_own.py", "code/modeling.py"}
    order = checkpoints.order_for(folder, tmp_path, custom_code_allowed=True, code_hashes=seen)
    assert load(order, lambda _: None).report.architecture == "OwnForCausalLM"
    assert marker.exists()
