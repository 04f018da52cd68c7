"""Who is who by name, password and key; what options make of it; how wrong attempts slow down."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from modules.access import Credential, Credentials, Role, from_options, new_password
from modules.access.attempts import FREE, LONGEST_S, Attempts
from modules.access.credentials import guessable, said_in
from modules.access.sessions import Sessions, cookie_name, set_cookie, token_in
from modules.errors import OptionError
from modules.options import SERVER_OPTIONS, ServerOptions


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def by_header(credentials: Credentials, header: str) -> Role | None:
    return credentials.role(*said_in(header))


def test_without_sharing_nobody_needs_to_log_in() -> None:
    credentials, made = from_options(ServerOptions())
    assert (bool(credentials), made) == (False, "")


@pytest.mark.parametrize(
    "options",
    [
        {"listen": True}, {"share": True}, {"listen_host": "192.0.2.1"}, {"api_key": "key"}, {"guest_auth": ("a:b",)},
        {"listen": True, "api_key": "key", "guest_auth": ("a:b",)}, {"allowed_host": ("llm.example.org",)},
        {"subpath": "/llm"},
    ],
)  # fmt: skip
def test_who_shares_without_an_administrator_gets_a_password(options: dict[str, object]) -> None:
    credentials, made = from_options(ServerOptions(**options))  # type: ignore[arg-type]
    assert credentials.role(made) is Role.ADMIN
    assert by_header(credentials, f"Bearer {made}") is Role.ADMIN
    assert from_options(ServerOptions(listen=True))[1] != made


@pytest.mark.parametrize("options", [{"admin_key": "key"}, {"gradio_auth": ("a:b",)}])
def test_no_password_is_made_where_there_is_one(options: dict[str, object]) -> None:
    credentials, made = from_options(ServerOptions(listen=True, **options))  # type: ignore[arg-type]
    assert (bool(credentials), made) == (True, "")


def test_a_file_as_editors_leave_it(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("ann : secret \nbob: other\n", encoding="utf-8-sig")  # with a mark of its encoding in front
    credentials, _ = from_options(ServerOptions(gradio_auth_path=str(file)))
    for user, secret in (("ann", "secret"), ("bob", "other")):
        assert credentials.role(secret, user) is not None


def test_roles(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("# the family\nann:a,b:c\n\n")
    server = ServerOptions(
        gradio_auth=("root:one,toor:two",), gradio_auth_path=str(file), guest_auth=("gast:drei",), api_key="ak",
        admin_key="bk",
    )  # fmt: skip
    credentials, _ = from_options(server)
    known = {("root", "one"): "administrator", ("toor", "two"): "administrator", ("ann", "a,b:c"): "administrator",
             ("gast", "drei"): "guest", ("", "ak"): "guest", ("", "bk"): "administrator"}  # fmt: skip
    for (user, secret), role in known.items():
        assert credentials.role(secret, user) == role
        assert by_header(credentials, basic(user, secret)) == role
        for other, another in ((user + "x", secret), (user, secret + "x"), (user, ""), ("", secret + " ")):
            assert credentials.role(another, other) is None
    assert by_header(credentials, "bearer ak") is Role.GUEST
    for header in ("Bearer", "Bearer one", "Basic !!", "Basic " + "/w==", "ak", "Digest ak", ""):
        assert by_header(credentials, header) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradio_auth": ("hunter2",)}, "user:password"),
        ({"gradio_auth": ("a:",)}, "user:password"),
        ({"guest_auth": ("a:b",), "gradio_auth": ("a:hunter2",)}, "named twice"),
        ({"api_key": "hunter2", "admin_key": "hunter2"}, "the same"),
        ({"api_key": "hunter2 two"}, "--api-key"),
        ({"gradio_auth_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_credentials_are_refused_and_not_shown(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        from_options(ServerOptions(**options))  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_a_file_is_refused_with_the_line_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("a:b\nhunter2\n")
    with pytest.raises(OptionError, match="line 2") as caught:
        from_options(ServerOptions(gradio_auth_path=str(tmp_path / "auth")))
    assert "hunter2" not in str(caught.value)
    (tmp_path / "auth").write_text("# nobody\n")
    with pytest.raises(OptionError, match="names nobody"):
        from_options(ServerOptions(gradio_auth_path=str(tmp_path / "auth")))


def test_a_password_can_be_typed_and_not_guessed() -> None:
    made = {new_password() for _ in range(200)}
    assert len(made) == 200
    assert not any(map(guessable, made))
    assert all(len(one) == 19 and set(one) <= set("abcdefghjkmnpqrstuvwxyz23456789-") for one in made)


@pytest.mark.parametrize(
    ("secret", "could_be"),
    [
        ("hunter2", True), ("correct horse battery staple", True), ("0123456789012345678901", True),
        ("a1a1a1a1a1a1a1a1a1a1a1", True), ("k7mp-x2wd-9fgh-rtb", True), ("k7mp-x2wd-9fgh-rtbn", False),
        ("sk-4f9a0c6e1b7d83525c0e", False),
    ],
)  # fmt: skip
def test_which_secrets_could_be_guessed(secret: str, could_be: bool) -> None:
    assert guessable(secret) is could_be


def test_secrets_are_not_in_a_representation() -> None:
    assert "hunter2" not in repr(Credential(Role.ADMIN, "hunter2", "root"))
    assert "hunter2" not in repr(Credentials([Credential(Role.ADMIN, "hunter2")]))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_attempts_slow_down_and_are_forgotten() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    waits = []
    for _ in range(12):
        attempts.failed("a")
        waits.append(attempts.wait_s("a"))
        clock.now += attempts.wait_s("a")
    assert waits[: FREE - 1] == [0] * (FREE - 1)
    assert waits[FREE - 1 :] == [1, 2, 4, 8, 16, *[LONGEST_S] * 5]
    assert attempts.wait_s("a") == attempts.wait_s("b") == 0
    attempts.succeeded("a")
    attempts.failed("a")
    assert attempts.wait_s("a") == 0


def test_many_addresses_together_are_slowed_down_but_nobody_is_kept_out_for_long() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(5000):
        attempts.failed(f"10.0.{number // 256}.{number % 256}")
    assert 0 < attempts.wait_s("somebody else") <= 2
    clock.now += 3
    assert attempts.wait_s("somebody else") == 0


def role_of(sessions: Sessions, token: str) -> Role | None:
    login = sessions.login(token)
    return login.role if login else None


def test_many_logins_of_a_guest_put_no_administrator_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.access.sessions._MOST", 3)
    sessions = Sessions()
    begun = [sessions.begin(role) for role in (Role.ADMIN, *[Role.GUEST] * 5)]
    roles = [role_of(sessions, token) for token in begun]
    assert roles == [Role.ADMIN, None, None, None, Role.GUEST, Role.GUEST]
    begun += [sessions.begin(Role.ADMIN) for _ in range(4)]
    assert [role_of(sessions, token) for token in begun] == [None] * 7 + [Role.ADMIN] * 3


def test_sessions_end() -> None:
    sessions = Sessions()
    token = sessions.begin(Role.GUEST)
    assert role_of(sessions, token) is Role.GUEST
    assert role_of(sessions, token + "x") is None
    assert role_of(sessions, "") is None
    sessions.end(token)
    assert role_of(sessions, token) is None


@pytest.mark.parametrize(
    "other",
    ['a={"x":1}', "valueless", "path=/x", "a=b c", "[x]=1", 'a="q', "x=loadstone-login-80=1", "loadstone-login=1"],
)
def test_cookies_of_other_programs_on_this_host_log_nobody_out(other: str) -> None:
    name = cookie_name(80)
    assert token_in(f"{other}; {name}=mine", name) == token_in(f"{name}=mine; {other}", name) == "mine"
    assert token_in(f"{other}; {cookie_name(81)}=its", name) == ""


def test_a_cookie_is_for_this_site_and_no_script() -> None:
    cookie = set_cookie("login", "t", path="/llm/", secure=True)
    for part in ("login=t", "HttpOnly", "SameSite=Lax", "Secure", "Path=/llm/"):
        assert part in cookie
    assert "Secure" not in set_cookie("login", "t", path="/", secure=False)


def test_a_key_in_a_settings_file_that_is_no_text_is_not_shown() -> None:
    with pytest.raises(OptionError, match="--api-key takes a text") as caught:
        SERVER_OPTIONS["api_key"].parse(271828)
    assert "271828" not in str(caught.value)
