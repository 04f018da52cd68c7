"""The Hub that this server goes by: the public one, or the mirror that HF_ENDPOINT names. The token is for it alone."""

from __future__ import annotations

import os
from typing import Literal
from urllib.parse import SplitResult, urlsplit

PUBLIC_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PUBLIC = f"https://{PUBLIC_HOSTS[0]}"


def endpoint_from_environment() -> str:
    """HF_ENDPOINT (a mirror), or the public Hub."""
    return (os.environ.get("HF_ENDPOINT") or _PUBLIC).rstrip("/")


def path_on_hub(url: SplitResult) -> str | None:
    """The path of a page of the public Hub or of the mirror in use; None for a page of another host."""
    mirror = urlsplit(endpoint_from_environment())
    if url.netloc.casefold() == mirror.netloc.casefold():
        return url.path.removeprefix(f"{mirror.path}/")
    return url.path if url.hostname in PUBLIC_HOSTS else None


def token_for(endpoint: str) -> Literal[False] | None:
    """What huggingface_hub takes as ``token``: None for the one in use, False for none at another host.

    Another host may stand in the record of a model that was copied here, or in the list of an earlier server.
    """
    return None if endpoint == endpoint_from_environment() else False
