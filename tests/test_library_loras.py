"""Which LoRAs there are and what each is: real ones trained by peft, and folders with every kind of fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules.errors import AdapterError, AdapterNotFound
from modules.library.loras import LoraLibrary
from tests import lora_files, loras

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 16)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras"


def names(library: LoraLibrary) -> list[str]:
    return [lora.name for lora in library.loras()]


def test_a_trained_lora_is_described(root: Path) -> None:
    (root / "lantern").symlink_to(loras.lantern(), target_is_directory=True)
    facts = LoraLibrary([root]).facts("lantern")
    assert (facts.kind, facts.ranks, facts.alpha) == ("LoRA", (8,), 16)
    assert facts.target_modules == ("down_proj", "o_proj", "q_proj", "v_proj")
    assert facts.base_name == "SmolLM2-135M-Instruct"
    assert facts.size_bytes == (loras.lantern() / "adapter_model.safetensors").stat().st_size
    assert facts.summary().startswith("LoRA · rank 8 · alpha 16 · down_proj o_proj q_proj v_proj · 5 MB · for SmolLM2")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_rslora": True, "use_dora": True}, "DoRA rsLoRA"),
        ({"peft_type": "LOHA"}, "LoHa"),
        ({"peft_type": "lokr"}, "LoKr"),
        ({"peft_type": "NEWEST"}, "NEWEST"),
    ],
)
def test_its_kind_is_named_in_the_fields_words(root: Path, config: dict[str, Any], kind: str) -> None:
    lora_files.write(root / "one", SHAPES, **config)
    assert LoraLibrary([root]).facts("one").kind == kind


def test_they_are_found_in_every_folder_and_in_the_cache(root: Path, tmp_path: Path) -> None:
    lora_files.write(root / "Zebra", SHAPES)
    lora_files.write(root / "apple", SHAPES)
    lora_files.write(root / "apple" / "checkpoint-100", SHAPES)
    lora_files.write(root / "owner" / "named", SHAPES)
    (root / "empty").mkdir()
    lora_files.write(tmp_path / "more" / "apple", SHAPES)
    cached = tmp_path / "hub" / "models--org--name"
    lora_files.write(cached / "snapshots" / "abc", SHAPES)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (tmp_path / "hub" / "models--org--model" / "snapshots" / "abc").mkdir(parents=True)
    library = LoraLibrary([root, tmp_path / "more", tmp_path / "not-there"], tmp_path / "hub")
    assert names(library) == ["apple", "apple (more)", "apple/checkpoint-100", "org/name", "owner/named", "Zebra"]
    assert library.find("org/name").path == cached / "snapshots" / "abc"
    assert library.find("apple (more)").path == tmp_path / "more" / "apple"


def test_nothing_in_a_folder_that_cannot_be_read_is_no_error(tmp_path: Path) -> None:
    assert names(LoraLibrary([tmp_path / "not-there"], tmp_path / "no-cache")) == []


@pytest.mark.parametrize("name", ["../secret", "..", "/etc", "apple/../../secret", "", "a\0b", ".hidden"])
def test_no_name_leads_out_of_the_folders(root: Path, tmp_path: Path, name: str) -> None:
    lora_files.write(tmp_path / "secret", SHAPES)
    lora_files.write(root / "apple", SHAPES)
    with pytest.raises(AdapterNotFound):
        LoraLibrary([root]).find(name)


def test_a_link_that_cannot_be_followed_hides_no_lora(root: Path) -> None:
    lora_files.write(root / "one", SHAPES)
    (root / "loop").symlink_to(root / "loop")
    (root / "one" / "loop").symlink_to(root / "one" / "loop")
    assert names(LoraLibrary([root])) == ["one"]


def test_an_unknown_name_is_told_its_neighbours(root: Path) -> None:
    lora_files.write(root / "pirate", SHAPES)
    with pytest.raises(AdapterNotFound, match="Did you mean pirate"):
        LoraLibrary([root]).find("Pirat")


def test_a_folder_without_a_configuration_is_said_to_be_no_lora(root: Path) -> None:
    lora_files.write(root / "one", SHAPES)
    (root / "one" / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"one holds no adapter_config\.json"):
        LoraLibrary([root]).find("one")


def test_damaged_and_unsafe_files_are_refused(root: Path) -> None:
    library = LoraLibrary([root])
    folder = lora_files.write(root / "one", SHAPES)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, described = weights.read_bytes(), config.read_text()
    library.facts("one")

    weights.write_bytes(whole[:-5])
    with pytest.raises(AdapterError, match="cut short"):
        library.facts("one")
    weights.write_bytes(b"\x80\x04 no header at all")
    with pytest.raises(AdapterError, match=r"not a safetensors file|cut short"):
        library.facts("one")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"there is no adapter_model\.safetensors"):
        library.facts("one")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="pickle"):
        library.facts("one")
    weights.write_bytes(whole)
    for wrong in ("{", "[]", "{}", json.dumps({**json.loads(described), "peft_type": None})):
        config.write_text(wrong)
        with pytest.raises(AdapterError):
            library.facts("one")
    config.write_text(described)
    assert library.facts("one").ranks == (4,)


def test_one_that_is_removed_meanwhile_is_said_to_be_gone(root: Path) -> None:
    library = LoraLibrary([root])
    lora_files.write(root / "one", SHAPES)
    lora = library.find("one")
    library.facts(lora)
    shutil.rmtree(root / "one")
    with pytest.raises(AdapterNotFound, match="not there any more"):
        library.facts(lora)
    assert names(library) == []


def test_changed_files_are_read_anew(root: Path) -> None:
    library = LoraLibrary([root])
    lora_files.write(root / "one", SHAPES)
    assert library.facts("one").ranks == (4,)
    assert library.facts("one") is library.facts("one")
    shutil.rmtree(root / "one")
    lora_files.write(root / "one", SHAPES, rank=2)
    assert library.facts("one").ranks == (2,)


@pytest.mark.parametrize(
    "config",
    ['{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"peft_type": "LORA", "lora_alpha": ' + "9" * 400 + "}"],
    ids=["deep", "long"],
)
def test_a_configuration_that_no_program_writes_is_refused(root: Path, config: str) -> None:
    (lora_files.write(root / "one", SHAPES) / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match="The LoRA one cannot be read"):
        LoraLibrary([root]).facts("one")


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity", "9" * 40, "true", '"8"', "[8]"])
def test_what_is_no_number_of_a_lora_is_none(root: Path, number: str) -> None:
    folder = lora_files.write(root / "one", {}, tensors={"base_model.model.x.weight": np.ones((1, 1), np.float32)})
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {number}, "lora_alpha": {number}}}')
    facts = LoraLibrary([root]).facts("one")
    assert (facts.ranks, facts.alpha) == ((), 0.0)
    assert facts.summary().startswith("LoRA · ")
