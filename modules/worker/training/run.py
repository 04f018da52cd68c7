"""One training from its order to the LoRA's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modules.errors import DiskFull, NameTaken
from modules.protocol import Progress
from modules.training import data, runs
from modules.training.messages import Trained, TrainOrder, TrainPaused
from modules.units import format_bytes
from modules.worker.process import memory_given_back, memory_of_this_process
from modules.worker.training import adapter, card
from modules.worker.training.control import Control
from modules.worker.training.dataset import Lesson, make_lesson
from modules.worker.training.encoding import encode_all
from modules.worker.training.loop import Loop

Emit = Callable[[Any], None]
_SPARE_BYTES = 16 * 2**20
_WRITTEN = 5  # times the LoRA's own bytes: two checkpoints while one replaces another, with two moments; best; result


def train(order: TrainOrder, control: Control, emit: Emit) -> Trained | TrainPaused:
    """Train, or go on; the LoRA's folder appears when it is whole. Raises errors of the tree and the libraries'."""
    out = Path(order.out)
    if out.exists():
        raise NameTaken(f"There is a LoRA {order.name} already.")
    model, tokenizer = _load(order, emit)
    lesson = _lesson(order, tokenizer, emit)
    emit(Progress("putting the LoRA in"))
    adapted = adapter.wrap(model, order.options, order.load.name)
    _check_disk(order, adapted)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    loop = Loop(adapted, order, lesson, pad, control, emit)
    loop.run()
    if control.asked == "pause" and loop.state.global_step < loop.state.max_steps:
        return TrainPaused(loop.state.global_step)
    emit(Progress("writing the LoRA"))
    return _finish(order, lesson, loop, out)


def _load(order: TrainOrder, emit: Emit) -> tuple[Any, Any]:
    from modules.worker import transformers_loader

    with memory_given_back():
        loaded = transformers_loader.load(order.load, emit)
    return loaded.model, loaded.tokenizer


def _lesson(order: TrainOrder, tokenizer: Any, emit: Emit) -> Lesson:
    found = data.read(order.data)

    def progress(done: int, total: int) -> None:
        emit(Progress("reading the examples", done, total, "examples"))

    examples = encode_all(found, tokenizer, order.options.cutoff, progress)
    return make_lesson(examples, order.options, whole=order.whole)


def _check_disk(order: TrainOrder, model: Any) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.trained(model).values())
    places = ((Path(order.folder), _WRITTEN * 2 * size), (Path(order.out).parent, size))
    for folder, needed in places:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed + _SPARE_BYTES:
            raise DiskFull(
                f"The training writes up to {format_bytes(needed + _SPARE_BYTES)} in {folder}; "
                f"{format_bytes(free)} are free."
            )


def _finish(order: TrainOrder, lesson: Lesson, loop: Loop, out: Path) -> Trained:
    """Write the best LoRA, or the last where nothing was measured, aside, and rename it. Raises NameTaken."""
    started = time.perf_counter()
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    best = loop.best
    try:
        if best:
            shutil.copytree(loop.folder / runs.BEST, aside, ignore=shutil.ignore_patterns(runs.BEST_FILE))
        else:
            adapter.write(loop.model, aside)
        made = Trained(
            path=str(out), step=int(best.get("step", loop.state.global_step)), steps=loop.state.global_step,
            loss=_last_loss(loop), evaluation_loss=best.get("loss"), size_bytes=_size(aside),
            seconds=round(loop.watch.seconds + time.perf_counter() - started, 2), peak_bytes=_peak_bytes(),
            tokens_per_second=round(loop.watch.tokens / max(1e-9, loop.watch.seconds), 1),
        )  # fmt: skip
        (aside / card.FILE).write_text(card.card(order, lesson, made), encoding="utf-8")
        if out.exists():  # it was made meanwhile; renaming would put an empty folder's place to use
            raise NameTaken(f"There is a LoRA {order.name} already.")
        runs.put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return replace(made, size_bytes=_size(out))


def _last_loss(loop: Loop) -> float:
    """The mean of the last few steps, as one step's depends on its examples."""
    losses = [past["loss"] for past in loop.state.log_history if "loss" in past][-5:]
    return sum(losses) / len(losses) if losses else float("nan")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _peak_bytes() -> int:
    """Of the GPUs where they were used, else of the process: a GPU that is there may have had no part in it."""
    gpus = sum(int(torch.cuda.max_memory_reserved(gpu)) for gpu in range(torch.cuda.device_count()))
    return gpus or memory_of_this_process()[1]
