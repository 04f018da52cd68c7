"""What a user can do, once. The page, the API and the command line are thin skins over this."""

from modules.service.fit import Fit
from modules.service.loras import LoraOffer, LoraPlan, entries_of, merged_name
from modules.service.merging import MergeState
from modules.service.service import Service, Source
from modules.service.stopping import Stop
from modules.service.traffic import Traffic
from modules.service.view import View
from modules.service.waking import awake, comes, nothing_loaded

__all__ = [
    "Fit",
    "LoraOffer",
    "LoraPlan",
    "MergeState",
    "Service",
    "Source",
    "Stop",
    "Traffic",
    "View",
    "awake",
    "comes",
    "entries_of",
    "merged_name",
    "nothing_loaded",
]
