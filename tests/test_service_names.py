"""What may be the name of a new LoRA or model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import OptionError
from modules.library.scan import UNFINISHED
from modules.service.names import folder_name


def test_a_name_is_what_was_typed_without_blanks_around_it() -> None:
    assert folder_name("  My pirate, v2.1 ", "LoRA") == "My pirate, v2.1"


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_said_so(name: str) -> None:
    with pytest.raises(OptionError, match="The LoRA has no name yet"):
        folder_name(name, "LoRA")


@pytest.mark.parametrize("name", [".", "..", ".hidden", "a/b", "/a", "a/", "a\\b", "a\0b", "../a"])
def test_what_leads_elsewhere_is_no_name(name: str) -> None:
    with pytest.raises(OptionError, match="cannot be the name of a model"):
        folder_name(name, "model")


@pytest.mark.parametrize("name", ["a:b", "what?", "con", "NUL.txt", "ends.", "tab\there"])
def test_what_not_every_system_can_store_is_no_name(name: str) -> None:
    with pytest.raises(OptionError, match="on every system"):
        folder_name(name, "model")


@pytest.mark.parametrize("ending", UNFINISHED)
def test_what_the_menus_would_leave_out_is_no_name(ending: str) -> None:
    with pytest.raises(OptionError, match="which no menu shows"):
        folder_name("mine" + ending, "LoRA")


@pytest.mark.parametrize("name", ["a" * 201, "ä" * 101])
def test_a_name_is_not_longer_than_file_systems_take(name: str) -> None:
    with pytest.raises(OptionError, match="too long"):
        folder_name(name, "LoRA")


@given(st.text())
def test_whatever_is_taken_names_one_folder_beside_the_others(name: str) -> None:
    try:
        taken = folder_name(name, "model")
    except OptionError:
        return
    assert taken == name.strip()
    assert not set(taken) & set("/\\\0")
    assert not taken.startswith(".")
