"""How well a plan knows what a load will take at most, after loads of other models have taught it.

For every kind of load: a smaller, a deeper and a larger model are loaded and read a prompt of the whole context, then
the demo model, whose peak is compared with what was planned for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from modules.demo import DEMO_MODEL
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
                    one = measured_load(service, name, values)
                found.append(
                    Row(
                        f"peak RAM of the demo model, {kind}: planned, measured",
                        format_bytes(one.corrected_bytes), format_bytes(one.measured_bytes),
                        f"{one.error:+.1%}", "within 5 %",
                    )
                )  # fmt: skip
    return found


def _room(service: Any, name: str) -> float:
    """The cpu_memory in GiB that leaves DISK_SHARE of the weights on disk."""
    plan = service.view(name, {"bf16": True, "ctx_size": CTX_TOKENS}).fit.plan
    (ram,) = (device for device in plan.devices if device.key == "cpu")
    kept = ram.kv_cache_bytes + ram.working_bytes + (1 - DISK_SHARE) * ram.weights_bytes
    return float(round(kept / 2**30, 2))
