"""The training options: every row of the table that says how a LoRA is trained. They are keys of a file, not flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from modules.options.circumstances import Circumstances
from modules.options.spec import Spec, option, parse_values, specs

TRAINING_GROUPS: Mapping[str, str] = {
    "lora": "The LoRA",
    "learning": "Learning",
    "data": "Data",
    "thrift": "Memory",
}


def _by_epochs(c: Circumstances) -> str:
    return "The steps are given (max_steps)." if c.on("max_steps") else ""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train one LoRA. Values are validated one by one by their Spec, and need nothing of each other."""

    rank: int = option(
        "integer", 16, "Rank", "How much the LoRA can learn: the size of its matrices. 4 to 64 is usual.",
        group="lora", low=1, high=1024, step=1, basic=True, effect="LoraConfig(r)",
    )  # fmt: skip
    alpha: float = option(
        "number", 0.0, "Alpha", "How strongly the LoRA acts: it is multiplied by alpha / rank.",
        group="lora", low=0, step=1, default_help="twice the rank", effect="LoraConfig(lora_alpha)",
    )  # fmt: skip
    dropout: float = option(
        "number", 0.0, "Dropout", "Leave out this share of the inputs while training, against learning by heart.",
        group="lora", low=0, high=0.9, step=0.05, effect="LoraConfig(lora_dropout)",
    )  # fmt: skip
    target_modules: tuple[str, ...] = option(
        "names", (), "Modules", "The modules that get a LoRA, by the last part of their names: q_proj v_proj.",
        group="lora", default_help="all linear layers but the output", effect="LoraConfig(target_modules)",
    )  # fmt: skip
    rslora: bool = option(
        "flag", False, "rsLoRA", "Multiply by alpha / √rank instead: steadier at high ranks.",
        group="lora", effect="LoraConfig(use_rslora=True)",
    )  # fmt: skip
    dora: bool = option(
        "flag", False, "DoRA", "Learn direction and size of each weight apart: often better, and slower.",
        group="lora", effect="LoraConfig(use_dora=True)",
    )  # fmt: skip
    learning_rate: float = option(
        "number", 2e-4, "Learning rate", "How large a step is. Higher learns faster, and falls apart sooner.",
        group="learning", low=0, high=1, above_low=True, basic=True, effect="AdamW(lr)",
    )  # fmt: skip
    schedule: str = option(
        "choice", "linear", "Schedule", "How the learning rate goes down to 0 until the end; constant: it does not.",
        group="learning", choices=("linear", "cosine", "constant"), effect="lr_scheduler_type",
    )  # fmt: skip
    warmup: float = option(
        "number", 0.03, "Warm-up", "The share of the steps in which the learning rate rises from 0.",
        group="learning", low=0, high=1, step=0.01, effect="warmup_steps",
    )  # fmt: skip
    epochs: float = option(
        "number", 3.0, "Epochs", "How many times to go through the data.",
        group="learning", low=0, high=1000, above_low=True, step=0.5, basic=True, applies=_by_epochs,
        effect="num_train_epochs",
    )  # fmt: skip
    max_steps: int = option(
        "integer", 0, "Steps", "Train for so many steps instead, however much data there is.",
        group="learning", low=0, high=10_000_000, step=1, default_help="by epochs", effect="max_steps",
    )  # fmt: skip
    batch_size: int = option(
        "integer", 4, "Batch", "How many examples the model sees at once: more is faster, and takes more memory.",
        group="learning", low=1, high=4096, step=1, basic=True, effect="per_device_train_batch_size",
    )  # fmt: skip
    accumulation: int = option(
        "integer", 1, "Accumulation", "How many batches make one step: larger steps without more memory.",
        group="learning", low=1, high=4096, step=1, effect="gradient_accumulation_steps",
    )  # fmt: skip
    seed: int = option(
        "integer", 0, "Seed", "The same seed gives the same order of the data and the same start.",
        group="learning", low=0, high=2**32 - 1, step=1, effect="set_seed",
    )  # fmt: skip
    cutoff: int = option(
        "integer", 1024, "Cut-off", "The most tokens of one example; what is longer is cut, and what is cut teaches "
        "nothing.",
        group="data", unit="tokens", low=8, high=1_000_000, step=64, basic=True, effect="the length of the examples",
    )  # fmt: skip
    packing: bool = option(
        "flag", False, "Packing", "Put short examples together until they fill the cut-off length, without letting "
        "them see each other: faster where many are short.",
        group="data", effect="the examples of a batch",
    )  # fmt: skip
    evaluation_share: float = option(
        "number", 0.1, "Evaluation share", "Keep this share of the examples aside to measure on; the best LoRA by that "
        "measure is the one that is kept. 0 trains on all.",
        group="data", low=0, high=0.5, step=0.05, basic=True, effect="eval_dataset",
    )  # fmt: skip
    checkpoint_steps: int = option(
        "integer", 0, "Checkpoint", "Write down after so many steps how far it is, so that a crash costs no more, and "
        "evaluate.",
        group="data", unit="steps", low=0, step=1, default_help="a tenth of the training", effect="save_steps",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        "flag", False, "Gradient checkpointing", "Compute parts of the model twice instead of keeping them: much less "
        "memory, about a third slower.",
        group="thrift", effect="gradient_checkpointing",
    )  # fmt: skip


# Named in messages as files name them: there are no flags of these.
TRAINING_OPTIONS: Mapping[str, Spec] = {name: replace(spec, flag=name) for name, spec in specs(TrainingOptions).items()}


DataFormat = Literal["auto", "text", "chat", "pairs"]
DATA_FORMATS: tuple[DataFormat, ...] = ("auto", "text", "chat", "pairs")


@dataclass(frozen=True)
class TrainingFile:
    """What a training's file says beside the training and loader options, which it may hold too."""

    name: str = option("text", "", "Name", "What the LoRA is called, under loras/.", group="file", flag="name")
    data: str = option(
        "text", "", "Data", "The file to learn from; a path that is not absolute begins where this file lies.",
        group="file", flag="data",
    )  # fmt: skip
    hub: str = option(
        "text", "", "Data set", "A data set on the Hub instead: USER/NAME, USER/NAME:SPLIT or USER/NAME/CONFIG:SPLIT.",
        group="file", flag="hub",
    )  # fmt: skip
    data_format: str = option(
        "choice", "auto", "Format", "Plain text, conversations, or pairs of prompt and completion; auto looks.",
        group="file", flag="data_format", choices=DATA_FORMATS,
    )  # fmt: skip


TRAINING_FILE = specs(TrainingFile)


def training_options(values: Mapping[str, Any]) -> TrainingOptions:
    """The options that these values give over the defaults. Raises OptionError for an unknown name or a bad value."""
    return TrainingOptions(**parse_values(TRAINING_OPTIONS, values))


def training_reasons(options: TrainingOptions) -> dict[str, str]:
    """Why options have no effect beside the others, by name; only those."""
    circumstances = Circumstances(values={name: getattr(options, name) for name in TRAINING_OPTIONS})
    reasons = {name: spec.applies(circumstances) for name, spec in TRAINING_OPTIONS.items()}
    return {name: reason for name, reason in reasons.items() if reason}
