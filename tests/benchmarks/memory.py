"""How well a plan knows what a load will take at most, after loads of other models have taught it.

For every kind of load: a smaller, a deeper and a larger model are loaded and read a prompt of the whole context, then
the demo model, whose peak is compared with what was planned for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from modules.demo import DEMO_MODEL
from modules.planner import DEFAULT
from modules.supervisor import Loaded
from modules.units import format_bytes
from tests import checkpoints
from tests.benchmarks.common import FIXTURES, Row
from tests.services import learning_service, measured_load

CTX_TOKENS = 2048
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp32": {},
    "8-bit, first load": {"load_in_8bit": True},
    "8-bit, repeated": {"load_in_8bit": True},
    "4-bit, first load": {"load_in_4bit": True},
    "4-bit, repeated": {"load_in_4bit": True},
    "bf16 on CPU + disk": {"bf16": True, "disk": True},
}
DISK_SHARE = 0.3  # of the weights


def rows() -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        others = (checkpoints.small_llama(), checkpoints.deep_llama(), checkpoints.large_llama())
        paths = (*others, FIXTURES / "models" / DEMO_MODEL)
        for path in paths:
            (models / path.name).symlink_to(path, target_is_directory=True)
        with learning_service(models) as service:
            for kind, options in KINDS.items():
                for name in (path.name for path in paths):
                    values = {**options, "ctx_size": CTX_TOKENS}
                    if options.get("disk"):
                        values["cpu_memory"] = _room(service, name)
                    one, loaded = measured_load(service, name, values)
                found += [
                    Row(
                        f"peak RAM of the demo model, {kind}: planned, measured",
                        format_bytes(one.corrected_bytes), format_bytes(one.measured_bytes),
                        f"{one.error:+.1%}", "within 5 %",
                    ),
                    _while_loading(kind, loaded),
                ]  # fmt: skip
    return found


def _while_loading(kind: str, loaded: Loaded) -> Row:
    """The most while loading, against what is held at last and what a process takes that has loaded nothing."""
    held = loaded.report.footprint_bytes + DEFAULT.ram_fixed_bytes
    most = loaded.memory_at_load.peak_rss_bytes
    aim = "≤ 1.10 ×" if kind == "bf16" else "stated"
    name = f"peak while loading the demo model, {kind}: against its footprint and the process"
    return Row(name, format_bytes(most), format_bytes(held), f"{most / held:.2f} ×", aim)


def _room(service: Any, name: str) -> float:
    """The cpu_memory in GiB that leaves DISK_SHARE of the weights on disk."""
    plan = service.view(name, {"bf16": True, "ctx_size": CTX_TOKENS}).fit.plan
    (ram,) = (device for device in plan.devices if device.key == "cpu")
    kept = ram.kv_cache_bytes + ram.working_bytes + (1 - DISK_SHARE) * ram.weights_bytes
    return float(round(kept / 2**30, 2))
