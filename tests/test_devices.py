"""What the machine has. GPUs that are not there are described to NVML's place; the rest is this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from modules import devices

GIB = 2**30


class Driver:
    """Answers NVML's questions about GPUs that are only described: (uuid, name, pci, total, free, processes)."""

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus = gpus

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: self.gpus[handle]["name"],
            "nvmlDeviceGetUUID": lambda handle: self.gpus[handle]["uuid"],
            "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=self.gpus[handle]["pci"]),
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: self.gpus[handle].get("processes", []),
            "nvmlDeviceGetGraphicsRunningProcesses": self._not_supported,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)
        monkeypatch.setattr(devices, "torch_has_cuda", lambda: True)

    def _memory(self, handle: Any) -> Any:
        if (problem := self.gpus[handle].get("problem")) is not None:
            raise pynvml.NVMLError(problem)
        return SimpleNamespace(total=24 * GIB, free=20 * GIB)

    @staticmethod
    def _not_supported(_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


TWO_GPUS = Driver(
    {"name": "Second", "uuid": "GPU-bbbb", "pci": "00000000:81:00.0"},
    {"name": "First", "uuid": "GPU-aaaa", "pci": "00000000:01:00.0"},
)


@pytest.fixture
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_this_machine(tmp_path: Path) -> None:
    machine = devices.measure(tmp_path)
    assert 0 < machine.ram_free_bytes <= machine.ram_total_bytes <= psutil.virtual_memory().total
    assert machine.disk_free_bytes > 0


def test_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert devices.measure(tmp_path / "a" / "b").disk_free_bytes > 0


def test_measuring_is_cheap(tmp_path: Path) -> None:
    devices.measure(tmp_path)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        devices.measure(tmp_path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02  # about 1 ms; the bound leaves room for a busy machine


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert devices.measure(Path.cwd()).gpus == ()


@pytest.mark.usefixtures("_all_visible")
def test_gpus_are_in_pci_order(monkeypatch: pytest.MonkeyPatch) -> None:
    TWO_GPUS.install(monkeypatch)
    machine = devices.measure(Path.cwd())
    assert machine.gpu_names == ("First", "Second")
    assert [gpu.index for gpu in machine.gpus] == [0, 1]
    assert machine.gpus[0].total_bytes == 24 * GIB
    assert machine.gpus[0].free_bytes == 20 * GIB


@pytest.mark.usefixtures("_all_visible")
@pytest.mark.parametrize(
    ("problem", "ram"),
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, SimpleNamespace(total=128 * GIB, available=99 * GIB)),
        (pynvml.NVML_ERROR_GPU_IS_LOST, None),
    ],
)
def test_one_that_does_not_tell_its_memory_does_not_hide_the_others(
    problem: int, ram: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = {**TWO_GPUS.gpus[1], "problem": problem}
    Driver(TWO_GPUS.gpus[0], silent).install(monkeypatch)
    if ram is not None:  # what it computes in, as far as anybody knows
        monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    first, second = devices.measure(Path.cwd()).gpus
    assert (first.name, first.index) == ("First", 0)
    assert (first.total_bytes, first.free_bytes) == ((ram.total, ram.available) if ram else (0, 0))
    assert (second.name, second.index, second.free_bytes) == ("Second", 1, 20 * GIB)


def test_a_part_of_a_gpu_is_found_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    TWO_GPUS.install(monkeypatch)
    parts = {"MIG-aaaa": 1}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: parts[name])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aaaa")
    assert devices.measure(Path.cwd()).gpu_names == ("First",)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0,1", ("First", "Second")),
        ("1", ("Second",)),
        ("1,0", ("Second", "First")),
        ("GPU-b", ("Second",)),
        ("", ()),
        ("-1", ()),
        ("0,7,1", ("First",)),
        ("MIG-1", ()),
    ],
)
def test_cuda_visible_devices(visible: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    TWO_GPUS.install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = devices.measure(Path.cwd())
    assert machine.gpu_names == names
    assert [gpu.index for gpu in machine.gpus] == list(range(len(names)))


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("cuda: Optional[str] = None", False),
        ("cuda = None", False),
        ("cuda: Optional[str] = '13.0'", True),
        ("other = None", True),
    ],
)
def test_whether_torch_computes_on_gpus_is_read_from_its_files(
    line: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"debug = False\n{line}\nhip: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    devices.torch_has_cuda.cache_clear()
    try:
        assert devices.torch_has_cuda() is has
    finally:
        devices.torch_has_cuda.cache_clear()


def test_it_is_what_torch_says_itself() -> None:
    assert devices.torch_has_cuda() is (torch.version.cuda is not None)


@pytest.mark.usefixtures("_all_visible")
def test_gpus_that_torch_cannot_use_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    TWO_GPUS.install(monkeypatch)
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: False)
    assert devices.measure(Path.cwd()).gpus == ()


