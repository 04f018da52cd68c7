"""What huggingface_hub and the network raise, as errors of ours: each case a sentence of its own."""

from __future__ import annotations

from dataclasses import dataclass

from modules.errors import (
    HubForbidden,
    HubTokenRefused,
    HubUnreachable,
    LicenceNotAccepted,
    LoadstoneError,
    NotOnHub,
)

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may be different next time


@dataclass(frozen=True)
class Asked:
    """What a request was about, for the sentence. ``has_token``: whether one was sent with it."""

    repo: str = ""
    endpoint: str = ""
    revision: str = ""
    file: str = ""
    has_token: bool = False


def explained(error: Exception, asked: Asked) -> LoadstoneError:
    """The error of ours that says what happened."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, LoadstoneError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable("Offline mode is on: HF_HUB_OFFLINE is set.", "Unset it and restart the server.")
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, asked)
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return HubUnreachable(f"{asked.endpoint} does not answer.")
    if isinstance(error, httpx2.ProxyError):
        return HubUnreachable(f"The proxy refuses: {error}.", "Check HTTPS_PROXY and NO_PROXY.")
    if isinstance(error, httpx2.HTTPError | OSError):
        return HubUnreachable(f"{asked.endpoint} cannot be reached: {str(error) or type(error).__name__}.")
    return HubUnreachable(f"{asked.endpoint} gave an answer that makes no sense: {type(error).__name__}: {error}.")


def is_temporary(error: Exception) -> bool:
    """Whether the same request may go well a moment later: the network failed, or the Hub is busy."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _AGAIN
    return isinstance(error, httpx2.TransportError | httpx2.DecodingError | TimeoutError | ConnectionError)


def retry_after_s(error: Exception) -> float | None:
    """The seconds that the answer asks to wait (Retry-After as a number, or RateLimit's ``t=``)."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    named = response.headers.get("retry-after", "")
    if named.strip().isdigit():
        return float(named)
    limits = response.headers.get("ratelimit", "")
    ends = [part.partition("=")[2] for part in limits.split(";") if part.strip().startswith("t=")]
    return float(ends[0]) if ends and ends[0].isdigit() and "r=0" in limits.replace(" ", "") else None


def _of_status(error: Exception, asked: Asked) -> LoadstoneError:
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code if error.response is not None else 0
    code = error.response.headers.get("X-Error-Code", "") if error.response is not None else ""
    if code == "GatedRepo":
        return _gated(asked)
    if code == "RevisionNotFound":
        return NotOnHub(f"{asked.repo} has no branch, tag or commit {asked.revision!r}.", "Look at its branches.")
    if code == "EntryNotFound":
        return NotOnHub(f"{asked.repo} has no file {asked.file!r}.", "Get the file list to see what there is.")
    if status == 401 and asked.has_token:
        return HubTokenRefused("The Hub does not know this token (401): it is mistyped, expired or revoked.")
    if status in (401, 404) and asked.repo:
        return _unknown(asked)
    if status == 401:
        return HubTokenRefused("The Hub wants a token (401).")
    if status == 403:
        return HubForbidden(f"The token's owner may not read {asked.repo or 'this'} (403).")
    if status == 429:
        return HubUnreachable("The Hub gets too many requests from here (429).", "Wait a few minutes; a token helps.")
    return HubUnreachable(f"{asked.endpoint} answers with an error ({status}).", "Try again later.")


def _gated(asked: Asked) -> LicenceNotAccepted:
    page = f"{asked.endpoint}/{asked.repo}"
    if asked.has_token:
        return LicenceNotAccepted(
            f"{asked.repo} is gated, and the token's owner has not accepted its licence.",
            f"Accept the licence at {page}, and try again.",
        )
    return LicenceNotAccepted(
        f"{asked.repo} is gated: only those who accepted its licence may download it.",
        f"Accept the licence at {page}, then give a token of the same account.",
    )


def _unknown(asked: Asked) -> NotOnHub:
    if asked.has_token:
        return NotOnHub(f"There is no {asked.repo} on the Hub, or the token's owner may not see it.")
    return NotOnHub(
        f"There is no {asked.repo} on the Hub that everybody may see.",
        "Check the name; a private model needs a token whose owner may see it.",
    )
