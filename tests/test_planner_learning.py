"""What earlier loads teach the plan: interpolated between sizes, kept beyond them, applied to the fixed costs alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.devices import Gpu, Machine, cpu_bf16
from modules.library import Library
from modules.library.scan import Model
from modules.options import LoadOptions
from modules.planner import DEFAULT, Checkpoint, plan, read_checkpoint
from modules.planner.learning import Measurement, calibrated, correction, expected, filed, kind_of
from tests import checkpoints, planner_checkpoints

MIB = 2**20
MACHINE = Machine((), 64 * 2**30, 64 * 2**30, 2**40, cpu_bf16())
OPTIONS = LoadOptions()
SIZES = st.integers(100 * MIB, 100_000 * MIB)


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return read_checkpoint(planner_checkpoints.checkpoint("llama"))


def took(planned: int, measured: int, kind: str = "k", model: str = "m") -> Measurement:
    return Measurement(model, kind, "machine", planned, planned, measured, 100, 0.0)


def test_nothing_measured_changes_nothing(llama: Checkpoint) -> None:
    assert correction([], 500 * MIB) == 0
    planned = plan(llama, OPTIONS, MACHINE, ctx_tokens=1024)
    assert calibrated(planned, [], from_copy=False) == DEFAULT
    assert calibrated(planned, [took(1, 100, "of another kind")], from_copy=False) == DEFAULT


def test_between_two_sizes_it_is_interpolated_beyond_them_kept() -> None:
    known = [took(1000, 1100), took(3000, 3500)]
    assert [correction(known, size) for size in (10, 1000, 2000, 3000, 90_000)] == [100, 100, 300, 500, 500]


def test_of_several_loads_of_one_size_the_median_counts() -> None:
    known = [took(1000, 1100), took(1001, 1050), took(1002, 9000)]
    assert 48 <= correction(known, 1000) <= 100


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=8), SIZES)
def test_never_further_than_any_load_was_off(loads: list[tuple[int, int]], size: int) -> None:
    differences = [measured - planned for planned, measured in loads]
    found = correction([took(*load) for load in loads], size)
    assert min(differences) - 1 <= found <= max(differences) + 1


def test_a_correction_is_put_down_to_the_process_and_weights_stay_counted(llama: Checkpoint) -> None:
    before = plan(llama, OPTIONS, MACHINE, ctx_tokens=1024)
    (ram,) = expected(before, DEFAULT, from_copy=False)
    known = [took(ram.peak_bytes(), ram.peak_bytes() - 50 * MIB, ram.kind)]
    calibration = calibrated(before, known, from_copy=False)
    after = plan(llama, OPTIONS, MACHINE, ctx_tokens=1024, calibration=calibration)
    assert after.peak_bytes == before.peak_bytes - 50 * MIB
    assert after.weights_bytes == before.weights_bytes
    (corrected,) = expected(after, calibration, from_copy=False)
    assert corrected.peak_bytes() - corrected.correction_bytes == ram.peak_bytes()


def test_no_correction_makes_the_process_smaller_than_nothing(llama: Checkpoint) -> None:
    calibration = DEFAULT.corrected(gpu_bytes=0, ram_bytes=-(2**40))
    planned = plan(llama, OPTIONS, MACHINE, ctx_tokens=1024, calibration=calibration)
    assert all(device.fixed_bytes >= 0 for device in planned.devices)
    assert planned.peak_bytes >= planned.weights_bytes


@pytest.mark.parametrize("gpus", [(), (Gpu(0, "simulated", "0", 24 * 2**30, 24 * 2**30),)], ids=["RAM", "GPU"])
def test_what_is_told_to_be_corrected_is_what_was(llama: Checkpoint, gpus: tuple[Gpu, ...]) -> None:
    """Loads that took far less than the fixed costs alone: what was planned without them is told right all the same."""
    machine = replace(MACHINE, gpus=gpus)
    before = plan(llama, OPTIONS, machine, ctx_tokens=1024)
    known = [took(10 * 2**30, 1, one.kind) for one in expected(before, DEFAULT, from_copy=False)]
    calibration = calibrated(before, known, from_copy=False)
    after = plan(llama, OPTIONS, machine, ctx_tokens=1024, calibration=calibration)
    assert all(device.fixed_bytes == 0 for device in after.devices)
    pairs = zip(expected(before, DEFAULT, from_copy=False), expected(after, calibration, from_copy=False), strict=True)
    for plain, corrected in pairs:
        assert corrected.correction_bytes < 0
        assert corrected.peak_bytes() - corrected.correction_bytes == plain.peak_bytes()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_load_teaches_all_of_it_whatever_other_gpus_there_are(llama: Checkpoint, number: int) -> None:
    gpus = tuple(Gpu(at, "simulated", str(at), 24 * 2**30, 24 * 2**30) for at in range(number))
    machine = replace(MACHINE, gpus=gpus)
    before = plan(llama, OPTIONS, machine, ctx_tokens=1024)
    assert before.device_map == {"": "0"}
    gpu = expected(before, DEFAULT, from_copy=False)[0]
    truth = gpu.peak_bytes() + 1000 * MIB
    for _ in range(2):  # and what it was without a correction is told the same each time
        calibration = calibrated(before, [took(gpu.peak_bytes(), truth, gpu.kind)], from_copy=False)
        after = expected(plan(llama, OPTIONS, machine, ctx_tokens=1024, calibration=calibration), calibration,
                         from_copy=False)[0]  # fmt: skip
        assert after.peak_bytes() == truth
        assert after.peak_bytes() - after.correction_bytes == gpu.peak_bytes()


@pytest.mark.parametrize("used", [0.0, 0.25, 1.0])
def test_less_context_used_takes_less(llama: Checkpoint, used: float) -> None:
    (ram,) = expected(plan(llama, OPTIONS, MACHINE, ctx_tokens=4096), DEFAULT, from_copy=False)
    assert ram.peak_bytes(used) == max(ram.loading_bytes, ram.steady_bytes + int(ram.context_bytes * used))


def test_kinds_tell_precision_copy_and_device_apart(llama: Checkpoint) -> None:
    options = [
        OPTIONS, replace(OPTIONS, bf16=True), replace(OPTIONS, load_in_8bit=True), replace(OPTIONS, load_in_4bit=True),
        replace(OPTIONS, load_in_4bit=True, use_double_quant=True),
    ]  # fmt: skip
    plans = [plan(llama, each, MACHINE, ctx_tokens=1024) for each in options]
    kinds = {kind_of(each, "RAM", from_copy=copied) for each in plans for copied in (False, True)}
    assert len(kinds) == 2 * len(options)
    for each in plans:
        plain, copied = (kind_of(each, "RAM", from_copy=copied) for copied in (False, True))
        assert {filed(kind, from_copy=False) for kind in (plain, copied)} == {plain}
        assert {filed(kind, from_copy=True) for kind in (plain, copied)} == {copied}


GPU = Gpu(0, "simulated", "0", 24 * 2**30, 24 * 2**30)


def packed_kinds() -> dict[str, str]:
    """The kind of load on a processor in bfloat16, by what the files hold."""
    folders = {
        "plain": (checkpoints.llama(), "safetensors"), "bin": (checkpoints.pytorch(), "pytorch"),
        "gguf": (checkpoints.gguf_file(), "gguf"), "fp8": (planner_checkpoints.fp8("llama"), "safetensors"),
        "awq": (checkpoints.awq(), "safetensors"),
    }  # fmt: skip
    found = {}
    for name, (path, file_format) in folders.items():
        facts = Library([path.parent]).facts(Model(name, path, path.parent, file_format))  # type: ignore[arg-type]
        found[name] = kind_of(plan(facts, replace(OPTIONS, bf16=True), MACHINE, ctx_tokens=64), "RAM", from_copy=False)
    return found


def test_kinds_tell_apart_what_the_files_hold_and_plain_safetensors_keep_theirs() -> None:
    kinds = packed_kinds()
    dtype = kinds["plain"].split(" ")[0]
    assert kinds["plain"] == f"{dtype} on RAM: RAM"
    assert kinds["bin"] == f"{dtype} of .bin on RAM: RAM"
    assert kinds["gguf"] == f"{dtype} of gguf on RAM: RAM"
    assert kinds["fp8"] == "bfloat16 of unpacked fp8 on RAM: RAM"
    assert kinds["awq"].endswith(" of awq on RAM: RAM")
