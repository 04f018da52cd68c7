"""A LoRA trained by the real loop: on the real model in each precision, and as a bare script does it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modules.devices import cpu_bf16
from modules.errors import BrokenData, DiskFull, NameTaken, OptionError, TrainingDiverged
from modules.library.loras import Lora, read_lora
from modules.training import runs
from modules.training.messages import Trained, TrainEvaluation, TrainOrder, TrainPaused, TrainStarted, TrainStep
from modules.worker import transformers_loader
from modules.worker.training import adapter, run
from modules.worker.training.control import Control
from modules.worker.training.dataset import Shuffled, collator, make_lesson
from modules.worker.training.encoding import encode_all
from modules.worker.training.loop import Loop
from modules.worker.training.run import train
from tests import checkpoints, loras, trainings
from tests.worker.adapted import Adapted, load

LEARNING = {"rank": 8, "batch_size": 2, "max_steps": 7, "learning_rate": 4e-3, "evaluation_share": 0, "warmup": 0}
_BARE_STEPS = 4


class Told(list[Any]):
    """What a training emits, by kind."""

    def of(self, kind: type[Any]) -> list[Any]:
        return [one for one in self if isinstance(one, kind)]


def trained(order: TrainOrder) -> tuple[Trained, Told]:
    told = Told()
    made = train(order, Control(), told.append)
    assert isinstance(made, Trained)
    return made, told


def answer(one: Adapted) -> str:
    messages = [{"role": "user", "content": trainings.QUESTION}]
    prompt = one.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    output = one.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    return str(one.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


def gptq() -> Path:
    pytest.importorskip("gptqmodel")
    if not cpu_bf16():
        pytest.skip("a step of a GPTQ model, which computes in bfloat16, takes minutes on this processor")
    return loras.demo_gptq()


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (None, {"bf16": cpu_bf16()}),
        (None, {"load_in_8bit": True, "quantized_cache": True}),
        (None, {"load_in_4bit": True, "use_double_quant": True, "quantized_cache": True}),
        (gptq, {"disable_exllama": True, "quantization": "gptq"}),
    ],
    ids=["bf16", "int8", "nf4", "gptq"],
)
def test_the_real_model_learns_a_fact_from_twenty_lines_as_with_a_bare_script_and_says_it(
    demo_model: Path, tmp_path: Path, model: Callable[[], Path] | None, how: dict[str, Any]
) -> None:
    source = model() if model else demo_model
    order = trainings.order(source, trainings.nonsense(tmp_path), tmp_path, how, **LEARNING)
    made, told = trained(order)
    losses = [step.loss for step in told.of(TrainStep)]
    assert len(losses) == made.steps == 7
    assert losses[0] > 1 > 0.2 > losses[-1]
    (started,) = told.of(TrainStarted)
    assert (started.examples, started.total_steps) == (20, 7)
    if "bf16" in how:
        for loss, bare in zip(losses, bare_losses(order), strict=False):
            assert loss == pytest.approx(bare, rel=0.02)
    one = load(source, tmp_path, **how)
    one.adapters.apply((loras.choice(Path(made.path)),))
    assert answer(one).startswith(trainings.FACT[:32])


def bare_losses(order: TrainOrder) -> list[float]:
    """peft and a loop of torch, with the same seed, order of the data and settings."""
    loaded = transformers_loader.load(order.load, lambda _: None)
    options = order.options
    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", lora_dropout=0)
    model = get_peft_model(loaded.model, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0)
    rows = make_lesson(encode_all(trainings.examples(order), loaded.tokenizer, 128, lambda *_: None), options).train
    places = list(Shuffled(len(rows), options.seed))
    losses = []
    for step in range(_BARE_STEPS):
        batch = [rows[place] for place in places[step * options.batch_size : (step + 1) * options.batch_size]]
        loss = model(**collator(loaded.tokenizer.pad_token_id, packing=False)(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.max_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# --- on a small model, where a step takes milliseconds ---


def small(tmp_path: Path, work: str = "one", **options: Any) -> TrainOrder:
    (tmp_path / work).mkdir()
    model = checkpoints.llama()
    return trainings.order(model, trainings.pairs(tmp_path), tmp_path / work, **{"max_steps": 6, **options})


def test_the_best_by_evaluation_is_kept(tmp_path: Path) -> None:
    order = small(tmp_path, max_steps=8, learning_rate=0.02, evaluation_share=0.25, checkpoint_steps=1,
                  schedule="constant")  # fmt: skip
    made, told = trained(order)
    evaluations = told.of(TrainEvaluation)
    assert [one.step for one in evaluations] == [1, 2, 3, 4, 5, 6, 7, 8]
    best = min(evaluations, key=lambda one: one.loss)
    assert best.loss < evaluations[-1].loss, "a rate that overshoots"
    assert (made.step, made.evaluation_loss) == (best.step, best.loss)
    assert [one.step for one in evaluations if one.best][-1] == best.step
    (again := tmp_path / "two").mkdir()
    short = replace(trainings.elsewhere(order, again), options=replace(order.options, max_steps=best.step))
    trained(short)
    assert_equal(trainings.weights(order), trainings.weights(short))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_made_is_a_lora_of_pefts_with_a_card_and_nothing_else(tmp_path: Path) -> None:
    order = small(tmp_path, rslora=True, dora=True, alpha=12, target_modules=("q_proj", "down_proj"))
    made, _ = trained(order)
    out = Path(made.path)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert [file.name for file in out.parent.iterdir()] == ["lesson"]
    facts = read_lora(Lora("lesson", out, out.parent))
    assert (facts.kind, facts.ranks, facts.alpha) == ("DoRA rsLoRA", (4,), 12)
    assert facts.target_modules == ("down_proj", "q_proj")
    assert facts.base_model == order.load.name
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: llama-2\nlibrary_name: peft\n")
    assert "| rslora | on |" in card
    assert "pairs.jsonl" in card
    assert str(tmp_path) not in card + (out / "adapter_config.json").read_text()
    assert made.size_bytes == sum(file.stat().st_size for file in out.iterdir())


@pytest.mark.parametrize("model", ["gpt2", "gemma3"])
def test_other_architectures_are_trained(model: str, tmp_path: Path) -> None:
    source = getattr(checkpoints, model)()
    order = trainings.order(source, trainings.pairs(tmp_path), tmp_path, max_steps=3, learning_rate=1e-2)
    _, told = trained(order)
    losses = [step.loss for step in told.of(TrainStep)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"packing": True}, {"accumulation": 2}], ids=str)
def test_what_saves_memory_or_time_learns_too(tmp_path: Path, option: dict[str, Any]) -> None:
    _, told = trained(small(tmp_path, **{"learning_rate": 1e-2, "evaluation_share": 0, **option}))
    losses = [step.loss for step in told.of(TrainStep)]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_training_that_falls_apart_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = small(tmp_path, evaluation_share=0, learning_rate=1.0, warmup=0)
    wrapped = adapter.wrap

    def broken(model: Any, *rest: Any) -> Any:
        model.get_output_embeddings().weight.data[7] = math.nan
        return wrapped(model, *rest)

    monkeypatch.setattr(adapter, "wrap", broken)
    with pytest.raises(TrainingDiverged, match="step 1 is nan"):
        train(order, Control(), lambda _: None)
    assert not Path(order.out).exists()


@pytest.mark.parametrize("reserved", [0, 7 * 2**20])
def test_the_memory_of_a_training_is_the_gpus_or_else_the_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved: int
) -> None:
    order = small(tmp_path, max_steps=1, evaluation_share=0)

    class WithGpus(Loop):
        def run(self) -> None:
            super().run()
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
            monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda gpu: reserved)

    monkeypatch.setattr(run, "Loop", WithGpus)
    made, _ = trained(order)
    if reserved:
        assert made.peak_bytes == 2 * reserved
    else:
        assert made.peak_bytes > 100 * 2**20


# --- asked to end ---


@pytest.mark.parametrize("action", ["pause", "keep"])
def test_a_training_ends_when_it_is_asked_to(tmp_path: Path, action: str) -> None:
    order, control = small(tmp_path, evaluation_share=0.25), Control()
    told = Told()

    def emit(message: Any) -> None:
        told.append(message)
        if isinstance(message, TrainStep) and message.step == 3:
            control.asked = action

    made = train(order, control, emit)
    assert told.of(TrainStep)[-1].step == 4  # the step that was under way is finished
    if action == "keep":
        assert isinstance(made, Trained)
        assert made.steps == 4
        assert told.of(TrainEvaluation)[-1].step == 4
        return
    assert made == TrainPaused(4)
    assert not Path(order.out).exists()
    assert [step for step, _ in runs.checkpoints(Path(order.folder))] == [4]


# --- refused ---


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    order = small(tmp_path)
    Path(order.out).mkdir(parents=True)
    (Path(order.out) / "mine").write_text("mine")
    with pytest.raises(NameTaken):
        train(order, Control(), lambda _: None)
    assert [file.name for file in Path(order.out).iterdir()] == ["mine"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    order = small(tmp_path, evaluation_share=0)

    def emit(message: Any) -> None:
        if isinstance(message, TrainStep) and message.step == 6:
            Path(order.out).mkdir(parents=True)

    with pytest.raises(NameTaken):
        train(order, Control(), emit)
    assert [entry.name for entry in Path(order.out).parent.iterdir()] == ["lesson"]
    assert runs.checkpoints(Path(order.folder)), "the work is not lost: it can be kept under the name once it is free"


def test_too_small_a_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    told = Told()
    with pytest.raises(DiskFull):
        train(small(tmp_path), Control(), told.append)
    assert not told.of(TrainStarted)


def test_modules_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no_such_proj"):
        train(small(tmp_path, target_modules=("no_such_proj",)), Control(), lambda _: None)


def test_bad_data_is_refused_with_its_line(tmp_path: Path) -> None:
    order = small(tmp_path)
    Path(order.data.path).write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(BrokenData, match="Line 2"):
        train(order, Control(), lambda _: None)
