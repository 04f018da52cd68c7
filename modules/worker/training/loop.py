"""The training loop: transformers' Trainer, with checkpoints that are whole or not there, and a best LoRA that is kept.

Not TRL's SFTTrainer, whose work around the same Trainer is preparing data: here that is done before, so that what a
person is shown is what the model gets, and bad lines are named. TRL would bring ``datasets`` and pyarrow besides.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modules.errors import TrainingDiverged
from modules.training import runs
from modules.training.messages import TrainEvaluation, TrainOrder, TrainStarted, TrainStep
from modules.worker.training import adapter
from modules.worker.training.control import Control
from modules.worker.training.dataset import IGNORED, Lesson, Rows, Shuffled, collator

_RATE_STEPS = 10  # that tokens per second are measured over
_CHECKPOINTS = 10  # in a training, where nobody says otherwise
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def arguments(order: TrainOrder, lesson: Lesson, *, scales_loss: bool = False) -> TrainingArguments:
    """The Trainer's. Logging at every step costs one number read from the device."""
    options, steps = order.options, lesson.steps(order.options)
    every = options.checkpoint_steps or max(1, math.ceil(steps / _CHECKPOINTS))
    on_cpu = order.load.options.cpu or not torch.cuda.is_available()
    made = TrainingArguments(
        output_dir=order.folder,
        use_cpu=on_cpu,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        warmup_steps=round(options.warmup * steps),
        max_steps=steps,
        seed=options.seed,
        optim="adamw_torch",
        fp16=scales_loss,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every,
        eval_strategy="steps" if lesson.evaluation else "no",
        eval_steps=every if lesson.evaluation else None,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to="none",
    )
    _ = made.device  # decides how many GPUs there are …
    made._n_gpu = min(made._n_gpu, 1)  # … and several would be given a copy of the model each
    return made


class Loop(Trainer):  # type: ignore[misc]
    """Trains ``model``, a PeftModel, and emits how it goes. :meth:`run` is what to call."""

    control: Any

    def __init__(
        self, model: Any, order: TrainOrder, lesson: Lesson, pad: int, asked: Control, emit: Callable[[Any], None]
    ) -> None:
        self.folder = Path(order.folder)
        self.order = order
        self.lesson = lesson
        self.sampler = Shuffled(len(lesson.train), order.options.seed)
        self._aside: Path | None = None
        super().__init__(
            model=model,
            args=arguments(order, lesson, scales_loss=adapter.loses_gradients(model)),
            data_collator=collator(pad, packing=order.options.packing),
            train_dataset=Rows(lesson.train),
            eval_dataset=Rows(lesson.evaluation) if lesson.evaluation else None,
        )
        self.remove_callback(PrinterCallback)
        self.watch = Watch(self, asked, emit)
        self.add_callback(self.watch)

    def run(self) -> None:
        """Train to the end, or to where it was asked to end; from the last checkpoint where there is one."""
        self._forget_half_written()
        last = runs.checkpoints(self.folder)[-1:]
        self.train(resume_from_checkpoint=str(last[0][1]) if last else None)

    # --- the order of the data, and tokens ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        return self.sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.watch.tokens += sum(int(_real(batch).sum()) for batch in batches)
        return batches, items

    # --- devices: the first layers and the last may lie on different GPUs ---

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.model.get_input_embeddings().weight.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs).to(self.args.device)

    # --- measuring ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over the evaluation examples' tokens. The Trainer's own is a mean of batches."""
        self.model.eval()
        total, number = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                batch = self._prepare_inputs(batch)
                count = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(self.model(**batch).loss) * count
                number += count
        metrics = {"eval_loss": total / max(1, number)}
        self.log(dict(metrics))
        self._keep_best(metrics["eval_loss"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def best(self) -> dict[str, Any]:
        """``step`` and ``loss`` of the best LoRA so far; empty where nothing was measured."""
        return runs.read_json(self.folder / runs.BEST / runs.BEST_FILE)

    def _keep_best(self, loss: float) -> None:
        best = loss < self.best.get("loss", math.inf)
        if best:
            written = self.folder / f".{runs.BEST}.new"
            shutil.rmtree(written, ignore_errors=True)
            adapter.write(self.model, written)
            told = json.dumps({"step": self.state.global_step, "loss": loss})
            (written / runs.BEST_FILE).write_text(told, encoding="utf-8")
            runs.put_in_place(written, self.folder / runs.BEST)
        self.watch.emit(TrainEvaluation(self.state.global_step, loss, best))

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._aside = self.folder / ".writing"
        try:
            super()._save_checkpoint(model, trial)
            name = f"{runs.CHECKPOINT}{self.state.global_step}"
            runs.put_in_place(self._aside / name, self.folder / name)
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None
        for step, old in runs.checkpoints(self.folder):
            if step < self.state.global_step:
                shutil.rmtree(old, ignore_errors=True)

    def _forget_half_written(self) -> None:
        for name in (".writing", f".{runs.BEST}.new"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        adapter.write(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter.read(self.model, Path(resume_from_checkpoint))


def _real(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """True where a token stands, and no padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"]
    return torch.ones_like(batch["input_ids"])


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells how the training goes, obeys what is asked of it, and ends one that falls apart."""

    def __init__(self, loop: Loop, control: Control, emit: Callable[[Any], None]) -> None:
        self.loop = loop
        self.emit = emit
        self.tokens = 0  # that went through the model in this process
        self.rate = 0.0  # tokens per second
        self.loss = math.nan
        self._asked = control
        self._began = self._first_step = 0
        self._start = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS + 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        self._recent.append((self._start, 0))
        lesson, trained = self.loop.lesson, adapter.trained(self.loop.model)
        self.emit(
            TrainStarted(
                state.global_step, state.max_steps, len(lesson.train), len(lesson.evaluation), lesson.tokens,
                lesson.learned_tokens, sum(tensor.numel() for tensor in trained.values()), lesson.counts.notes(),
            )
        )  # fmt: skip
        best = self.loop.best.get("step")
        for past in state.log_history:  # of the run that is gone on with
            if "loss" in past:
                self.emit(_step(past, 0.0, 0.0, None))
            elif "eval_loss" in past:
                self.emit(TrainEvaluation(past["step"], past["eval_loss"], past["step"] == best))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loop.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if self._asked.asked == "pause" and not last:
            control.should_save = control.should_training_stop = True
        elif self._asked.asked == "keep":
            control.should_training_stop = last = True
        if last:
            control.should_evaluate = bool(self.loop.lesson.evaluation)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            raise TrainingDiverged(f"The loss at step {state.global_step} is {self.loss}.")
        now = time.monotonic()
        self._recent.append((now, self.tokens))
        (then, tokens), made = self._recent[0], state.global_step - self._first_step
        self.rate = (self.tokens - tokens) / max(1e-9, now - then)
        left = (state.max_steps - state.global_step) * (now - self._start) / max(1, made)
        self.emit(_step({**logs, "step": state.global_step, "epoch": state.epoch}, self.rate, now - self._start, left))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def _step(logs: dict[str, Any], rate: float, seconds: float, eta: float | None) -> TrainStep:
    return TrainStep(
        int(logs["step"]), round(float(logs.get("epoch") or 0), 4), float(logs["loss"]),
        float(logs.get("learning_rate", 0)), round(rate, 1), round(seconds, 2), None if eta is None else round(eta, 1),
    )  # fmt: skip
