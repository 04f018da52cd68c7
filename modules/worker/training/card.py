"""The model card of a LoRA that was trained here: how it was made, so that it can be made again."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version

from modules.options import LOAD_OPTIONS, TRAINING_OPTIONS, changed
from modules.training.messages import Trained, TrainOrder
from modules.units import format_bytes, format_seconds
from modules.worker.training.dataset import Lesson

FILE = "README.md"


def card(order: TrainOrder, lesson: Lesson, made: Trained) -> str:
    """README.md, with the metadata that the Hub reads in front. Names no folder of this machine."""
    return "\n".join(
        (
            "---",
            f"base_model: {order.load.name}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags:",
            "- lora",
            "---",
            "",
            f"# {order.name}",
            "",
            f"A LoRA for {order.load.name}, trained with Loadstone on {datetime.now(timezone.utc):%Y-%m-%d}.",
            "",
            *(f"- {line}" for line in _facts(order, lesson, made)),
            "",
            "| option | value |",
            "|---|---|",
            *(f"| {name} | {_shown(getattr(order.options, name))} |" for name in TRAINING_OPTIONS),
            "",
            f"Made with {', '.join(f'{name} {version(name)}' for name in ('peft', 'transformers', 'torch'))}.",
            "",
        )
    )


def _facts(order: TrainOrder, lesson: Lesson, made: Trained) -> list[str]:
    loading = [
        f"{LOAD_OPTIONS[name].flag} {_shown(value)}"
        for name, value in changed(order.load.options).items()
        if name != "model" and not LOAD_OPTIONS[name].local_only
    ]
    facts = [
        f"Learned from {order.data.name} ({order.data.data_format}): {len(lesson.train)} examples, "
        f"{lesson.tokens:,} tokens an epoch, of which {lesson.learned_tokens:,} carry loss",
        f"Measured on {len(lesson.evaluation)} examples that were kept aside",
        f"{made.steps} steps were made; the LoRA is that of step {made.step}",
        f"Loss at the end: {made.loss:.4f}",
        f"Took {format_seconds(made.seconds)} at {made.tokens_per_second:,.0f} tokens/s, and "
        f"{format_bytes(made.peak_bytes)} of memory at most",
        f"The model was loaded with {', '.join(loading) or 'its defaults'}",
    ]
    if made.evaluation_loss is not None:
        facts.insert(4, f"Loss of that step on the examples kept aside: {made.evaluation_loss:.4f}")
    return facts


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "all linear"
    return str(value)
