"""The error tree: every class can travel as data, and says what to change."""

from __future__ import annotations

import pytest

from modules.errors import (
    InternalError,
    LoadstoneError,
    OutOfMemory,
    UserError,
    error_classes,
    error_from_dict,
)


def test_kinds_are_unique() -> None:
    kinds = [cls.kind for cls in error_classes()]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("cls", list(error_classes()), ids=lambda cls: cls.__name__)
def test_every_error_travels_as_data(cls: type[LoadstoneError]) -> None:
    error = cls("It broke at 3 GiB.", "Try less.", fix={"disk": True}, details="trace")
    again = error_from_dict(error.to_dict())
    assert type(again) is cls
    assert again.to_dict() == error.to_dict()


@pytest.mark.parametrize("cls", [c for c in error_classes() if c not in (LoadstoneError, UserError)])
def test_every_error_has_a_title_and_a_remedy_of_its_own(cls: type[LoadstoneError]) -> None:
    assert cls.title
    assert cls("x").hint
    assert "kind" in vars(cls)


def test_exit_status_tells_what_the_user_can_mend() -> None:
    assert OutOfMemory("x").exit_status == 2
    assert InternalError("x").exit_status == 1


def test_an_unknown_kind_is_an_internal_error() -> None:
    assert type(error_from_dict({"kind": "from the future", "message": "m"})) is InternalError
