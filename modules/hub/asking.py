"""What a person may type to name something on the Hub: ``user/model``, ``user/model:branch``, a pasted address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from modules.errors import UserError
from modules.hub.endpoint import PUBLIC_HOSTS, path_on_hub

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+@-]{0,254}")
_VIEWS = frozenset({"tree", "blob", "resolve", "raw", "commit", "commits", "discussions"})
_OTHER_KINDS = frozenset({"datasets", "spaces", "collections", "papers", "docs", "blog", "api"})
MAIN = "main"


@dataclass(frozen=True)
class Ask:
    """A model repository at a branch, tag or commit. ``pattern``: a file or a glob; "" = what suits."""

    repo: str
    revision: str = MAIN
    pattern: str = ""

    @property
    def name(self) -> str:
        """``user/model``, ``user/model:branch``."""
        return self.repo if self.revision == MAIN else f"{self.repo}:{self.revision}"

    @property
    def folder(self) -> str:
        """The folder's name under models/ or loras/: ``user_model[_branch]``."""
        parts = [self.repo, *([] if self.revision == MAIN else [self.revision])]
        return "_".join(parts).replace("/", "_")


def parse(text: str, pattern: str = "") -> Ask:
    """What ``text`` names. Raises UserError where it names nothing on the Hub.

    ``pattern`` (a file's name or a glob) goes before a file in a pasted address.
    """
    cleaned = text.strip().strip("<>\"'").strip()
    if is_address(cleaned):
        return _of_address(cleaned, pattern.strip())
    repo, _, revision = cleaned.partition(":")
    return _checked(repo, revision.strip() or MAIN, pattern.strip(), text)


def is_address(text: str) -> bool:
    """Whether ``text`` is the address of a page, on whatever host."""
    return "://" in text or text.startswith(tuple(f"{host}/" for host in PUBLIC_HOSTS))


def looks_like_a_name(text: str) -> bool:
    """Whether ``text`` names a repository; words to search for do not."""
    try:
        parse(text)
    except UserError:
        return False
    return True


def _of_address(address: str, pattern: str) -> Ask:
    parts = [unquote(part) for part in _path(address).split("/") if part]
    if parts and parts[0] == "models":
        parts = parts[1:]
    if parts and parts[0] in _OTHER_KINDS:
        raise UserError(f"{address!r} is not a model.", "Loadstone downloads models and LoRAs.")
    repo, rest = "/".join(parts[:2]), parts[2:]
    if "@" in repo:  # hf://user/model@branch
        repo, _, revision = repo.partition("@")
        return _checked(repo, revision, pattern, address)
    revision, file = MAIN, ""
    if len(rest) >= 2 and rest[0] in _VIEWS - {"discussions"}:
        revision, file = rest[1], "/".join(rest[2:])
        if rest[0] == "tree" and file:
            file = f"{file}/*"
        if revision == "refs" and len(rest) >= 4:  # refs/pr/3
            revision, file = "/".join(rest[1:4]), "/".join(rest[4:])
    return _checked(repo, revision, pattern or file, address)


def _path(address: str) -> str:
    """What follows the Hub's name. Raises UserError for an address of another host: its foo/bar is another model."""
    try:
        url = urlsplit(address if "://" in address else f"https://{address}")
        own = url.netloc + url.path if url.scheme == "hf" else None
        path = path_on_hub(url) if url.scheme in ("http", "https") else own
    except ValueError:  # brackets that do not close
        path = None
    if path is None:
        raise UserError(
            f"{address!r} is no address of the Hub.",
            "Give user/model, or the address of its page. Of a mirror: start with HF_ENDPOINT set to it.",
        )
    return path


def _checked(repo: str, revision: str, pattern: str, text: str) -> Ask:
    owner, _, name = repo.strip().strip("/").partition("/")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)) or ".." in repo or "--" in repo:
        raise UserError(
            f"{text.strip()!r} names no model on the Hub.",
            "Give user/model, user/model:branch, or the address of the model's page.",
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UserError(f"{revision!r} is no branch.", "Give user/model:branch.")
    return Ask(f"{owner}/{name}", revision, pattern)
