"""The garbage collector: spared what stays, at work on all else."""

from __future__ import annotations

import gc
import weakref

import pytest

from modules import collector


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_within_and_what_is_made_later_is() -> None:
    gc.unfreeze()
    with collector.spared():
        assert not gc.isenabled()
        kept = [Ring() for _ in range(10)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None
    gc.unfreeze()


def test_blocks_may_stand_within_one_another_and_fail() -> None:
    with collector.spared():
        with pytest.raises(ValueError, match="x"), collector.spared():
            raise ValueError("x")
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()
