"""The Hub, asked: what a repository holds, who a token belongs to, what there is. Short requests, each with a limit.

huggingface_hub is imported with the first question, not with this module: it takes 0.2 s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from modules.errors import BrokenDownload, HubUnreachable
from modules.hub.asking import Ask
from modules.hub.choosing import RemoteFile
from modules.hub.endpoint import endpoint_from_environment
from modules.hub.problems import Asked, explained, is_temporary, retry_after_s

T = TypeVar("T")
LIMIT_S = 20.0  # for one question, its repetitions apart
TRIES = 3
_LONGEST_WAIT_S = 10.0
_MOST_SKIPPED_BYTES = 16 << 20  # read and thrown away, for a few bytes after them
TASKS: Mapping[str, str] = {
    "text-generation": "Text generation",
    "text2text-generation": "Text to text",
    "image-text-to-text": "Image and text to text",
    "": "Any task",
}
SIZES: Mapping[str, str] = {
    "": "Any size", "max:1B": "up to 1 B", "min:1B,max:4B": "1 to 4 B", "min:4B,max:9B": "4 to 9 B",
    "min:9B,max:35B": "9 to 35 B", "min:35B": "35 B and more",
}  # fmt: skip
SORTS: Mapping[str, str] = {"downloads": "most downloaded", "last_modified": "latest", "likes": "most liked"}


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit. ``asked`` is the name it was asked for, if it has been renamed since."""

    name: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    asked: str = ""
    gated: bool = False
    task: str = ""
    licence: str = ""
    downloads: int = 0


@dataclass(frozen=True)
class Found:
    """One result of a search. ``weights_bytes``: as stored, 0 where the Hub does not tell."""

    name: str
    downloads: int
    likes: int
    task: str
    gated: bool
    parameters: int = 0
    weights_bytes: int = 0
    modified: datetime | None = None
    tags: tuple[str, ...] = field(default=())


class Hub:
    """One Hub. May be used from any thread. Every method raises the errors that ``problems`` makes."""

    def __init__(self, endpoint: str = "") -> None:
        self.endpoint = (endpoint or endpoint_from_environment()).rstrip("/")

    def repository(self, ask: Ask) -> Repository:
        """What the repository holds at the branch's commit, once it is sure that the files may be read."""
        asked = self._asked(ask)
        info = self._ask(
            lambda: self._api().model_info(ask.repo, revision=ask.revision, files_metadata=True, timeout=LIMIT_S), asked
        )
        if info.gated:
            self._ask(lambda: self._api().auth_check(info.id), asked)
        if not info.sha or info.siblings is None:
            raise BrokenDownload(f"{self.endpoint} does not say which files {ask.repo} holds.")
        card = info.card_data
        return Repository(
            name=info.id, revision=ask.revision, commit=info.sha,
            files=tuple(_remote_file(ask.repo, sibling) for sibling in info.siblings),
            asked=ask.repo if info.id != ask.repo else "",
            gated=bool(info.gated), task=info.pipeline_tag or "", downloads=info.downloads or 0,
            licence=str(getattr(card, "license", "") or ""),
        )  # fmt: skip

    def commit(self, ask: Ask) -> str:
        """The commit that the branch points to now."""
        info = self._ask(
            lambda: self._api().model_info(ask.repo, revision=ask.revision, timeout=LIMIT_S), self._asked(ask)
        )
        return info.sha or ""

    def search(
        self, text: str, *, task: str = "", size: str = "", sort: str = "downloads", limit: int = 20
    ) -> list[Found]:
        """Models whose names hold ``text``. ``size`` is a range of parameters as the Hub takes it: "min:1B,max:8B"."""

        def call() -> list[Any]:
            return list(
                self._api().list_models(
                    search=text or None, pipeline_tag=task or None, num_parameters=size or None,
                    sort=sort,
                    limit=limit,
                    expand=["downloads", "likes", "lastModified", "pipeline_tag", "safetensors", "gated", "tags"],
                )
            )  # fmt: skip

        return [_found(info) for info in self._ask(call, Asked(endpoint=self.endpoint, has_token=self.has_token()))]

    def bytes_of(self, repository: Repository, file: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end`` (excluded) of one file, by a range request."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def call() -> bytes:
            url = hf_hub_url(repository.name, file, revision=repository.commit, endpoint=self.endpoint)
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=LIMIT_S) as response:
                hf_raise_for_status(response)
                skipped = start if response.status_code == 200 else 0  # by a server that ignores Range
                if skipped > _MOST_SKIPPED_BYTES:
                    raise BrokenDownload(f"{self.endpoint} gives no part of {file}, only the whole file.")
                got = bytearray()
                for chunk in response.iter_bytes():  # which is not read to its end
                    got += chunk
                    if len(got) >= skipped + end - start:
                        break
                return bytes(got[skipped : skipped + end - start])

        return self._ask(call, Asked(repository.name, self.endpoint, repository.revision, file, self.has_token()))

    def has_token(self) -> bool:
        """Whether requests bring a token: from HF_TOKEN, the usual login, or the page."""
        from huggingface_hub import get_token

        return get_token() is not None

    def whoami(self, token: str | None = None) -> str:
        """The name of the token's owner; ``None`` asks about the token that is in use."""
        asked = Asked(endpoint=self.endpoint, has_token=True)
        return str(self._ask(lambda: self._api().whoami(token), asked)["name"])

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="loadstone")

    def _asked(self, ask: Ask) -> Asked:
        return Asked(ask.repo, self.endpoint, ask.revision, has_token=self.has_token())

    def _ask(self, call: Callable[[], T], asked: Asked) -> T:
        """The answer; what fails for a moment is tried again."""
        for attempt in range(1, TRIES + 1):
            try:
                return _within(LIMIT_S, call, self.endpoint)
            except Exception as error:
                asked_wait = retry_after_s(error)
                wait = float(attempt) if asked_wait is None else asked_wait
                if not is_temporary(error) or attempt == TRIES or wait > _LONGEST_WAIT_S:
                    raise explained(error, asked) from None
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _within(limit_s: float, call: Callable[[], T], endpoint: str) -> T:
    """What ``call`` returns. Not all of huggingface_hub's calls take a time limit (2.4: search, whoami)."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hub-question", daemon=True).start()
    try:
        return future.result(limit_s)
    except TimeoutError:
        if future.done():
            raise
        raise HubUnreachable(f"{endpoint} has not answered for {limit_s:g} s.") from None


def _remote_file(repo: str, sibling: Any) -> RemoteFile:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if size is None:
        raise BrokenDownload(f"The Hub does not say how large {sibling.rfilename} of {repo} is.")
    return RemoteFile(sibling.rfilename, size, sibling.lfs.sha256 if sibling.lfs else "", sibling.blob_id or "")


_BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def _found(info: Any) -> Found:
    counts: Mapping[str, int] = info.safetensors.parameters if info.safetensors else {}
    return Found(
        name=info.id, downloads=info.downloads or 0, likes=info.likes or 0, task=info.pipeline_tag or "",
        gated=bool(info.gated), modified=info.last_modified, tags=tuple(info.tags or ()),
        parameters=info.safetensors.total if info.safetensors else 0,
        weights_bytes=sum(count * _BYTES.get(dtype, 2) for dtype, count in counts.items()),
    )  # fmt: skip
