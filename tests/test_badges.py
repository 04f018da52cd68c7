"""The word on each model of the menu."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modules.devices import Machine
from modules.library import Library
from modules.service.badges import Badges, badge

ROOMY = Machine(gpus=(), ram_total_bytes=64 * 2**30, ram_free_bytes=60 * 2**30, disk_free_bytes=2**40)


@pytest.mark.parametrize(("free_mib", "word"), [(60_000, "fits"), (1450, "fits in 4-bit"), (100, "too large")])
def test_badges_of_the_demo_model(demo_model: Path, free_mib: int, word: str) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    assert badge(facts, replace(ROOMY, ram_free_bytes=free_mib * 2**20)) == word


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
