"""LoRAs that cannot be used: each is refused with the reason, and nothing has changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.errors import AdapterError, AdapterMismatch, AdapterNotFound
from modules.protocol import AdapterChoice
from modules.worker.adapters import wrapping
from tests import checkpoints, loras
from tests.worker.adapted import Adapted, load

Damage = Callable[[Path], Any]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def _one(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return load(checkpoints.llama(), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loras.untrained(tmp_path_factory.mktemp("loras") / "good", checkpoints.llama())


@pytest.fixture(params=["nothing active", "one active"])
def one(_one: Adapted, good: Path, request: pytest.FixtureRequest) -> Iterator[Adapted]:
    _one.adapters.apply((loras.choice(good, 0.5),) if request.param == "one active" else ())
    yield _one
    _one.adapters.apply((loras.choice(good),))  # and the next one is taken


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Damage that changes the tensors of the file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def reconfigure(**changes: Any) -> Damage:
    return lambda folder: loras.edited(folder, **changes)


def _first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def _one_other_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = _first(tensors, "down_proj.lora_B")
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])


def _another_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = _first(tensors, "q_proj.lora_A")
    tensors[name] = torch.zeros(tensors[name].shape[0] * 2, tensors[name].shape[1])


def _one_is_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_first(tensors, "q_proj.lora_B")]


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first(tensors, "lora_A")][0, 0] = float("nan")


def _of_the_base(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(8, 128)


def _more_layers(tensors: dict[str, torch.Tensor]) -> None:
    name = _first(tensors, "layers.0.")
    tensors[name.replace("layers.0.", "layers.40.")] = tensors[name].clone()


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) - 100])


def _no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


DAMAGES: dict[str, tuple[Damage, type[AdapterError], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), AdapterError, "adapter_config.json"),
    "config is no JSON": (_no_json, AdapterError, "not JSON"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), AdapterError, WEIGHTS),
    "pickle": (_pickle, AdapterError, "pickle"),
    "truncated": (_truncated, AdapterError, "cut short"),
    "empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), AdapterError, "not a safetensors file"),
    "one other shape": (rewrite(_one_other_shape), AdapterMismatch, r"another shape.*down_proj"),
    "another rank": (rewrite(_another_rank), AdapterError, ""),
    "one tensor is missing": (rewrite(_one_is_missing), AdapterMismatch, "lacks 1 of the 8 tensors"),
    "not a number": (rewrite(_not_a_number), AdapterError, "NaN"),
    "tensors of the base": (rewrite(_of_the_base), AdapterError, "base model itself"),
    "more layers": (rewrite(_more_layers), AdapterMismatch, r"does not have: model.layers.40"),
    "unknown targets": (reconfigure(target_modules=["no_such_proj"]), AdapterError, "no_such_proj"),
    "targets without tensors": (
        reconfigure(target_modules=["q_proj", "down_proj", "v_proj"]),
        AdapterMismatch,
        "lacks",
    ),
    "tensors without targets": (reconfigure(target_modules=["q_proj"]), AdapterMismatch, "down_proj"),
    "another kind": (reconfigure(peft_type="IA3"), AdapterError, "'IA3'"),
    "no kind": (reconfigure(peft_type=None), AdapterError, "kind None"),
    "biases": (reconfigure(bias="all"), AdapterError, "biases"),
    "changed base weights": (reconfigure(init_lora_weights="pissa"), AdapterError, "pissa"),
    "repeated layers": (reconfigure(layer_replication=[[0, 2], [1, 2]]), AdapterError, "repeats layers"),
    "a rank of words": (reconfigure(r="eight"), AdapterError, ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_lora_is_refused_and_nothing_changes(one: Adapted, good: Path, tmp_path: Path, name: str) -> None:
    damage, kind, words = DAMAGES[name]
    folder = checkpoints.copied(good, tmp_path / "damaged")
    damage(folder)
    with one.unchanged(), pytest.raises(kind, match=words or None) as refused:
        one.adapters.apply((loras.choice(good), loras.choice(folder)))  # the good one beside it does not help
    assert refused.value.hint
    with one.unchanged(), pytest.raises(kind, match=words or None), one.adapters.using((loras.choice(folder),)):
        pass


def test_a_lora_of_another_model_is_refused_with_its_name(one: Adapted, demo_model: Path) -> None:
    with one.unchanged(), pytest.raises(AdapterMismatch, match=re.escape(demo_model.name)):
        one.adapters.apply((loras.choice(loras.herring()),))


@pytest.mark.parametrize(
    "choice",
    [
        AdapterChoice("../good", "/loras/good"),
        AdapterChoice("good", "/loras/../good"),
        AdapterChoice("..\\good", "/loras/good"),
    ],
)
def test_a_name_that_leaves_its_folder_is_refused(one: Adapted, choice: AdapterChoice) -> None:
    with one.unchanged(), pytest.raises(AdapterError, match="leaves its folder"):
        one.adapters.apply((choice,))


def test_a_lora_that_is_gone_is_refused(one: Adapted, tmp_path: Path) -> None:
    with one.unchanged(), pytest.raises(AdapterNotFound, match="gone"):
        one.adapters.apply((AdapterChoice("gone", str(tmp_path / "gone")),))


def test_files_that_change_while_they_are_read_are_refused(
    one: Adapted, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.copied(good, tmp_path / "changing")
    inject = getattr(wrapping, "inject_adapter_in_model")  # noqa: B009 - it is peft's

    def and_change(*args: Any, **kwargs: Any) -> Any:
        rewrite(_one_other_shape)(folder)
        return inject(*args, **kwargs)

    monkeypatch.setattr(wrapping, "inject_adapter_in_model", and_change)
    with one.unchanged(), pytest.raises(AdapterError, match="changed while it was read"):
        one.adapters.apply((loras.choice(folder),))


@pytest.mark.parametrize("function", ["inject_adapter_in_model", "set_peft_model_state_dict"])
def test_a_failure_in_the_midst_is_taken_back(
    one: Adapted, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """As where memory runs out: the layers are there already, some of them new, some with one adapter more."""
    folder = loras.untrained(tmp_path / "wider", checkpoints.llama(), target_modules=["q_proj", "k_proj", "lm_head"])
    real = getattr(wrapping, function)

    def and_fail(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise MemoryError("as if")

    monkeypatch.setattr(wrapping, function, and_fail)
    with one.unchanged(), pytest.raises(Exception, match="RAM ran out"):
        one.adapters.apply((loras.choice(good), loras.choice(folder)))
    monkeypatch.undo()
    one.adapters.apply((loras.choice(good), loras.choice(folder)))  # it had nothing of its own
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_lora_that_makes_the_model_compute_no_numbers_is_refused(one: Adapted, good: Path, tmp_path: Path) -> None:
    folder = checkpoints.copied(good, tmp_path / "huge")

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.full_like(tensor, 1e30)

    rewrite(grow)(folder)
    with one.unchanged(), pytest.raises(AdapterError, match="no numbers"):
        one.adapters.apply((loras.choice(folder),))
