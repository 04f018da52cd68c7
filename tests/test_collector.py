"""The garbage collector: spared what stays, at work on all else."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from modules import collector

ROOT = Path(__file__).resolve().parent.parent


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def collects_what_is_made_later() -> None:
    with collector.spared():
        assert not gc.isenabled()
        kept = [Ring() for _ in range(10)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None


def stands_within_itself_and_fails() -> None:
    with collector.spared():
        with pytest.raises(ValueError, match="x"), collector.spared():
            raise ValueError("x")
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("check", [collects_what_is_made_later, stands_within_itself_and_fails])
def test_in_a_process_of_its_own(check: Callable[[], None]) -> None:
    """In that of the tests it would freeze what other tests have left, and cycles among it for good."""
    name = check.__name__
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import test_collector\ntest_collector.{name}()"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