@pytest.mark.usefixtures("_all_visible")
def test_holders_are_named_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_sight = 2**22 + 1  # above the kernel's largest process id
    processes = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=1 * GIB),
        SimpleNamespace(pid=out_of_sight, usedGpuMemory=3 * GIB),
        SimpleNamespace(pid=out_of_sight + 1, usedGpuMemory=None),
    ]
    Driver({"name": "A", "uuid": "GPU-a", "pci": "1", "processes": processes}).install(monkeypatch)
    assert devices.measure(Path.cwd()).gpus[0].holders == (
        devices.Holder(out_of_sight, "", 3 * GIB),
        devices.Holder(os.getpid(), psutil.Process().name(), 1 * GIB),
        devices.Holder(out_of_sight + 1, "", 0),
    )


def test_what_is_free_is_said_with_who_holds_the_rest() -> None:
    holders = (devices.Holder(7, "game", 3 * GIB), devices.Holder(8, "", GIB), devices.Holder(9, "python", 0))
    gpu = devices.Gpu(1, "A", "1", 24 * GIB, 20 * GIB, holders)
    machine = devices.Machine((gpu,), 64 * GIB, 60 * GIB, 100 * 10**9)
    assert machine.in_words == [
        ("RAM", "60 GiB of 64 GiB free"),
        ("GPU 1", "A, 20 GiB of 24 GiB free; held by game (3 GiB), process 8 (1 GiB), python"),
        ("disk", "93.1 GiB free"),
    ]


def _cgroup(folder: Path, names: tuple[str, str], limit: str, used: int, inactive: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{inactive}\n")


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def test_a_container_limit_counts(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/\n")
    _cgroup(cgroups / "cgroup", V2, str(512 * 2**20), 300 * 2**20, f"inactive_file {100 * 2**20}")
    machine = devices.measure(cgroups)
    assert machine.ram_total_bytes == 512 * 2**20
    assert machine.ram_free_bytes == 312 * 2**20


def test_the_tightest_of_nested_limits_counts(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/user.slice/job\n")
    _cgroup(cgroups / "cgroup/user.slice/job", V2, "max", 2**20, "inactive_file 0")
    _cgroup(cgroups / "cgroup/user.slice", V2, str(64 * 2**20), 2**20, "inactive_file 0")
    assert devices.measure(cgroups).ram_total_bytes == 64 * 2**20


def test_version_1_limits(cgroups: Path) -> None:
    (cgroups / "own").write_text("5:devices:/\n4:cpu,memory:/job\n")
    _cgroup(cgroups / "cgroup/memory/job", V1, str(128 * 2**20), 100 * 2**20, f"total_inactive_file {30 * 2**20}")
    _cgroup(cgroups / "cgroup/memory", V1, str(2**63 - 4096), 2**30, "total_inactive_file 0")
    machine = devices.measure(cgroups)
    assert machine.ram_total_bytes == 128 * 2**20
    assert machine.ram_free_bytes == 58 * 2**20


def test_a_group_over_its_limit_has_nothing_free(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/\n")
    _cgroup(cgroups / "cgroup", V2, str(2**20), 2**21, "inactive_file 0")
    assert devices.measure(cgroups).ram_free_bytes == 0


@pytest.mark.parametrize("text", ["0::/nowhere\n", ""])
def test_no_limits_to_read(text: str, cgroups: Path) -> None:
    (cgroups / "own").write_text(text)
    assert devices.measure(cgroups).ram_total_bytes == psutil.virtual_memory().total


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU here")
def test_a_real_gpu(tmp_path: Path) -> None:
    gpus = devices.measure(tmp_path).gpus
    assert gpus
    for gpu in gpus:
        assert gpu.name
        assert 0 <= gpu.free_bytes <= gpu.total_bytes
        assert gpu.total_bytes > GIB
    assert [gpu.pci for gpu in gpus] == sorted(gpu.pci for gpu in gpus) or "CUDA_VISIBLE_DEVICES" in os.environ


@pytest.mark.parametrize(
    ("machine", "told", "expected"),
    [
        ("x86_64", "flags : fma avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16", True),
        ("AMD64", "flags : fma avx avx2 f16c", False),
        ("x86_64", "flags : fma avx2 avx512f", False),
        ("x86_64", None, True),
        ("aarch64", "Features : fp asimd", True),
    ],
)
def test_whether_the_processor_computes_in_bfloat16(
    machine: str, told: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(devices, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert devices.cpu_bf16.__wrapped__() is expected
