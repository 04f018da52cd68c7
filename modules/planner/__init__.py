"""How much memory a load will take and where each layer goes, decided before anything is loaded. No ML package."""

from modules.planner.checkpoint import Checkpoint, from_facts, read_checkpoint
from modules.planner.devices import DevicePlan
from modules.planner.memory import DEFAULT, Calibration
from modules.planner.planning import Plan, plan
from modules.planner.suggestions import Suggestion

__all__ = [
    "DEFAULT",
    "Calibration",
    "Checkpoint",
    "DevicePlan",
    "Plan",
    "Suggestion",
    "from_facts",
    "plan",
    "read_checkpoint",
]
