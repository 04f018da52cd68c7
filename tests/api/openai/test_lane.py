"""How many answers may be waited for."""

from __future__ import annotations

import pytest

from modules.api.openai.running import Lane
from modules.errors import OptionError, Overloaded


def test_a_lane_has_its_places_and_no_more() -> None:
    lane = Lane(3)
    lane.enter(2)
    with pytest.raises(Overloaded, match="2 answers are waited for, and no more than 3"):
        lane.enter(2)
    with pytest.raises(OptionError, match="n: 4 answers are asked for, and no more than 3"):  # not to be tried again
        lane.enter(4)
    lane.enter(1)
    lane.leave()
    lane.leave()
    lane.enter(2)
