"""The file of measurements: kept over restarts, one a model and kind, never an obstacle."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

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
