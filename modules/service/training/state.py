"""What others see of trainings: how the one that runs stands, which ones are unfinished, what one would take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from modules.errors import LoadstoneError
from modules.options import DataFormat
from modules.protocol import Progress
from modules.training.messages import Trained, TrainEvaluation, TrainOrder, TrainStarted, TrainStep

_MOST_POINTS = 600  # of a curve: more can neither be seen nor sent to every page often


class Phase(str, Enum):
    """How the training that runs, or the last one, stands."""

    NONE = "none"  # there was none
    STARTING = "starting"  # the loaded model ends, where it must; the process starts and loads the model
    TRAINING = "training"
    ENDING = "ending"  # a pause, stop or cancel was asked for, or the result is being written
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


RUNNING = frozenset({Phase.STARTING, Phase.TRAINING, Phase.ENDING})


@dataclass(frozen=True)
class Data:
    """What to learn from: one of a path on this machine, a text that was pasted or uploaded, a data set on the Hub.

    ``hub``: ``USER/NAME``, ``USER/NAME:SPLIT`` or ``USER/NAME/CONFIG:SPLIT``; the split is ``train`` otherwise.
    """

    path: str = ""
    text: str = ""
    hub: str = ""
    data_format: DataFormat = "auto"


@dataclass(frozen=True)
class TrainState:
    """``order`` None: there was none. ``steps`` is the curve, thinned where it is long; the last point is the newest.

    ``ends_first``: the model that was unloaded for the time; it is loaded again afterwards.
    """

    version: int = 0  # grows with every change
    phase: Phase = Phase.NONE
    order: TrainOrder | None = None
    progress: Progress | None = None  # of starting and ending
    started: TrainStarted | None = None
    steps: tuple[TrainStep, ...] = ()
    evaluations: tuple[TrainEvaluation, ...] = ()
    trained: Trained | None = None
    error: LoadstoneError | None = None
    ends_first: str = ""
    notes: tuple[str, ...] = ()

    @property
    def running(self) -> bool:
        return self.phase in RUNNING

    @property
    def name(self) -> str:
        return self.order.name if self.order else ""

    @property
    def last(self) -> TrainStep | None:
        return self.steps[-1] if self.steps else None

    @property
    def total_steps(self) -> int:
        return self.started.total_steps if self.started else 0

    def with_step(self, step: TrainStep) -> TrainState:
        """With one point more. Every second old one goes where there are too many."""
        kept = self.steps if len(self.steps) < _MOST_POINTS else self.steps[::2]
        return replace(self, steps=(*kept, step))


@dataclass(frozen=True)
class Run:
    """A training that is not finished and can go on: paused, or ended by a crash of its process or of the server."""

    name: str
    order: TrainOrder
    step: int  # of the last checkpoint; 0: there is none yet, and it would begin anew
    total_steps: int  # 0: not known yet
    changed: float  # of the last checkpoint or of the start, in seconds since the epoch


@dataclass(frozen=True)
class Estimate:
    """What a training would take beside everything that runs now. All in bytes; ``seconds`` None: not known.

    ``beside``: the loaded model stays and answers meanwhile. ``ends_first``: the name of the loaded model, where it
    has to be unloaded for the time, which wants the user's yes.
    """

    fits: bool
    total_bytes: int
    free_bytes: int  # on the device that matters, with ``ends_first`` gone
    on: str  # that device: "GPU 0", "RAM"
    parts: dict[str, int] = field(default_factory=dict)  # in words: "model", "LoRA and optimizer", "activations", …
    beside: bool = True
    ends_first: str = ""
    parameters: int = 0  # that are trained
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()  # what would make it fit
