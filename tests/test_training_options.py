"""The table of training options: what is taken, what is refused, what has no effect beside another."""

from __future__ import annotations

from typing import Any

import pytest

from modules.errors import OptionError
from modules.options import TRAINING_GROUPS, TRAINING_OPTIONS, TrainingOptions, training_options, training_reasons


def test_every_option_is_declared_whole() -> None:
    for name, spec in TRAINING_OPTIONS.items():
        assert spec.flag == name, "files name it so"
        assert spec.help.endswith(".")
        assert spec.effect
        assert spec.group in TRAINING_GROUPS
        assert spec.parse(spec.default) == spec.default
        if spec.kind in ("integer", "number"):
            assert spec.low is not None
    assert 5 <= sum(spec.basic for spec in TRAINING_OPTIONS.values()) <= 6


def test_values_lie_over_the_defaults() -> None:
    made = training_options({"rank": "32", "target-modules": "q_proj v_proj", "dora": True})
    assert made == TrainingOptions(rank=32, target_modules=("q_proj", "v_proj"), dora=True)
    assert training_options({}) == TrainingOptions()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"renk": 8}, "Did you mean rank?"),
        ({"rank": 0}, "rank takes a whole number of at least 1"),
        ({"learning_rate": 0}, "learning_rate takes a number above 0"),
        ({"evaluation_share": 0.9}, "up to 0.5"),
        ({"schedule": "linar"}, "Did you mean linear?"),
        ({"epochs": float("nan")}, "epochs takes"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_its_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as error:
        training_options(values)
    assert said in str(error.value)


def test_what_has_no_effect_is_told() -> None:
    assert training_reasons(TrainingOptions()) == {}
    assert list(training_reasons(TrainingOptions(max_steps=10))) == ["epochs"]
