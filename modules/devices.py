"""What this machine has: GPUs, RAM and disk; total, free, and who holds the rest. All sizes are bytes."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml

from modules.units import format_bytes

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_CPU = Path("/proc/cpuinfo")
log = logging.getLogger(__name__)
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU. ``name`` is ``""`` where the process is out of sight (a container's)."""

    pid: int
    name: str
    held_bytes: int  # 0 where the driver does not tell

    @property
    def in_words(self) -> str:
        name = self.name or f"process {self.pid}"
        return f"{name} ({format_bytes(self.held_bytes)})" if self.held_bytes else name


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``index`` is its number for a process that starts with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``."""

    index: int
    name: str
    pci: str
    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...] = ()
    capability: tuple[int, int] = (0, 0)  # CUDA's compute capability, (8, 6); (0, 0) = the driver does not tell


@dataclass(frozen=True)
class Machine:
    """``gpus`` in PCI order, those that CUDA_VISIBLE_DEVICES shows. RAM is what this process may have."""

    gpus: tuple[Gpu, ...]
    ram_total_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    cpu_bf16: bool = True  # whether the processor computes in bfloat16 about as quickly as in float32

    @property
    def in_words(self) -> list[tuple[str, str]]:
        """Each device by its name in a plan, and what of it is free."""
        rows = [("RAM", f"{format_bytes(self.ram_free_bytes)} of {format_bytes(self.ram_total_bytes)} free")]
        for gpu in self.gpus:
            free = f"{gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
            held = ", ".join(holder.in_words for holder in gpu.holders)
            rows.append((f"GPU {gpu.index}", f"{free}; held by {held}" if held else free))
        return [*rows, ("disk", f"{format_bytes(self.disk_free_bytes)} free")]

    @property
    def gpu_names(self) -> tuple[str, ...]:
        return tuple(gpu.name for gpu in self.gpus)


def measure(folder: Path) -> Machine:
    """What the machine has now; the disk is the one that ``folder``, which need not exist yet, lies on.

    No driver means no GPUs. Takes about a millisecond, and some more where there are GPUs.
    """
    ram = psutil.virtual_memory()
    limits = list(_cgroup_memory())
    return Machine(
        gpus=_gpus(),
        ram_total_bytes=min([ram.total, *(limit for limit, _ in limits)]),
        ram_free_bytes=max(0, min([ram.available, *(limit - used for limit, used in limits)])),
        disk_free_bytes=_disk_free(folder.absolute()),
        cpu_bf16=cpu_bf16(),
    )


@cache
def cpu_bf16() -> bool:
    """Whether the processor computes in bfloat16 about as quickly as in float32.

    oneDNN, by which torch multiplies, wants AVX-512 for it on x86; without, a product of 1024² takes a hundred times as
    long (torch 2.13). Where the processor does not tell, it is taken to.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = set(_CPU.read_text(encoding="utf-8").split())
    except OSError:  # not Linux
        return True
    return {"avx512bw", "avx512vl", "avx512dq"} <= flags


def _disk_free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


@cache
def torch_has_cuda() -> bool:
    """Whether the torch that is installed computes on NVIDIA's GPUs, by its files: it is not imported here."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if version is None or not version.is_file():
        return True  # nobody knows; the load will tell
    return re.search(r"^cuda\b[^=]*= *None", version.read_text(encoding="utf-8"), re.MULTILINE) is None


def _gpus() -> tuple[Gpu, ...]:
    if not torch_has_cuda():
        return ()
    try:
        # Never shut down again: starting costs tens of milliseconds, and being started already costs none.
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        by_pci = sorted(handles, key=_pci)
        return tuple(_gpu(index, handle) for index, handle in enumerate(_visible(by_pci)))
    except pynvml.NVMLError as error:
        log.debug("no GPUs: %s", error)
        return ()


def _gpu(index: int, handle: Any) -> Gpu:
    total_bytes, free_bytes = _memory(index, handle)
    return Gpu(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        pci=_pci(handle),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        holders=_holders(handle),
        capability=_capability(handle),
    )


def _memory(index: int, handle: Any) -> tuple[int, int]:
    """Total and free. A GPU that has no memory of its own computes in the RAM; one that does not tell is not used.

    It stays among the GPUs in either case: the others' numbers count it.
    """
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        ram = psutil.virtual_memory()
        return ram.total, ram.available
    except pynvml.NVMLError as error:
        log.warning("GPU %d does not tell its memory, and is left out: %s", index, error)
        return 0, 0
    return int(memory.total), int(memory.free)


def _capability(handle: Any) -> tuple[int, int]:
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return 0, 0
    return int(major), int(minor)


def _pci(handle: Any) -> str:
    """The bus's number; of a part of a GPU, that GPU's."""
    try:
        return str(pynvml.nvmlDeviceGetPciInfo(handle).busId)
    except pynvml.NVMLError:
        return str(pynvml.nvmlDeviceGetPciInfo(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)).busId)


def _visible(handles: list[Any]) -> list[Any]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; as CUDA does, ends at the first name it cannot find."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    found: list[Any] = []
    for name in (part.strip() for part in wanted.split(",")):
        match = _named(handles, name)
        if match is None or match in found:
            break
        found.append(match)
    return found


def _named(handles: list[Any], name: str) -> Any | None:
    if name.isdecimal():
        return handles[int(name)] if int(name) < len(handles) else None
    if name.startswith("MIG-"):
        return _part(name)
    if not name.startswith("GPU-"):
        return None
    return next((handle for handle in handles if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(name)), None)


def _part(name: str) -> Any | None:
    """A part of a GPU that its owner has divided (MIG). It must be named whole."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:
        return None


def _holders(handle: Any) -> tuple[Holder, ...]:
    """The processes on a GPU, the largest first. Drivers may not tell (WSL, vGPU): then none."""
    held: dict[int, int] = {}
    for list_processes in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            for process in list_processes(handle):
                held[process.pid] = max(held.get(process.pid, 0), int(process.usedGpuMemory or 0))
        except pynvml.NVMLError:
            continue
    return tuple(Holder(pid, _process_name(pid), size) for pid, size in sorted(held.items(), key=lambda i: -i[1]))


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _cgroup_memory() -> Iterator[tuple[int, int]]:
    """(limit, used) of each memory limit on this process: its own control group's and those of the groups above.

    Files that can be given up (inactive page cache) do not count as used.
    """
    for folder, limit_name, used_name in _cgroup_folders():
        try:
            limit_text = (folder / limit_name).read_text().strip()
            if limit_text == "max" or int(limit_text) >= _NO_LIMIT:
                continue
            used = int((folder / used_name).read_text())
            yield int(limit_text), max(0, used - _inactive_file(folder))
        except (OSError, ValueError):
            continue


def _cgroup_folders() -> Iterator[tuple[Path, str, str]]:
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                yield folder, *names


def _inactive_file(folder: Path) -> int:
    stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines() if " " in line)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
