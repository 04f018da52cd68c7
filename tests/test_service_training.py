"""Training as the page and the command line ask for it: real processes on a small model, refusals, going on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules import packages
from modules.devices import Machine
from modules.errors import (
    AdapterNotFound,
    BrokenData,
    Busy,
    Cancelled,
    DiskFull,
    LoadstoneError,
    MissingPackage,
    MustUnload,
    NameTaken,
    NothingLoaded,
    NotTrainable,
    OptionError,
    OutOfMemory,
    WorkerCrashed,
    WorkerKilled,
)
from modules.options import LoadOptions
from modules.protocol import Failed, encode
from modules.service import Service, Stop
from modules.service.training import Data, Phase, TrainState
from modules.service.training import job as training_job
from modules.service.training.job import Room
from modules.service.training.training import bring_back, refuse
from modules.training import runs
from modules.training.messages import TrainOrder
from tests import checkpoints, trainings
from tests.conftest import wait_until
from tests.fleets import fleets
from tests.services import MACHINE, Make, services

QUICK = {"rank": 4, "max_steps": 4, "batch_size": 2, "cutoff": 128, "evaluation_share": 0.2, "learning_rate": 5e-3}
LONG = {**QUICK, "max_steps": 2000, "checkpoint_steps": 5}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    with services(tmp_path_factory.mktemp("home"), checkpoints.llama()) as made:
        yield made


@pytest.fixture(scope="module")
def loaded(make: Make) -> Iterator[Service]:
    """A service with the small model loaded."""
    service = make(("--cpu", "--ctx-size", "256"))
    service.load("demo")
    assert service.supervisor.wait_loaded(120).loaded is not None, service.snapshot().error
    yield service
    service.training.cancel()


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(path=str(trainings.pairs(tmp_path)))


def until(service: Service, condition: Callable[[TrainState], bool], limit_s: float = 120) -> TrainState:
    """The state as soon as ``condition`` holds. Fails where the training is over before."""
    state = service.training.state()
    while not condition(state):
        assert state.running, (state.phase, state.error)
        newer = service.training.wait(state.version, limit_s)
        assert newer.version > state.version, f"nothing new within {limit_s} s"
        state = newer
    return state


def over(service: Service) -> TrainState:
    state = service.training.wait_over(120)
    assert not state.running
    return state


def left(service: Service) -> list[str]:
    """What trainings have left beside the finished LoRAs."""
    cache = service.library.roots[0] / ".cache" / "training"
    return sorted(entry.name for entry in cache.iterdir()) if cache.is_dir() else []


def with_free(service: Service, monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    machine: Machine = replace(MACHINE, ram_free_bytes=free_bytes)
    monkeypatch.setattr(service.training, "_measure", lambda: machine)


# --- before it starts ---


def test_without_a_model_there_is_nothing_to_train(make: Make, data: Data) -> None:
    training = make().training
    for ask in (lambda: training.preview(data, {}), lambda: training.estimate(data, {}),
                lambda: training.start("x", data, {})):  # fmt: skip
        with pytest.raises(NothingLoaded):
            ask()
    assert isinstance(training.problem({}), NothingLoaded)
    assert training.state().phase is Phase.NONE


def test_a_preview_and_an_estimate_of_the_loaded_model(loaded: Service, data: Data) -> None:
    preview = loaded.training.preview(data, QUICK, 2)
    assert (preview.data_format, preview.total, len(preview.examples)) == ("pairs", 12, 2)
    learned = "".join(token.text for token in preview.examples[0].tokens if token.learned)
    assert learned.strip().startswith("the parser reads every argument")
    made = loaded.training.estimate(data, QUICK, preview)
    assert made.fits
    assert made.beside
    assert made.ends_first == ""
    assert made.seconds is not None
    assert made.seconds > 0
    # Seven linear layers in each of two layers: rank × (inputs + outputs).
    assert made.parameters == 4 * 2 * (256 + 192 + 192 + 256 + 384 + 384 + 384)
    assert made.total_bytes == sum(made.parts.values())
    more = loaded.training.estimate(data, {**QUICK, "batch_size": 64}, preview)
    assert more.parts["activations"] > made.parts["activations"]
    assert loaded.training.problem(QUICK) is None
    assert isinstance(loaded.training.problem({"rank": 0}), OptionError)
    assert isinstance(loaded.training.problem({"target_modules": ["nope"]}), OptionError)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"task": "seq2seq"}, "encoder-decoder"),
        ({"quantization": "gptq"}, "kernel"),
        ({"quantization": "awq"}, "awq"),
        ({"device_map": {"model.layers.0": "0", "model.layers.1": "disk"}}, "disk"),
    ],
)
def test_what_cannot_be_trained_is_said_with_what_mends_it(tmp_path: Path, order: dict[str, Any], said: str) -> None:
    with pytest.raises(NotTrainable, match=said) as error:
        refuse(checkpoints.order_for(checkpoints.llama(), tmp_path, **order), None)
    if order.get("quantization") == "gptq":
        assert error.value.fix == {"disable_exllama": True}
        mended = replace(checkpoints.order_for(checkpoints.llama(), tmp_path, **order), options=LoadOptions(
            **error.value.fix))  # fmt: skip
        refuse(mended, None)


# --- training ---


def test_a_lora_is_trained_beside_the_model_that_answers(loaded: Service, data: Data) -> None:
    order = loaded.training.start("pirate", data, QUICK)
    with pytest.raises(Busy):
        loaded.training.start("other", data, QUICK)
    assert [*loaded.generate({"max_new_tokens": 4}, prompt="the")]
    state = over(loaded)
    assert state.phase is Phase.DONE, state.error
    assert state.trained is not None
    assert [step.step for step in state.steps] == [1, 2, 3, 4]
    assert state.evaluations
    assert state.last is not None
    assert state.last.tokens_per_second > 0
    expected = loaded.training.estimate(data, QUICK)
    assert state.started is not None
    assert state.started.trainable_parameters == expected.parameters
    assert state.trained.peak_bytes == pytest.approx(expected.total_bytes, rel=0.25)
    assert (state.name, state.total_steps, state.ends_first) == ("pirate", 4, "")
    assert "pirate" in [lora.name for lora in loaded.loras.all()]
    assert loaded.loras.apply(["pirate"]).adapters[0].name == "pirate"
    loaded.loras.apply([])
    assert left(loaded) == []
    assert loaded.training.runs() == []
    with pytest.raises(NameTaken):
        loaded.training.start("pirate", data, QUICK)
    assert not Path(order.folder).exists()
    assert expected.seconds == pytest.approx(
        state.last.tokens_per_second and _tokens(loaded, data) / state.last.tokens_per_second, rel=0.05
    ), "the next estimate goes by this one's speed"


def _tokens(service: Service, data: Data) -> float:
    preview = service.training.preview(data, QUICK, 0)
    return preview.tokens / preview.counted * 4 * 2


def test_a_paused_training_goes_on_and_a_cancelled_one_leaves_nothing(loaded: Service, data: Data) -> None:
    training = loaded.training
    training.start("slow", data, LONG)
    until(loaded, lambda state: len(state.steps) > 2)
    training.pause()
    state = over(loaded)
    assert state.phase is Phase.PAUSED, state.error
    (run,) = training.runs()
    assert (run.name, run.total_steps) == ("slow", 2000)
    assert run.step >= 3
    with pytest.raises(NameTaken, match="unfinished training"):
        training.start("slow", data, QUICK)
    with pytest.raises(AdapterNotFound):
        training.resume("nothing")

    training.resume("slow")
    state = until(loaded, lambda state: state.started is not None)
    assert state.started is not None
    assert state.started.step == run.step
    assert training.runs() == []  # it runs
    process = training.job._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    state = over(loaded)
    assert isinstance(state.error, WorkerKilled)
    assert [run.name for run in training.runs()] == ["slow"]

    training.resume("slow")
    until(loaded, lambda state: state.phase is Phase.TRAINING)
    training.cancel()
    state = training.state()
    assert state.phase is Phase.CANCELLED
    assert isinstance(state.error, Cancelled)
    assert left(loaded) == []
    assert "slow" not in [lora.name for lora in loaded.loras.all()]
    training.cancel()  # nothing runs


def test_the_model_makes_room_after_a_yes_and_comes_back(
    loaded: Service, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(loaded, monkeypatch, 500 * 2**20)
    estimate = loaded.training.estimate(data, QUICK)
    assert (estimate.fits, estimate.beside, estimate.ends_first) == (True, False, "demo")
    with pytest.raises(MustUnload, match="demo"):
        loaded.training.start("roomy", data, QUICK)
    stop = Stop()
    answer = loaded.generate({"max_new_tokens": 200, "temperature": 0}, prompt="the", stop=stop)
    next(answer)
    with pytest.raises(Busy, match="it is answering"):
        loaded.training.start("roomy", data, QUICK, unload=True)
    stop.set()
    assert list(answer)
    wait_until(lambda: loaded.snapshot().generating == 0)

    loaded.training.start("roomy", data, QUICK, unload=True)
    until(loaded, lambda state: state.started is not None)
    assert loaded.snapshot().loaded is None
    state = over(loaded)
    assert state.phase is Phase.DONE, state.error
    back = loaded.supervisor.wait_loaded(120).loaded
    assert back is not None
    assert back.order.name == "demo"
    with_free(loaded, monkeypatch, 0)
    monkeypatch.setattr("modules.service.training.estimating.without", lambda machine, *_: machine)
    with pytest.raises(OutOfMemory) as error:
        loaded.training.start("huge", data, {**QUICK, "batch_size": 512})
    assert error.value.hint
    assert left(loaded) == []


@pytest.mark.parametrize("name", ["", "  ", "../out", "a/b", ".hidden", "with:weight", "back\\slash"])
def test_a_name_that_cannot_be_a_loras_is_refused(loaded: Service, data: Data, name: str) -> None:
    with pytest.raises(OptionError):
        loaded.training.start(name, data, QUICK)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (Data(), BrokenData),
        (Data(text='{"text": "fine"}\n{"text": 3}'), BrokenData),
        (Data(path="/no/such/file.jsonl"), BrokenData),
        (Data(text="words", data_format="chat"), BrokenData),
    ],
    ids=str,
)
def test_bad_data_starts_nothing(loaded: Service, given: Data, kind: type[LoadstoneError]) -> None:
    with pytest.raises(kind):
        loaded.training.start("never", given, QUICK)
    with pytest.raises(kind):
        loaded.training.preview(given, QUICK)
    assert left(loaded) == []


def test_no_space_and_no_package(loaded: Service, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda feature: ("datasets",))
    with pytest.raises(MissingPackage, match="datasets"):
        loaded.training.start("never", Data(hub="user/name"), QUICK)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(DiskFull):
        loaded.training.start("never", data, QUICK)
    assert left(loaded) == []


def test_a_process_that_ends_without_a_word_is_told_with_its_log(
    loaded: Service, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.stdin.readline(); sys.exit('no room')"
    monkeypatch.setattr(training_job, "COMMAND", (sys.executable, "-c", code))
    loaded.training.start("silent", data, QUICK)
    state = over(loaded)
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, WorkerCrashed)
    assert "no room" in state.error.details
    assert [(run.name, run.step) for run in loaded.training.runs()] == [("silent", 0)]
    loaded.training.discard("silent")
    assert left(loaded) == []


@pytest.fixture
def unfinished(loaded: Service, data: Data, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainOrder]:
    """The order of a training that ended before its first checkpoint."""
    with monkeypatch.context() as patched:
        code = "import sys; sys.stdin.readline(); sys.exit('no room')"
        patched.setattr(training_job, "COMMAND", (sys.executable, "-c", code))
        order = loaded.training.start("taken", data, QUICK)
        over(loaded)
    yield order
    runs.remove(order)


def test_a_training_that_another_process_is_at_is_refused_and_stays(
    loaded: Service, data: Data, unfinished: TrainOrder
) -> None:
    training, before = loaded.training, sorted(Path(unfinished.folder).iterdir())
    with runs.alone(unfinished):
        assert training.runs() == []
        for ask in (lambda: training.resume("taken"), lambda: training.discard("taken"),
                    lambda: training.start("taken", data, QUICK)):  # fmt: skip
            with pytest.raises(Busy, match="Another process is training taken"):
                ask()
        assert not training.state().running
        assert {*before} <= {*Path(unfinished.folder).iterdir()}
    assert [run.name for run in training.runs()] == ["taken"]
    training.discard("taken")
    assert left(loaded) == []


@pytest.mark.parametrize("cancelled", [False, True])
def test_who_comes_second_to_a_training_takes_nothing_from_who_came_first(
    loaded: Service, unfinished: TrainOrder, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """Both found it unfinished at the same moment, and the other one's process took it first."""
    code = f"import modules.worker.train as t; t._LOCK_S = {60 if cancelled else 0.2}; raise SystemExit(t.main())"
    monkeypatch.setattr(training_job, "COMMAND", (sys.executable, "-c", code))
    before, out = {*Path(unfinished.folder).iterdir()}, Path(unfinished.out)
    writing = out.with_name(f".{out.name}.partial")
    with runs.alone(unfinished):
        writing.mkdir()
        loaded.training.job.start(unfinished, Room())
        if cancelled:
            loaded.training.cancel()
        state = over(loaded)
        assert isinstance(state.error, Cancelled if cancelled else Busy)
        assert before <= {*Path(unfinished.folder).iterdir()}
        assert writing.is_dir(), "the LoRA that the other process writes"
    writing.rmdir()


