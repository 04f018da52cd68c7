"""The token for private and gated models: where it is from, whose it is. Kept by huggingface_hub's own store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from modules.errors import HubTokenRefused, UserError
from modules.hub.remote import Hub

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class TokenStatus:
    """``masked`` shows the last characters alone; ``source`` in words; both "" where there is no token."""

    masked: str = ""
    source: str = ""

    @property
    def is_there(self) -> bool:
        return bool(self.masked)


def status() -> TokenStatus:
    """The token that requests bring. It is not tested here: see :meth:`Hub.whoami`."""
    from huggingface_hub import get_token

    if not (token := get_token()):
        return TokenStatus()
    return TokenStatus(masked(token), _variable() or "the login of this machine")


def _variable() -> str:
    """The variable of the environment whose token is in use; "" where none is."""
    return next((name for name in _VARIABLES if os.environ.get(name)), "")


def masked(token: str) -> str:
    """``hf_…wxyz``: enough to tell two apart, too little to use."""
    return f"{'hf_' if token.startswith('hf_') else ''}…{token[-4:]}" if len(token) > 12 else "…"


def save(hub: Hub, token: str) -> str:
    """Keep the token for this machine, once the Hub knows it; its owner's name. Raises HubTokenRefused, UserError.

    It goes where ``hf auth login`` keeps it, readable by this user alone.
    """
    cleaned = token.strip()
    if not cleaned or any(character.isspace() for character in cleaned):
        raise UserError("This is no token.", "Copy one from the Hub's settings: it begins with hf_.")
    if variable := _variable():
        raise UserError(f"The token of {variable} is in use.", f"Start without {variable} to use another one.")
    owner = hub.whoami(cleaned)  # first, since login's own question has no errors of ours
    from huggingface_hub import login

    login(cleaned)
    return owner


def forget() -> None:
    """Remove the token in use from this machine, and no other login. Raises UserError where it is the environment's."""
    if variable := _variable():
        raise UserError(f"The token of {variable} is in use.", f"Unset {variable} and start again to be without it.")
    from huggingface_hub import constants, get_token, logout
    from huggingface_hub.utils import get_stored_tokens

    active = get_token()
    name = next((name for name, token in get_stored_tokens().items() if token == active), None)
    try:
        if name is None:  # logout() without a name removes every login, kept under whatever name
            Path(constants.HF_TOKEN_PATH).unlink(missing_ok=True)
        else:
            logout(name)
    except OSError as error:  # of the disk, or there is no git, which logout() asks after the token is gone
        if get_token() == active:
            raise UserError(
                f"The token cannot be removed: {error.strerror or error}.", f"Remove it from {constants.HF_TOKEN_PATH}."
            ) from None


def tested(hub: Hub) -> str:
    """The name of the owner of the token that is in use. Raises HubTokenRefused where there is none, or a bad one."""
    if not status().is_there:
        raise HubTokenRefused("There is no token.", "Give one on the page, in HF_TOKEN, or with hf auth login.")
    return hub.whoami()
