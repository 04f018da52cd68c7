"""What the Training tab is made of: the curve, the examples, the words; whatever stands in data and names is text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from modules.options import TRAINING_OPTIONS, TrainingOptions
from modules.service.training import Phase, TrainState
from modules.training.messages import Preview, PreviewExample, PreviewToken, TrainEvaluation, TrainStep
from modules.ui import perplexity_card, text_source
from modules.ui.curve import curve
from modules.ui.training_form import field_updates, field_values
from modules.ui.training_views import preview_card, training_card, training_in_words

EVIL = "<script>alert(1)</script>"


def step(number: int, loss: float) -> TrainStep:
    return TrainStep(number, number / 10, loss, 1e-4 * number, 100.0, float(number))


def picture(html: str) -> ET.Element:
    """The drawing, which has to be well-formed."""
    return ET.fromstring(html[html.index("<svg") : html.index("</svg>") + len("</svg>")])


def heights(html: str, css: str) -> list[float]:
    """The y of each point of a line; it grows downwards."""
    points = next(line.get("points", "") for line in picture(html).iter("polyline") if line.get("class") == css)
    return [float(point.split(",")[1]) for point in points.split()]


def test_a_falling_loss_goes_down_and_evaluations_are_marked() -> None:
    checks = [TrainEvaluation(2, 1.5, True), TrainEvaluation(4, 1.8, False)]
    html = curve([step(1, 2.0), step(2, 1.0), step(3, 0.5)], checks, 10)
    assert heights(html, "loss") == sorted(heights(html, "loss"))  # lower on the page, one by one
    marks = [mark.get("class") for mark in picture(html).iter("rect")]
    assert marks == ["check best", "check"]
    assert "Loss 2.000 at step 1, 0.500 at step 3. Best evaluation 1.500 at step 2." in html


@pytest.mark.parametrize("losses", [[0.0], [math.nan, 1.0], [1e-9, 1e-9], [math.inf, 2.0, 1.0], [1e30, 1.0]])
def test_any_loss_can_be_drawn_inside_of_the_picture(losses: list[float]) -> None:
    html = curve([step(number, loss) for number, loss in enumerate(losses, 1)], [], 0)
    _, _, _, height = map(float, str(picture(html).get("viewBox")).split())
    assert all(0 <= y <= height for css in ("loss", "rate") for y in heights(html, css))


def test_one_outlier_does_not_flatten_the_rest() -> None:
    steps = [step(number, 1.0 if number != 50 else 400.0) for number in range(1, 101)]
    ordinary = heights(curve(steps, [], 100), "loss")[0]
    assert ordinary == heights(curve([step(n, 1.0) for n in range(1, 101)], [], 100), "loss")[0]


def test_before_the_first_step_there_is_no_picture() -> None:
    assert curve([], [], 10) == ""


def test_tokens_are_text_and_those_that_are_learned_are_marked() -> None:
    tokens = (PreviewToken("\n" + EVIL, False), PreviewToken("yes", True))
    html = preview_card(Preview("chat", (PreviewExample(3, tokens, 7),), 1, 1, 2, 1, 1, 0, 9, 4))
    assert EVIL not in html
    assert '<span class="token">↵\n&lt;script&gt;' in html
    assert '<span class="token learned">yes</span>' in html
    assert "7 tokens cut here" in html
    assert "line 3" in html


def test_options_in_words_are_those_that_differ() -> None:
    assert training_in_words(TrainingOptions()) == ""
    chosen = TrainingOptions(rank=8, dora=True, learning_rate=0.001, target_modules=("q_proj", "v_proj"))
    assert training_in_words(chosen) == "Rank 8 · Modules q_proj v_proj · DoRA · Learning rate 0.001"


def test_what_has_no_effect_is_greyed_with_its_reason_and_a_bad_value_changes_nothing() -> None:
    raw = [spec.default for spec in TRAINING_OPTIONS.values()]
    names = list(TRAINING_OPTIONS)
    raw[names.index("target_modules")] = ""
    raw[names.index("max_steps")] = 5
    assert field_values(raw)["max_steps"] == 5
    epochs = field_updates(raw)[names.index("epochs")]
    assert epochs["interactive"] is False
    assert "The steps are given" in epochs["info"]
    raw[names.index("rank")] = 0
    assert all("interactive" not in update for update in field_updates(raw))


def test_a_training_that_never_was_shows_nothing() -> None:
    assert training_card(TrainState()) == ""
    assert training_card(replace(TrainState(), phase=Phase.CANCELLED)) == ""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("upload", text_source.Chosen(path="up.txt")),
        ("paste", text_source.Chosen(text="a\nb")),
        ("hub", text_source.Chosen(hub="user/name")),
    ],
)
def test_of_what_was_given_only_the_shown_field_counts(kind: str, expected: text_source.Chosen) -> None:
    assert text_source.chosen(kind, "up.txt", "\na\nb\n", "user/name ") == expected


@pytest.mark.parametrize(("value", "text"), [(12.345, "12.35"), (1e7, "1.00e+07"), (math.inf, "inf")])
def test_a_perplexity_in_words(value: float, text: str) -> None:
    assert perplexity_card.number(value) == text
