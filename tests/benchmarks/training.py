"""Training a LoRA on the demo model: tokens per second against a bare peft + Trainer script, and how fast the page
answers meanwhile.

Both sides learn the same tokens with the same settings, in a process of their own; they take turns. What counts is
the time from the end of the first step to the end of the last: imports, loading and the first step's warming up do
not. The page's answers are timed while a training runs that was started in a browser, which stays open.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from modules.demo import DEMO_MODEL as NAME
from modules.options import TrainingOptions
from modules.service.training.job import Room, TrainJob
from modules.training import runs
from modules.training.messages import DataFile, TrainOrder
from tests.benchmarks.alpha import text
from tests.benchmarks.common import (
    FIXTURES,
    Row,
    bare_script,
    call,
    free_port,
    medians,
    ratio_row,
    server_command,
    started,
)
from tests.browser import chromium_page
from tests.checkpoints import order_for

STEPS, BATCH, CUTOFF, RANK, RATE = 8, 2, 256, 16, 2e-4
_CHARACTERS = STEPS * BATCH * CUTOFF * 8  # more than enough
_WATCHED_S = 20.0

BARE = """
import json, sys, time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
model, data, out, steps, batch, cutoff, rank, rate = sys.argv[1:4] + [float(word) for word in sys.argv[4:]]
steps, batch, cutoff, rank = int(steps), int(batch), int(cutoff), int(rank)
ids = AutoTokenizer.from_pretrained(model)(open(data).read()).input_ids
rows = [ids[at : at + cutoff] for at in range(0, len(ids) - cutoff, cutoff)]
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * cutoff} for row in rows]
torch.manual_seed(0)
adapted = get_peft_model(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
)
class Clock(TrainerCallback):
    ends = []
    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())
arguments = TrainingArguments(
    output_dir=out, use_cpu=True, per_device_train_batch_size=batch, max_steps=steps, learning_rate=rate,
    optim="adamw_torch", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
)
Trainer(model=adapted, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
print(json.dumps({"rate": (steps - 1) * batch * cutoff / (Clock.ends[-1] - Clock.ends[0])}))
"""


def _bare(data: Path, work: Path) -> float:
    """Tokens per second."""
    numbers = map(str, (STEPS, BATCH, CUTOFF, RANK, RATE))
    return bare_script(BARE, str(FIXTURES / "models" / NAME), str(data), str(work / "bare"), *numbers)["rate"]


def _ours(data: Path) -> float:
    """Tokens per second of the process that the page starts."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        load = order_for(FIXTURES / "models" / NAME, work, cpu=True, bf16=True)
        options = TrainingOptions(
            rank=RANK, batch_size=BATCH, cutoff=CUTOFF, learning_rate=RATE, max_steps=STEPS, evaluation_share=0.0,
            checkpoint_steps=10 * STEPS,
        )  # fmt: skip
        order = TrainOrder(
            "measured", load, DataFile(str(data), "text"), options, str(work / "loras" / "measured"), str(work / "run")
        )
        job = TrainJob(lambda _: None)
        job.start(order, Room(), lambda: runs.write_order(work / "run", order))
        state = job.wait_over()
    assert state.trained is not None, state.error
    first, last = state.steps[0], state.steps[-1]
    return (last.step - first.step) * BATCH * CUTOFF / (last.seconds - first.seconds)


def _answers(data: Path) -> list[float]:
    """Seconds that the server took for the page's question, again and again, while it trained."""
    with tempfile.TemporaryDirectory() as home:
        port = free_port()
        with started(server_command(port, "--home", home, "--no-warm-worker"), port):
            call(port, "/v1/internal/model/load", {"model_name": NAME, "args": {"bf16": True, "cpu": True}})
            with chromium_page(f"http://127.0.0.1:{port}") as page:
                page.get_by_role("tab", name="Training").click()
                page.locator("#training-upload input[type=file]").set_input_files(data)
                page.locator("#training-estimate .card").wait_for(timeout=120_000)
                page.locator("#training-name").locator("input, textarea").fill("measured")
                page.locator("#training-start").click()
                page.locator("#training-card .curve").wait_for(timeout=300_000)
                taken, end = [], time.monotonic() + _WATCHED_S
                while time.monotonic() < end:
                    begun = time.perf_counter()
                    call(port, "/v1/internal/model/status")
                    taken.append(time.perf_counter() - begun)
                    page.wait_for_timeout(50)
                page.locator("#training-cancel").click()
                page.locator("#training-cancel-yes").click()
                page.get_by_text("Cancelled: measured").wait_for(timeout=60_000)
    return taken


def rows(runs_each: int = 3) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "reference.txt"
        data.write_text(text()[:_CHARACTERS], encoding="utf-8")
        ours, bare = medians([lambda: _ours(data), lambda: _bare(data, Path(folder))], runs_each)
        taken = _answers(data)
    how = f"rank {RANK}, batch {BATCH} × {CUTOFF} tokens, bf16"
    return [
        ratio_row(f"training a LoRA ({how}) against peft + Trainer", ours, bare, "tokens/s", "≥ 0.97 ×"),
        Row(f"the page's slowest of {len(taken)} answers while it trains (median {statistics.median(taken):.3f} s)",
            f"{max(taken):.3f} s", "–", "–", "≤ 0.2 s"),
    ]  # fmt: skip
