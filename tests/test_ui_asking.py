"""What is asked before something is thrown away, and what the menus hold afterwards."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.copies import QuantizedCopy
from modules.errors import NothingLoaded
from modules.ui import asking, chat_tab, model_actions, shelf_card
from modules.ui.common import small
from modules.ui.download_card import found_updates, narrowed_in_words
from modules.ui.session_tab import copies_update
from tests.services import Make, services


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    with services(tmp_path, demo_model) as made:
        yield made


def test_what_is_asked_is_text_and_a_reason_not_to_ask_has_no_buttons() -> None:
    words, yes, no, about = asking.shown(asking.Question("x", "Delete <b>x</b>?"))
    assert (yes["visible"], no["visible"], about) == (True, True, "x")
    assert "Delete &lt;b&gt;x&lt;/b&gt;?" in words
    words, yes, no, about = asking.shown("Choose one first.")
    assert (yes["visible"], no["visible"], about) == ("hidden", "hidden", None)
    assert "Choose one first." in words


@pytest.mark.parametrize(("chosen", "kept"), [("b", "b"), ("gone", "a"), (None, "a")])
def test_the_chosen_copy_stays_chosen_while_it_is_there(chosen: str | None, kept: str) -> None:
    copies = [QuantizedCopy(Path(key), key, {}, {}, 1, datetime.datetime(2026, 1, 1)) for key in ("a", "b")]
    assert copies_update(copies, chosen)["value"] == kept
    assert copies_update([], chosen)["value"] is None


def test_the_shelf_reads_the_size_of_the_one_it_asks_about(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make()
    size = service.shelf.size_of("demo")
    monkeypatch.setattr(service.shelf, "kept", lambda: pytest.fail("the sizes of all are read"))
    asked = shelf_card._ask(service, "demo")
    assert isinstance(asked, asking.Question)
    assert asked.about == "demo"
    assert size > 0
    assert shelf_card._ask(service, None) == "Choose a model first."
    assert "gone" in str(shelf_card._ask(service, "gone"))


def test_the_star_says_what_it_would_do_and_asks_for_a_model(make: Make) -> None:
    service = make()
    assert shelf_card._favoured(service, None)[-1] == small("Choose a model first.")
    assert "No favourite" in shelf_card._favoured(service, "demo")[2]["value"]
    assert shelf_card._favoured(service, "demo")[2]["value"] == "★ Favourite"


def test_only_what_is_saved_is_asked_about(make: Make) -> None:
    assert model_actions._ask_forget(make(), "demo") == "Nothing is saved for demo."
    assert isinstance(model_actions._ask_forget(make((), "", bf16=True), "demo"), asking.Question)


def test_a_search_that_finds_nothing_names_what_narrows_it() -> None:
    words = narrowed_in_words("text-generation", "max:1B", True)
    assert words == " among: Text generation, up to 1 B, Fits this machine (see Narrow the search)"
    assert words in found_updates([], "x", words)[1]
    assert narrowed_in_words("", "", False) == ""


def test_an_empty_chat_without_a_model_says_so(make: Make) -> None:
    assert chat_tab.loaded_updates(make().snapshot())[0]["placeholder"].startswith(NothingLoaded.title)