def test_a_training_that_cannot_go_on_is_not_deleted_for_it(
    loaded: Service, unfinished: TrainOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = encode(Failed(DiskFull("There is no space for a checkpoint.")))
    monkeypatch.setattr(training_job, "COMMAND", (sys.executable, "-c", f"print({failed.decode()!r})"))
    loaded.training.resume("taken")
    assert isinstance(over(loaded).error, DiskFull)
    assert [run.name for run in loaded.training.runs()] == ["taken"]


@pytest.mark.parametrize("most", [1, 2])
def test_what_made_room_comes_back_although_its_place_is_gone(most: int) -> None:
    """With several models, another one's end drops the place that was emptied."""
    with fleets(most=most) as ships:
        for name in ("first", "second")[-most:]:
            ships.load(name)
        loaded = ships.fleet.front.snapshot().loaded
        assert loaded is not None
        ships.fleet.front.unload()
        if most > 1:
            ships.fleet.unload("first")
        bring_back(ships.fleet, loaded.order)
        ships.until_names("second")


def test_what_took_the_place_meanwhile_stays() -> None:
    with fleets() as ships:
        ships.load("first")
        loaded = ships.fleet.front.snapshot().loaded
        assert loaded is not None
        ships.fleet.front.unload()
        ships.load("other")
        bring_back(ships.fleet, loaded.order)
        assert ships.names() == ["other"]
