"""How many answers may be waited for, by everybody and by one."""

from __future__ import annotations

import contextlib

import pytest

from modules.api.openai.running import MOST_ANSWERS, Lane
from modules.errors import OptionError, Overloaded


def test_a_lane_has_its_places_and_no_more() -> None:
    lane = Lane(4)
    lane.enter("a", 2)
    with pytest.raises(OptionError, match="n: 3 answers are asked for, and no more than 2"):  # not to be tried again
        lane.enter("b", 3)
    lane.enter("b", 1)
    lane.enter("c", 1)
    with pytest.raises(Overloaded, match="4 answers are waited for, and no more than 4"):
        lane.enter("d", 1)
    lane.leave("a")
    lane.enter("d", 1)


def test_a_user_leaves_as_many_places_as_it_takes() -> None:
    lane = Lane(8)
    for _ in range(4):
        lane.enter("greedy", 1)
    with pytest.raises(Overloaded, match="You wait for 4 answers, and no more than 4 may be yours") as error:
        lane.enter("greedy", 1)
    assert error.value.retry_after_s
    lane.enter("modest", 2)
    with pytest.raises(Overloaded, match="no more than 2 may be yours"):
        lane.enter("modest", 1)
    for _ in range(4):
        lane.leave("greedy")
    lane.enter("modest", 1)  # of what is free again
    lane.enter("greedy", 2)


def test_many_who_take_all_they_can_keep_nobody_out() -> None:
    lane, taken = Lane(), 0
    for user in range(6):
        with contextlib.suppress(Overloaded):
            while True:
                lane.enter(f"greedy {user}", 1)
                taken += 1
    assert taken == MOST_ANSWERS - 4
    lane.enter("modest", 1)


def test_the_places_of_those_who_have_gone_are_forgotten() -> None:
    lane = Lane()
    for user in range(1000):
        lane.enter(str(user), 2)
        lane.leave(str(user))
        lane.leave(str(user))
    assert not lane._inside
