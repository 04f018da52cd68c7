"""Whose a request is: found out where it is let in, of interest where it waits for its turn."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

_USER = "loadstone.user"


def name_user(scope: MutableMapping[str, Any], user: str) -> None:
    """Write down in the request's ASGI scope what stands for its user."""
    scope[_USER] = user


def share(most: int, of_others: int) -> int:
    """How many of ``most`` places may be one user's: half of those that the others leave, so that the next one finds
    as many again."""
    return max(1, (most - of_others) // 2)


def user_of(scope: Mapping[str, Any]) -> str:
    """What stands for the user; "" where nobody has written it down: all are one then."""
    return str(scope.get(_USER, ""))
