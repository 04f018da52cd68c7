"""Training LoRAs: what a page or a command line may ask for, and how it stands."""

from modules.service.training.state import RUNNING, Data, Estimate, Phase, Run, TrainState
from modules.service.training.training import Training

__all__ = ["RUNNING", "Data", "Estimate", "Phase", "Run", "TrainState", "Training"]
