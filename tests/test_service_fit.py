"""What is said of a plan in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules.devices import Gpu, Machine
from modules.library import Library
from modules.options import LoadOptions
from modules.service.fit import Fit, fit_of

GIB = 2**30


def test_what_lies_in_ram_beside_the_gpu_is_said_and_what_does_not_is_not(demo_model: Path) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)

    def fit(free_mib: int, **options: Any) -> Fit:
        gpu = Gpu(0, "simulated", "0", 24 * GIB, free_mib * 2**20)
        return fit_of(facts, LoadOptions(**options), 8192, Machine((gpu,), 64 * GIB, 60 * GIB, 500 * GIB), ())

    tight = fit(1030)
    assert tight.fits
    assert tight.verdict.startswith(f"Fits, with {tight.plan.offloaded}.")
    assert "of 30 layers in RAM: each token takes" in tight.verdict
    for alone in (fit(23_000), fit(1030, load_in_4bit=True), fit(1030, cpu=True)):
        assert alone.verdict.startswith("Fits.")
