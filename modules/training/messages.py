"""The messages of a training, beside those of :mod:`modules.protocol`, which also writes and reads their lines.

``python -m modules.worker.train`` reads one line, a :class:`TrainOrder`, and writes Progress …, then
:class:`TrainStarted`, :class:`TrainStep` … and :class:`TrainEvaluation` …, and at the end one of :class:`Trained`,
:class:`TrainPaused` or Failed. Meanwhile it obeys :class:`TrainCommand` lines. The end of its stdin ends it.

``POST /preview`` asks a worker that holds a model: :class:`PreviewOrder` → ``{"preview": the Preview's line}``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from modules.options import DATA_FORMATS as DATA_FORMATS
from modules.options import DataFormat, TrainingOptions
from modules.protocol import LoadOrder, message

PREVIEW = "/preview"


@dataclass(frozen=True)
class DataFile:
    """Where the examples are: a file of this machine, as :func:`modules.training.data.read` takes it."""

    path: str
    data_format: DataFormat = "auto"
    name: str = ""  # for people: what was uploaded, pasted or downloaded


@message(load=LoadOrder, options=TrainingOptions, data=DataFile)
@dataclass(frozen=True)
class TrainOrder:
    """Everything that is needed to train one LoRA. Paths are absolute.

    ``load`` says which model, and how it is loaded: LoRAs of its own are not applied. ``folder`` is the run's:
    checkpoints go there, and where there are some, the training goes on from the last one. ``whole``: no conversation
    is both learned and measured on; a run that began without it goes on without.
    """

    name: str
    load: LoadOrder
    data: DataFile
    options: TrainingOptions
    out: str  # the LoRA's folder, which appears when it is whole
    folder: str
    notes: tuple[str, ...] = ()
    whole: bool = False


@message()
@dataclass(frozen=True)
class TrainCommand:
    """``pause``: write a checkpoint and end. ``keep``: end as if all steps had been made."""

    action: Literal["pause", "keep"]


@message()
@dataclass(frozen=True)
class TrainStarted:
    """The first step is about to be made. ``step``: how many were made before, when it goes on from a checkpoint."""

    step: int
    total_steps: int
    examples: int  # that are learned, after cutting and packing
    evaluation_examples: int
    tokens: int  # of one epoch
    learned_tokens: int  # of those, the ones that carry loss
    trainable_parameters: int
    notes: tuple[str, ...] = ()


@message()
@dataclass(frozen=True)
class TrainStep:
    """One step was made."""

    step: int
    epoch: float
    loss: float  # mean over the step's tokens that carry loss, in nats
    learning_rate: float
    tokens_per_second: float  # all tokens that went through the model, padding not counted
    seconds: float  # of training so far, this process's alone
    eta_s: float | None = None


@message()
@dataclass(frozen=True)
class TrainEvaluation:
    step: int
    loss: float
    best: bool  # the smallest so far


@message()
@dataclass(frozen=True)
class TrainPaused:
    """The checkpoint is written; the order can be given again."""

    step: int


@message()
@dataclass(frozen=True)
class Trained:
    """The LoRA is there."""

    path: str
    step: int  # whose weights were kept
    steps: int  # that were made
    loss: float  # of training, at the end
    evaluation_loss: float | None
    size_bytes: int
    seconds: float
    peak_bytes: int  # of the process's memory, and of all GPUs where there are some
    tokens_per_second: float
    notes: tuple[str, ...] = ()


@message()
@dataclass(frozen=True)
class PreviewToken:
    """``text`` may be part of a character. ``learned``: it carries loss."""

    text: str
    learned: bool


@message(tokens=PreviewToken)
@dataclass(frozen=True)
class PreviewExample:
    """One example as the model will see it. ``tokens`` end at the cut-off; ``cut`` is how many were cut."""

    line: int  # of the data, counted from 1; 0 where it spans several
    tokens: tuple[PreviewToken, ...]
    cut: int = 0


@message(data=DataFile, options=TrainingOptions)
@dataclass(frozen=True)
class PreviewOrder:
    """Ask the loaded model's tokenizer how the data will look. ``examples``: how many are shown."""

    data: DataFile
    options: TrainingOptions
    examples: int = 5


@message(examples=PreviewExample)
@dataclass(frozen=True)
class Preview:
    """The first examples, and counts over the data (over its first ``counted`` examples where there are many).

    ``steps`` is what the options make of it. ``matmul_flops``: how fast the model's device multiplies, for the
    estimate of time.
    """

    data_format: str  # what "auto" found
    examples: tuple[PreviewExample, ...]
    total: int
    counted: int
    tokens: int  # of those counted, after cutting
    learned_tokens: int
    cut: int  # examples that were cut
    left_out: int  # examples whose whole answer was cut, which are not learned
    longest: int  # tokens, before cutting
    steps: int
    matmul_flops: float = 0.0
    notes: tuple[str, ...] = field(default=())
