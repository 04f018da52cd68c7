"""The Hub that this server goes by: the public one, or the mirror that HF_ENDPOINT names. The token is for it alone."""

from __future__ import annotations

import os
from typing import Literal

_PUBLIC = "https://huggingface.co"


def endpoint_from_environment() -> str:
    """HF_ENDPOINT (a mirror), or the public Hub."""
    return (os.environ.get("HF_ENDPOINT") or _PUBLIC).rstrip("/")


def token_for(endpoint: str) -> Literal[False] | None:
    """What huggingface_hub takes as ``token``: None for the one in use, False for none at another host.

    Another host may stand in the record of a model that was copied here, or in the list of an earlier server.
    """
    return None if endpoint == endpoint_from_environment() else False
