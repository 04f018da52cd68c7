"""Merging as a job: one at a time, cancelled without a trace, failures with their reason.

Whole merges are made by the commands' and the page's tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modules.errors import Busy, Cancelled, LoadstoneError, WorkerCrashed
from modules.protocol import AdapterChoice, MergeOrder
from modules.service import merging
from modules.service.merging import Merger, MergeState
from tests import checkpoints, lora_files

SHAPES = {"model.layers.*.self_attn.q_proj": (128, 128)}


@pytest.fixture
def order(tmp_path: Path) -> MergeOrder:
    """To merge a LoRA into the small Llama."""
    lora = lora_files.write(tmp_path / "lora", SHAPES)
    choice = AdapterChoice("lora", str(lora), 0.5)
    model = checkpoints.llama()
    return MergeOrder(model.name, str(model), "safetensors", "causal", (choice,), str(tmp_path / "models" / "merged"))


@pytest.fixture
def merger() -> Iterator[Merger]:
    made = Merger()
    yield made
    made.cancel()


def left(order: MergeOrder) -> list[str]:
    """What lies where the merged model was to be."""
    folder = Path(order.out).parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def until_it_works(merger: Merger) -> MergeState:
    """The state as soon as the process has said what it does."""
    state = merger.state()
    while state.running and (state.progress is None or state.progress.stage == "starting"):
        state = merger.wait(state.version, 60)
    return state


def test_a_cancelled_merge_leaves_nothing_and_another_can_begin(merger: Merger, order: MergeOrder) -> None:
    merger.start(order)
    with pytest.raises(Busy):
        merger.start(replace(order, out=f"{order.out}-2"))
    assert until_it_works(merger).running
    merger.cancel()
    state = merger.state()
    assert not state.running
    assert isinstance(state.error, Cancelled)
    assert left(order) == []
    merger.start(order)
    merger.cancel()  # at once, before there is a process
    assert isinstance(merger.state().error, Cancelled)
    assert left(order) == []
    merger.cancel()  # nothing runs


def test_what_the_process_refuses_is_told(merger: Merger, order: MergeOrder) -> None:
    merger.start(replace(order, path=str(Path(order.path).parent / "no-such-model")))
    state = merger.wait_over(120)
    assert isinstance(state.error, LoadstoneError)
    assert state.merged is None
    assert left(order) == []


@pytest.mark.parametrize(
    "code", ["raise SystemExit('no room')", "import sys; sys.stdin.readline(); sys.exit('no room')"]
)
def test_a_process_that_ends_without_a_word_is_told_with_its_log(
    merger: Merger, order: MergeOrder, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "COMMAND", (sys.executable, "-c", code))
    merger.start(order)
    state = merger.wait_over(60)
    assert isinstance(state.error, WorkerCrashed)
    assert "status 1" in state.error.message
    assert "no room" in state.error.details
