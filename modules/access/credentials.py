"""Who may ask, and as what: the names, passwords and keys of this server."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from modules.errors import OptionError
from modules.options import SERVER_OPTIONS, ServerOptions

_LONG = 19  # characters, those of new_password()
_VARIED = 8  # different ones
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is taken for another when typed off a screen


class Role(str, Enum):
    """A guest talks to what is loaded; an administrator loads, downloads and sets too."""

    ADMIN = "administrator"
    GUEST = "guest"


@dataclass(frozen=True)
class Credential:
    """``user`` is "" for a key, or for a password that needs no name."""

    role: Role
    secret: str = field(repr=False)
    user: str = ""


class Credentials:
    """All of them. A comparison takes as long whatever is right about the secret, and whoever's it is."""

    def __init__(self, known: Iterable[Credential]) -> None:
        self._known = tuple(known)
        self._salt = secrets.token_bytes(32)
        self._digests = [self._digest(one.user, one.secret) for one in self._known]

    def __bool__(self) -> bool:
        return bool(self._known)

    @property
    def has_guests(self) -> bool:
        return any(one.role is Role.GUEST for one in self._known)

    @property
    def has_names(self) -> bool:
        return any(one.user for one in self._known)

    def role(self, secret: str, user: str = "") -> Role | None:
        """The role of who knows this: a key, or a name's password. None for nobody."""
        given, found = self._digest(user, secret), None
        for digest, one in zip(self._digests, self._known, strict=True):
            if hmac.compare_digest(digest, given):
                found = one.role
        return found

    def _digest(self, user: str, secret: str) -> bytes:
        said = f"{len(user)}:{user}:{secret}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._salt, said, "sha256")


def said_in(authorization: str) -> tuple[str, str]:
    """(secret, user) of an Authorization header: ``Bearer`` with a key, or ``Basic`` with name and password.

    ("", "") for another header, which is nobody's.
    """
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip(), ""
    if scheme.lower() != "basic":
        return "", ""
    try:
        user, _, secret = base64.b64decode(given, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return secret, user


def guessable(secret: str) -> bool:
    """Whether somebody who tries thousands a second might hit it: a word, a short key. Not so a password of
    :func:`new_password`, or a key of its length and variety.
    """
    mixed = any(map(str.isdigit, secret)) and any(map(str.isalpha, secret))
    return len(secret) < _LONG or len(set(secret)) < _VARIED or not mixed


def new_password() -> str:
    """79 bits, in groups that can be typed: ``k7mp-x2wd-9fgh-rtbn``."""
    while guessable(made := "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(4))):
        pass  # one in a hundred has no digit
    return made


def from_options(server: ServerOptions) -> tuple[Credentials, str]:
    """The credentials that the options name, and the password that was made because they name no administrator's.

    No option that shares and none that names a credential: none are needed, and there are none. Raises OptionError.
    """
    known = [
        *_pairs("gradio_auth", server.gradio_auth, Role.ADMIN),
        *_from_file(server.gradio_auth_path),
        *_pairs("guest_auth", server.guest_auth, Role.GUEST),
        *_key("admin_key", server.admin_key, Role.ADMIN),
        *_key("api_key", server.api_key, Role.GUEST),
    ]
    _refuse_doubles(known)
    if not (known or _shared(server)):
        return Credentials(()), ""
    if any(one.role is Role.ADMIN for one in known):
        return Credentials(known), ""
    made = new_password()
    return Credentials([*known, Credential(Role.ADMIN, made)]), made


def _shared(server: ServerOptions) -> bool:
    """Whether others can reach the server: over the network, or through a proxy under another name or path."""
    return bool(server.listen or server.share or server.listen_host or server.allowed_host or server.subpath)


def _pairs(option: str, words: Iterable[str], role: Role) -> list[Credential]:
    """``user:password`` each, several set apart by commas. What is wrong is said without the password."""
    found = []
    for text in (part.strip() for word in words for part in word.split(",")):
        user, colon, secret = text.partition(":")
        if not (user and colon and secret):
            raise OptionError(
                f"{SERVER_OPTIONS[option].flag} takes user:password, and one entry is none.",
                "A password with a comma can stand in the file of --gradio-auth-path.",
            )
        found.append(Credential(role, secret, user))
    return found


def _from_file(path: str) -> list[Credential]:
    if not path:
        return []
    flag = SERVER_OPTIONS["gradio_auth_path"].flag
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()  # editors may begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{flag}: {path} cannot be read: {error}.") from None
    found = []
    for number, line in enumerate((line.strip() for line in lines), 1):
        user, colon, secret = (part.strip() for part in line.partition(":"))  # the login page leaves blanks out, too
        if not line or line.startswith("#"):
            continue
        if not (user and colon and secret):
            raise OptionError(f"{flag}: line {number} of {path} is no user:password.")
        found.append(Credential(Role.ADMIN, secret, user))
    if not found:
        raise OptionError(f"{flag}: {path} names nobody.", "Write one user:password a line.")
    return found


def _key(option: str, key: str, role: Role) -> list[Credential]:
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise OptionError(f"{SERVER_OPTIONS[option].flag} takes a key of ASCII letters, digits and signs.")
    return [Credential(role, key)] if key else []


def _refuse_doubles(known: list[Credential]) -> None:
    names = [one.user for one in known if one.user]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"The user {name!r} is named twice.", "Each name stands once, for one role.")
    keys = [one.secret for one in known if not one.user]
    if len(set(keys)) < len(keys):
        raise OptionError("--admin-key and --api-key are the same.", "Leave --api-key out, or choose another.")
