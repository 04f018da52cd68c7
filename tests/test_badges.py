"""The word on each model of the menu."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from modules.devices import Gpu, Machine
from modules.library import Library, Model, ModelFacts
from modules.options import LoadOptions, context_tokens
from modules.planner import plan
from modules.service.badges import Badges, badge
from tests import checkpoints, planner_checkpoints

ROOMY = Machine(gpus=(), ram_total_bytes=64 * 2**30, ram_free_bytes=60 * 2**30, disk_free_bytes=2**40)


@pytest.mark.parametrize(("free_mib", "word"), [(60_000, "fits"), (1450, "fits in 4-bit"), (100, "too large")])
def test_badges_of_the_demo_model(demo_model: Path, free_mib: int, word: str) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    assert badge(facts, replace(ROOMY, ram_free_bytes=free_mib * 2**20)) == word


@pytest.mark.parametrize(
    ("free_mib", "word"), [(23_000, "fits"), (1030, "fits in 4-bit"), (990, "with offload"), (100, "too large")]
)
def test_a_badge_says_what_lies_beside_the_gpu(demo_model: Path, free_mib: int, word: str) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    assert badge(facts, replace(ROOMY, gpus=(gpu(free_mib * 2**20),))) == word


def test_already_quantized_weights_beside_the_gpu_are_an_offload() -> None:
    facts = Library([checkpoints.gptq().parent]).facts(checkpoints.gptq().name)
    tokens = context_tokens(LoadOptions(), facts.context_tokens)
    roomy = replace(ROOMY, gpus=(gpu(24 * 2**30),))
    needed = plan(facts, LoadOptions(), roomy, ctx_tokens=tokens).devices[0].total_bytes
    assert badge(facts, roomy) == "fits"
    assert badge(facts, replace(ROOMY, gpus=(gpu(needed - 1),))) == "with offload"


def gpu(free_bytes: int) -> Gpu:
    return Gpu(0, "simulated", "0", 24 * 2**30, free_bytes)


def test_what_no_loader_takes_says_so(tmp_path: Path) -> None:
    planner_checkpoints.quantized_by("exl2", tmp_path / "exl2")
    assert Badges(Library([tmp_path])).all(ROOMY, budget_s=30) == {"exl2": "no loader takes this model"}


def test_a_broken_model_says_so_and_a_spent_budget_leaves_the_rest(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "good").symlink_to(demo_model, target_is_directory=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"not one")
    badges = Badges(Library([tmp_path]))
    assert badges.all(ROOMY, budget_s=-1) == {}
    found = badges.all(ROOMY, budget_s=30)
    assert found["good"] == "fits"
    assert "damaged" in found["broken"]


DAMAGED = "the model's files are damaged or incomplete"


def test_a_badge_changes_with_the_files(tmp_path: Path) -> None:
    """Mended in place, as a copy over it is; replaced, as a repair does; the folder another model's."""
    folder = checkpoints.copied(checkpoints.llama(), tmp_path / "model")
    badges, weights = Badges(Library([tmp_path])), folder / "model.safetensors"
    whole = weights.read_bytes()
    assert badges.all(ROOMY, budget_s=30) == {"model": "fits"}
    with weights.open("r+b") as file:
        file.write(b"damage")
    assert badges.all(ROOMY, budget_s=30) == {"model": DAMAGED}
    with weights.open("r+b") as file:
        file.write(whole[:6])
    assert badges.all(ROOMY, budget_s=30) == {"model": "fits"}
    (tmp_path / "new").write_bytes(whole[:-1])
    (tmp_path / "new").rename(weights)
    assert badges.all(ROOMY, budget_s=30) == {"model": DAMAGED}
    shutil.rmtree(folder)
    checkpoints.copied(checkpoints.sharded(), folder)
    assert badges.all(ROOMY, budget_s=30) == {"model": "fits"}


def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        checkpoints.copied(checkpoints.llama(), tmp_path / name)
    library = Library([tmp_path])
    badges, looked, facts = Badges(library), [], library.facts

    def counted(model: Model | str) -> object:
        looked.append(model.name if isinstance(model, Model) else model)
        return facts(model)

    monkeypatch.setattr(library, "facts", counted)
    for _ in range(3):
        assert badges.all(ROOMY, budget_s=30) == {"a": "fits", "b": "fits"}
    assert looked == ["a", "b"]
    (tmp_path / "b" / "config.json").touch()
    badges.all(ROOMY, budget_s=30)
    assert looked == ["a", "b", "b"]
    badges.all(replace(ROOMY, ram_total_bytes=2**40), budget_s=30)
    assert looked == ["a", "b", "b", "a", "b"]


def test_with_little_time_what_changed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"m{number}" for number in range(5)]
    for name in names:
        (tmp_path / name).mkdir()
        for file in checkpoints.llama().iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    library = Library([tmp_path])
    badges, compared, identity = Badges(library), [], library.identity
    now = 1.0
    monkeypatch.setattr("modules.service.badges.time.monotonic", lambda: now)
    badges.all(ROOMY, budget_s=30)

    def slow(model: Model) -> object:
        nonlocal now
        now += 1.0
        compared.append(model.name)
        return identity(model)

    monkeypatch.setattr(library, "identity", slow)
    (tmp_path / "m3" / "model.safetensors").unlink()
    (tmp_path / "m3" / "model.safetensors").write_bytes(b"cut")
    assert badges.all(ROOMY, budget_s=1.5) == {**dict.fromkeys(names, "fits"), "m3": DAMAGED}
    for _ in range(2):
        badges.all(ROOMY, budget_s=1.5)
    assert compared == ["m3", "m0", "m1", "m2", "m4", "m3"]


def test_a_badge_follows_the_memory_and_the_bounds(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "demo").symlink_to(demo_model, target_is_directory=True)
    badges = Badges(Library([tmp_path]))
    full = replace(ROOMY, ram_free_bytes=100 * 2**20)
    assert badges.all(full, budget_s=30) == {"demo": "too large"}
    assert badges.all(ROOMY, budget_s=-1) == {"demo": "too large"}  # no time yet; the old word is better than none
    assert badges.all(ROOMY, budget_s=30) == {"demo": "fits"}
    assert badges.all(ROOMY, LoadOptions(batch_tokens=4_000_000), budget_s=30) == {"demo": "too large"}
    with_gpu = replace(full, ram_free_bytes=2 * 2**30, gpus=(gpu(20 * 2**30),))
    assert badges.all(with_gpu, budget_s=30) == {"demo": "fits"}
    assert badges.all(with_gpu, LoadOptions(gpu_memory=(1.006,)), budget_s=30) == {"demo": "fits in 4-bit"}


class Surprised(Library):
    """Meets in one model what nobody has thought of."""

    def facts(self, model: Model | str) -> ModelFacts:
        if not isinstance(model, str) and model.name == "odd":
            raise TypeError("'int' object is not iterable")
        return super().facts(model)


def test_whatever_one_model_holds_the_others_have_their_word(tmp_path: Path) -> None:
    for name in ("good", "odd"):
        checkpoints.copied(checkpoints.llama(), tmp_path / name)
    config = checkpoints.copied(checkpoints.llama(), tmp_path / "long") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 10**400}))
    header = json.dumps({"a": {"dtype": "ZZ", "data_offsets": [0, 1]}}).encode()
    weights = checkpoints.copied(checkpoints.llama(), tmp_path / "headless") / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    found = Badges(Surprised([tmp_path])).all(ROOMY, budget_s=30)
    assert found == {"good": "fits", "headless": DAMAGED, "long": DAMAGED, "odd": "cannot be read"}
