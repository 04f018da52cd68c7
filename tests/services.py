"""Real services on a home folder of their own, for the tests of the service, the API and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import flags
from modules.devices import Machine, cpu_bf16
from modules.library import Library
from modules.library.loras import LoraLibrary
from modules.options import ServerOptions
from modules.planner.learning import Measurement
from modules.service import Service
from modules.settings import CodeApprovals, Settings
from modules.supervisor import Loaded, Supervisor
from tests.conftest import wait_until

MACHINE = Machine(
    gpus=(), ram_total_bytes=16 * 2**30, ram_free_bytes=12 * 2**30, disk_free_bytes=2**40, cpu_bf16=cpu_bf16()
)
Make = Callable[..., Service]


class CountedSettings(Settings):
    """Counts how often a model's saved file is read."""

    reads = 0

    def saved(self, model_name: str) -> tuple[dict[str, Any], str]:
        self.reads += 1
        return super().saved(model_name)


class CountedMeasure:
    """The same machine each time; counts how often it is asked for."""

    calls = 0

    def __call__(self) -> Machine:
        self.calls += 1
        return MACHINE


@contextmanager
def services(home: Path, demo_model: Path) -> Iterator[Make]:
    """Makes services whose models/ holds the demo model as ``demo``, and with LoRAs from ``home/loras``. Their
    supervisors are closed afterwards.

    ``make(argv, settings, **saved)``: the command line's words, the text of settings.yaml, and what is saved for
    the demo model.
    """
    models = home / "models"
    models.mkdir()
    (models / "demo").symlink_to(demo_model, target_is_directory=True)
    made: list[Service] = []

    def make(argv: tuple[str, ...] = (), settings: str = "", **saved: Any) -> Service:
        (home / "settings.yaml").write_text(settings)
        parsed = flags.parse(argv)
        assert isinstance(parsed, flags.Parsed)
        kept = CountedSettings(home / "settings.yaml", models)
        if saved:
            kept.save("demo", saved)
        made.append(
            Service(
                Library([models]), kept, CodeApprovals(models / ".cache" / "allowed-code.json"),
                Supervisor(warm_worker=False), CountedMeasure(), cache_dir=models / ".cache",
                flags=parsed.load, generation_flags=parsed.generation, loras=LoraLibrary([home / "loras"]),
                server=ServerOptions(quantized_cache=False),
            )
        )  # fmt: skip
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.supervisor.close()


@contextmanager
def learning_service(models: Path, machine: Callable[[], Machine] | None = None) -> Iterator[Service]:
    """A service whose plans learn from its loads, with real workers and quantized copies under ``models``."""
    service = Service(
        Library([models]), Settings(models.parent / "settings.yaml", models),
        CodeApprovals(models / ".cache" / "allowed-code.json"), Supervisor(warm_worker=False),
        machine or CountedMeasure(),
        cache_dir=models / ".cache",
    )  # fmt: skip
    try:
        yield service
    finally:
        service.supervisor.close()


def measured_load(service: Service, name: str, values: dict[str, Any]) -> tuple[Measurement, Loaded]:
    """As :func:`measured_loads`, where there is no GPU: of RAM alone."""
    (ram,), loaded = measured_loads(service, name, values)
    return ram, loaded


def measured_loads(service: Service, name: str, values: dict[str, Any]) -> tuple[tuple[Measurement, ...], Loaded]:
    """Load, read a prompt that fills the context, unload: what was planned and what it took, GPUs first, then RAM."""
    service.load(name, values)
    loaded = service.supervisor.wait_loaded(300).loaded
    assert loaded is not None, service.snapshot().error
    prompt = "word " * (loaded.order.ctx_tokens - 16)
    for _ in service.generate({"max_new_tokens": 8, "temperature": 0}, prompt=prompt):
        pass
    expected, machine = loaded.order.expected, service.measure()
    wait_until(lambda: any(one.time >= loaded.since for one in service.learned.last(expected, machine)))
    service.unload()
    return service.learned.last(expected, machine), loaded


def coded_model(folder: Path, demo_model: Path, code: str = "x = 1\n") -> None:
    """The demo model as one that brings a file of Python."""
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((demo_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.M"}}))
    (folder / "modeling.py").write_text(code)
