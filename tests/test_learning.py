"""Plans that learn from real loads: what one model taught is used for another, and told on the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules import devices
from modules.measurements import Measurements
from modules.planner import DEFAULT
from modules.planner.learning import device_of
from modules.protocol import Expected, LoadReport, Memory
from modules.service import Service
from modules.service.learned import FILE, Learned
from modules.supervisor import Loaded
from modules.ui import cards
from tests import checkpoints
from tests.conftest import wait_until
from tests.services import MACHINE, learning_service, measured_load, measured_loads
from tests.supervised import order

VALUES = {"bf16": True, "ctx_size": 1024}


@pytest.fixture(scope="module")
def service(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with learning_service(two_models(tmp_path_factory.mktemp("home"), demo_model)) as made:
        yield made


def two_models(home: Path, demo_model: Path) -> Path:
    """A models/ with a model to learn from and the one that is planned then."""
    models = home / "models"
    models.mkdir()
    (models / "small").symlink_to(checkpoints.small_llama(), target_is_directory=True)
    (models / "demo").symlink_to(demo_model, target_is_directory=True)
    return models


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


GPU = devices.Gpu(0, "simulated", "0", 24 * 2**30, 20 * 2**30)


@pytest.mark.parametrize(
    ("holders", "beside"),
    [
        ((devices.Holder(7, "python", 3300 * 2**20), devices.Holder(8, "game", 2**30)), 300 * 2**20),
        ((), DEFAULT.gpu_fixed_bytes),  # the driver says nothing of processes, as under Windows
        ((devices.Holder(7, "python", 0),), DEFAULT.gpu_fixed_bytes),  # or nothing of their memory
        ((devices.Holder(70, "", 3300 * 2**20),), DEFAULT.gpu_fixed_bytes),  # or numbers them otherwise: a container
        ((devices.Holder(7, "python", 2000 * 2**20),), DEFAULT.gpu_fixed_bytes),  # or less than torch itself
    ],
    ids=str,
)
def test_what_a_gpu_holds_beside_torchs_memory_is_the_drivers_word(
    holders: tuple[devices.Holder, ...], beside: int, tmp_path: Path
) -> None:
    machine = replace(MACHINE, gpus=(replace(GPU, holders=holders),))
    wanted = replace(order("model"), expected=(Expected("bfloat16 on GPU: GPU", 2**30, 2**30, 0, 0),))
    report = LoadReport("Llama", 0, 0, {}, "bfloat16", {}, {}, 2048, "", True, True, "sdpa", {}, 1.0)
    held = Memory(2**30, 2**30, gpu_bytes=(3000 * 2**20,), gpu_peak_bytes=(3500 * 2**20,), pid=7)
    learned = Learned(tmp_path)
    learned.note(Loaded(wanted, report, 0.0, held, None, None), held, 2048, machine)
    [noted] = Measurements(tmp_path / FILE).all()
    assert noted.measured_bytes == 3500 * 2**20 + beside


def kinds(service: Service, values: dict[str, Any]) -> tuple[str, str]:
    """Of a load of the small model: the kind that was told, and the one under which it was noted."""
    service.load("small", values)
    loaded = service.supervisor.wait_loaded(300).loaded
    assert loaded is not None, service.snapshot().error
    before = noted(service)
    for _ in service.generate({"max_new_tokens": 2, "temperature": 0}, prompt="word " * 60):
        pass
    wait_until(lambda: noted(service) != before)
    service.unload()
    [(kind, _)] = noted(service) - before
    return loaded.order.expected[0].kind, kind


def noted(service: Service) -> set[tuple[str, float]]:
    file = service.library.roots[0] / ".cache" / FILE
    return {(one.kind, one.time) for one in Measurements(file).all()}


def test_a_load_is_noted_by_whether_a_copy_was_read(demo_model: Path, tmp_path: Path) -> None:
    values = {"load_in_4bit": True, "ctx_size": 256}
    with learning_service(two_models(tmp_path, demo_model)) as service:
        quantized = kinds(service, values)
        copied = kinds(service, values)
        [copy] = service.quantized_copies()
        (copy.path / "model.safetensors").write_bytes(b"damaged")  # which shows only when it is opened
        surprised = kinds(service, values)
        cache = copy.path.parent.parent
        view, learned = service.view("small", values), Learned(cache, quantized_cache=False)
    assert quantized[0] == quantized[1] == surprised[1]
    assert copied[0] == copied[1] == surprised[0] == quantized[0].replace(" on RAM", " from a copy on RAM")
    assert view.fit is not None
    assert [one.kind for one in learned.expected(view.fit.plan, view.options, DEFAULT)] == [quantized[0]]


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


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("how", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}, {"gpu_memory": (0.2,)}], ids=str)
def test_a_gpus_peak_is_planned_and_its_cap_kept(how: dict[str, Any], demo_model: Path, tmp_path: Path) -> None:
    """The last one leaves layers in RAM."""
    models = two_models(tmp_path, demo_model)
    values = {**how, "ctx_size": 1024}
    with learning_service(models, lambda: devices.measure(models)) as service:
        measured_loads(service, "small", values)
        measured, loaded = measured_loads(service, "demo", values)
    by_device = {device_of(one.kind): one for one in measured}
    assert {"GPU", "RAM"} == set(by_device)
    assert all(abs(one.error) < 0.05 for one in measured), measured
    if cap := how.get("gpu_memory"):
        assert by_device["GPU"].measured_bytes <= cap[0] * 2**30
        assert loaded.report.device_bytes["cpu"] > 0
