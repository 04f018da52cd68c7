"""Plans that learn from real loads: what one model taught is used for another, and told on the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.service import Service
from modules.ui import cards
from tests import checkpoints
from tests.conftest import wait_until
from tests.services import MACHINE, learning_service, measured_load

VALUES = {"bf16": True, "ctx_size": 1024}


@pytest.fixture(scope="module")
def service(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = tmp_path_factory.mktemp("home") / "models"
    models.mkdir()
    (models / "small").symlink_to(checkpoints.small_llama(), target_is_directory=True)
    (models / "demo").symlink_to(demo_model, target_is_directory=True)
    with learning_service(models) as made:
        yield made


def test_one_models_load_makes_the_plan_of_another_right(service: Service) -> None:
    first, _ = measured_load(service, "small", VALUES)
    assert first.corrected_bytes == first.planned_bytes  # nothing was known yet
    other, _ = measured_load(service, "demo", VALUES)
    assert other.corrected_bytes != other.planned_bytes
    assert abs(other.error) < 0.05, other
    fit = service.view("demo", VALUES).fit
    assert fit is not None
    assert fit.last == (other,)
    assert "Last time, demo took" in cards.fit_card(service.view("demo", VALUES), MACHINE)


def test_more_of_the_context_is_noted_less_is_not(service: Service) -> None:
    service.load("small", VALUES)
    loaded = service.supervisor.wait_loaded(120).loaded
    assert loaded is not None

    def used() -> int:
        (one,) = service.learned.last(loaded.order.expected, MACHINE)
        return one.used_tokens if one.time >= loaded.since else 0

    for words, noted in ((60, True), (20, False), (200, True)):
        before = used()
        for _ in service.generate({"max_new_tokens": 2, "temperature": 0}, prompt="word " * words):
            pass
        if noted:
            wait_until(lambda before=before: used() > before)  # type: ignore[misc]
    assert used() > 200
    service.unload()
