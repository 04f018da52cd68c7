"""What is said of a plan in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules.devices import Gpu, Machine
from modules.library import Library
from modules.options import LoadOptions
from modules.protocol import LoadReport, Memory
from modules.service.fit import Fit, fit_of
from modules.supervisor import Loaded
from tests.supervised import order

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
    assert fit(23_000).plan.ctx_tokens == 8192


def test_how_long_a_context_would_fit_is_said_whole(demo_model: Path) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)
    machine = Machine((Gpu(0, "simulated", "0", 24 * GIB, 20 * GIB),), 64 * GIB, 60 * GIB, 500 * GIB)
    assert fit_of(facts, LoadOptions(), 2048, machine, ()).verdict == (
        "Fits. A context of up to 8,192 tokens would fit too."
    )
    stretched = fit_of(facts, LoadOptions(alpha_value=2.5), 2048, machine, ())
    assert stretched.verdict == "Fits. A context of up to 16,384 tokens would fit too."


def loaded(name: str, gpu_mib: int) -> Loaded:
    report = LoadReport("Llama", 0, 0, {}, "bfloat16", {}, {}, 2048, "", True, True, "sdpa", {}, 1.0)
    return Loaded(order(name), report, 0.0, Memory(2**30, 2**30, gpu_bytes=(gpu_mib * 2**20,)), None, None)


def test_what_ends_anyway_ends_first_where_the_new_model_would_lie_in_ram_beside_it(demo_model: Path) -> None:
    facts = Library([demo_model.parent]).facts(demo_model.name)

    def fit(free_mib: int, *others: Loaded, replaces: bool, **options: Any) -> Fit:
        machine = Machine((Gpu(0, "simulated", "0", 24 * GIB, free_mib * 2**20),), 64 * GIB, 60 * GIB, 500 * GIB)
        return fit_of(facts, LoadOptions(**options), 8192, machine, others, replaces=replaces)

    other = loaded("other", 20_000)
    replaced = fit(1100, other, replaces=True)
    assert (replaced.beside, replaced.ends, replaced.plan.away_bytes) == (False, ("other",), 0)
    kept = fit(1100, other, replaces=False)
    assert (kept.beside, kept.ends, kept.spared_by) == (True, (), "other")
    assert kept.plan.away_bytes > 0
    assert "With other unloaded, less of it would." in kept.verdict
    assert fit(5000, other, replaces=True).beside  # both fit
    assert fit(5000, other, replaces=True, gpu_memory=(1,)).beside  # it would not help: the cap stays
