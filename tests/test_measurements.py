"""The file of measurements: kept over restarts, one a model and kind, never an obstacle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from modules.measurements import KEPT, Measurements
from modules.planner.learning import Measurement


def one(model: str = "m", kind: str = "k", measured: int = 100, machine: str = "here") -> Measurement:
    return Measurement(model, kind, machine, 110, 105, measured, 7, 1.0)


def test_they_are_there_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "not there yet" / "memory.json"
    first = Measurements(file)
    first.add(one("a"))
    first.add(one("b"))
    assert Measurements(file).all() == first.all() == [one("a"), one("b")]


def test_a_newer_one_of_the_same_load_takes_the_place(tmp_path: Path) -> None:
    known = Measurements(tmp_path / "memory.json")
    for new in (one(measured=1), one(kind="other"), one(machine="other"), one(measured=2)):
        known.add(new)
    assert known.all() == [one(kind="other"), one(machine="other"), one(measured=2)]


def test_the_oldest_are_forgotten(tmp_path: Path) -> None:
    known = Measurements(tmp_path / "memory.json")
    for number in range(KEPT + 3):
        known.add(one(str(number)))
    assert [m.model for m in known.all()] == [str(number) for number in range(3, KEPT + 3)]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"model": "m"}]', "null", "\x00"])
def test_a_broken_file_is_begun_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "memory.json"
    file.write_text(text)
    known = Measurements(file)
    assert known.all() == []
    known.add(one())
    assert Measurements(file).all() == [one()]


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    known = Measurements(tmp_path / "memory.json")
    threads = [Thread(target=known.add, args=(one(str(number)),)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Measurements(tmp_path / "memory.json").all()) == 20


def test_where_nothing_can_be_written_nothing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = Measurements(tmp_path / "file" / "memory.json")
    known.add(one())
    assert known.all() == [one()]


BAD: tuple[tuple[str, Any], ...] = (
    ("measured_bytes", 0), ("measured_bytes", "100"), ("planned_bytes", None), ("planned_bytes", -5),
    ("corrected_bytes", float("nan")), ("measured_bytes", float("inf")), ("planned_bytes", True),
    ("measured_bytes", 2**70), ("measured_bytes", 1.5), ("used_tokens", -1), ("used_tokens", None), ("model", None),
    ("kind", 3), ("machine", ["here"]), ("time", "now"), ("time", float("nan")), ("time", True), ("more", 1),
)  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=str)
def test_an_item_that_cannot_be_counted_with_is_left_out_and_the_others_stay(
    tmp_path: Path, field: str, value: Any
) -> None:
    file = tmp_path / "memory.json"
    bad = {**asdict(one("bad")), field: value}
    file.write_text(json.dumps([asdict(one("a")), bad, None, asdict(one("b"))]))
    known = Measurements(file)
    assert known.all() == [one("a"), one("b")]
    assert [m.error for m in known.all()] == [pytest.approx(0.05)] * 2
    known.add(one("c"))
    assert Measurements(file).all() == [one("a"), one("b"), one("c")]


def test_what_another_server_adds_is_kept_and_seen(tmp_path: Path) -> None:
    ours, theirs = (Measurements(tmp_path / "memory.json") for _ in range(2))
    assert ours.all() == theirs.all() == []
    ours.add(one("a"))
    theirs.add(one("b"))
    assert ours.all() == theirs.all() == [one("a"), one("b")]
    ours.add(one("c"))
    assert theirs.all() == [one("a"), one("b"), one("c")]


ADDS = """
import sys
from pathlib import Path
from modules.measurements import Measurements
from modules.planner.learning import Measurement
known = Measurements(Path(sys.argv[1]))
known.all()
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    known.add(Measurement(f"{sys.argv[2]} {number}", "k", "here", 110, 105, 100, 7, 1.0))
"""


def test_processes_that_add_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    pipe = subprocess.PIPE
    adding = [
        subprocess.Popen([sys.executable, "-c", ADDS, str(file), name], stdin=pipe, stdout=pipe, text=True)
        for name in "abc"
    ]
    for process in adding:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in adding:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in adding:
        process.communicate()
        assert process.returncode == 0
    assert {m.model for m in Measurements(file).all()} == {f"{name} {number}" for name in "abc" for number in range(40)}


def test_what_could_not_be_written_is_written_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.write_text("a file where the folder should be")
    known = Measurements(folder / "memory.json")
    known.add(one("a"))
    folder.unlink()
    known.add(one("b"))
    assert Measurements(folder / "memory.json").all() == known.all() == [one("a"), one("b")]
