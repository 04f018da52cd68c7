"""Every route of page and API behind the one door: nobody, a guest, an administrator."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute, Mount, Route

from modules import web
from modules.access import MOST_BYTES, AccessMiddleware, Role, new_password
from modules.access.attempts import FREE, Attempts
from modules.access.middleware import MOST_SIGNS
from modules.access.rules import GUEST_ROUTES, OPEN_ROUTES, guest_may
from modules.options import ServerOptions
from modules.web.serving import local_address
from tests.services import services

PAGE = {"accept": "text/html,*/*"}
SERVER = ServerOptions(gradio_auth=("root:one",), guest_auth=("gast:drei",), api_key="guest-key", admin_key="admin-key")
KEYS = {Role.ADMIN: {"authorization": "Bearer admin-key"}, Role.GUEST: {"authorization": "Bearer guest-key"}}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[AccessMiddleware]:
    with services(tmp_path_factory.mktemp("home"), demo_model) as make:
        yield web.application(make(), web.open_door(SERVER))


@pytest.fixture
def client(door: AccessMiddleware) -> Iterator[TestClient]:
    """Its wrong attempts are the first ones."""
    door._attempts = Attempts()
    with fresh(door) as one:
        yield one


def fresh(door: AccessMiddleware) -> TestClient:
    return TestClient(door, base_url="http://127.0.0.1", raise_server_exceptions=False, follow_redirects=False)


def routes(found: list[BaseRoute], before: str = "") -> Iterator[tuple[str, str]]:
    """(method, path with something in its place for each parameter) of every route."""
    for route in found:
        path = before + str(getattr(route, "path", ""))
        if isinstance(route, Mount):
            yield from routes(list(route.routes), path)
        elif isinstance(route, Route) or hasattr(route, "methods"):
            for method in sorted(route.methods or {"GET"}):
                yield method, re.sub(r"\{[^}]*\}", "x", path)
        elif inner := getattr(getattr(route, "original_router", None), "routes", None):
            yield from routes(list(inner), before + route.include_context.prefix)  # type: ignore[attr-defined]


def every(door: AccessMiddleware) -> set[tuple[str, str]]:
    app: Any = door.applications[Role.ADMIN]
    return {(method, path or "/") for method, path in routes(app.routes)}


def test_no_route_answers_nobody(door: AccessMiddleware, client: TestClient) -> None:
    found = every(door)
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/internal/model/load"), ("GET", "/config"),
            ("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/file=x"), ("GET", "/")} <= found  # fmt: skip
    for method, path in [*found, ("GET", "/nowhere"), ("PUT", "/"), ("OPTIONS", "/v1/models")]:
        answer = client.request(method, path)
        if f"{method} {path}" in OPEN_ROUTES:
            assert answer.status_code == (401 if method == "POST" else 200), path  # a login without a password
        else:
            assert answer.status_code == (303 if path == "/logout" and method == "POST" else 401), (method, path)
            assert path == "/logout" or method == "HEAD" or answer.json()["error"]["kind"] == "login_required"


def test_a_guest_is_refused_what_is_not_listed(door: AccessMiddleware, client: TestClient) -> None:
    refused = {(method, path) for method, path in every(door) if not guest_may(method, path)}
    refused -= {(method, path) for method, path in refused if path in ("/login", "/login/", "/logout", "/healthz")}
    assert {("POST", "/v1/internal/model/load"), ("POST", "/v1/internal/model/unload"),
            ("POST", "/v1/internal/model/plan"), ("GET", "/gradio_api/file=x"), ("POST", "/gradio_api/upload"),
            ("GET", "/gradio_api/proxy=x")} <= refused  # fmt: skip
    for method, path in refused:
        answer = client.request(method, path, headers=KEYS[Role.GUEST])
        assert answer.status_code == 403, (method, path)
    for path in ("//gradio_api/queue/join", "/gradio_api/call/../upload", "/assets/..\\x", "/V1/models"):
        assert not guest_may("POST", path)


def test_what_guests_may_is_there(door: AccessMiddleware) -> None:
    """A route that was renamed must not leave a line behind that opens something else one day."""
    found = {f"{method} {path}" for method, path in every(door)}
    for rule in GUEST_ROUTES:
        known = any(route == rule or (rule.endswith("*") and route.startswith(rule[:-1])) for route in found)
        assert known, rule


def test_an_administrator_may_all_and_a_guest_reads(client: TestClient) -> None:
    for role, headers in KEYS.items():
        assert client.get("/v1/internal/model/info", headers=headers).status_code == 200
        listed = client.get("/v1/models", headers=headers).json()["data"]
        assert [one["id"] for one in listed] == ["demo"]
        unloaded = client.post("/v1/internal/model/unload", headers=headers)
        assert unloaded.status_code == (200 if role is Role.ADMIN else 403)


def functions(door: AccessMiddleware, role: Role) -> dict[int, Any]:
    """The functions of a role's page, by their numbers."""
    app: Any = door.applications[role]
    gradio: Any = next(route.app for route in app.routes if isinstance(route, Mount))
    return dict(gradio.get_blocks().fns)


def test_a_guests_page_has_no_function_but_those_of_the_chat(door: AccessMiddleware, client: TestClient) -> None:
    guests, every_one = functions(door, Role.GUEST), functions(door, Role.ADMIN)
    rooms = {function.fn.__module__ for function in guests.values() if function.fn is not None}
    assert {room for room in rooms if room.startswith("modules.")} <= {
        "modules.ui.guest", "modules.ui.chat_tab", "modules.ui.chat_loras",
    }  # fmt: skip
    assert {"modules.ui.model_actions"} <= {f.fn.__module__ for f in every_one.values() if f.fn is not None}
    page = client.get("/config", headers=KEYS[Role.GUEST]).text.replace(" ", "")
    assert '"elem_id":"message"' in page
    for control in ("load", "unload", "model", "session", "sync-loras"):
        assert f'"elem_id":"{control}"' not in page


def test_a_guest_cannot_call_the_administrators_functions(door: AccessMiddleware, client: TestClient) -> None:
    """Through every way that Gradio has of calling one: by number, by name, through the queue."""
    guests, every_one = functions(door, Role.GUEST), functions(door, Role.ADMIN)
    names = {function.api_name for function in guests.values()}
    others = {number: function for number, function in every_one.items() if number not in guests}
    assert others
    for number, function in others.items():
        body = {"data": [], "fn_index": number, "session_hash": "abc"}
        ways = ["queue/join", "run/predict", "api/predict"]
        if function.api_name and function.api_name not in names:
            ways += [f"{way}/{function.api_name}" for way in ("run", "api", "call", "call/v2")]
        for way in ways:
            answer = client.post(f"/gradio_api/{way}", json=body, headers=KEYS[Role.GUEST])
            assert answer.status_code >= 400, (way, number, function.api_name)


@pytest.mark.parametrize(
    ("user", "password", "guest"), [("root", "one", False), ("gast", "drei", True), ("", "admin-key", False)]
)
def test_logging_in_and_out(client: TestClient, user: str, password: str, guest: bool) -> None:
    answer = client.get("/", headers=PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    shown = client.get("/login").text
    assert 'name="password"' in shown
    wrong = client.post("/login", data={"user": user, "password": password + "x"})
    assert (wrong.status_code, "That is not right." in wrong.text) == (401, True)
    answer = client.post("/login", data={"user": user, "password": password})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert client.get("/", headers=PAGE).status_code == 200
    assert client.post("/v1/internal/model/unload").status_code == (403 if guest else 200)
    assert client.get("/v1/models", headers={"authorization": "Bearer nonsense"}).status_code == 401
    [(name, cookie)] = client.cookies.items()
    client.post("/logout")
    assert client.get("/v1/models", headers={"cookie": f"{name}={cookie}"}).status_code == 401


def test_the_password_of_a_proxy_in_front_does_not_disturb_a_login(client: TestClient) -> None:
    client.post("/login", data={"user": "gast", "password": "drei"})
    for _ in range(FREE + 1):
        assert client.get("/v1/models", auth=("proxy", "password")).status_code == 200
    assert client.post("/v1/internal/model/unload", auth=("root", "one")).status_code == 403
    client.cookies.clear()
    assert client.get("/v1/models", auth=("proxy", "password")).status_code == 401


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_flood_of_wrong_keys_is_slowed_down_and_keeps_no_right_one_out(demo_model: Path, tmp_path: Path) -> None:
    """Of requests at a time one waits for its turn, those with a secret that nobody can guess go through, the rest is
    refused: a program on the same address as the flood is late at most.
    """
    made = new_password()
    server = ServerOptions(gradio_auth=("root:one",), api_key="guest-key", admin_key=made)
    with services(tmp_path, demo_model) as make, fresh(web.application(make(), web.open_door(server))) as client:

        def status(headers: dict[str, str]) -> int:
            return client.get("/v1/models", headers=headers).status_code

        began = time.monotonic()
        assert [status(bearer(str(n))) for n in range(FREE)] == [401] * FREE
        assert status(KEYS[Role.GUEST]) == 200  # late
        assert time.monotonic() - began > 0.9
        assert status(bearer("x")) == 401  # a wrong one: two seconds from now on
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(status, bearer(f"x{n}")) for n in range(8)]
            wait(waiting, return_when=FIRST_COMPLETED)
            assert [status(bearer(made)) for _ in range(5)] == [200] * 5
            page = client.post("/login", data={"user": "root", "password": "one"})
            assert (page.status_code, "Try again in" in page.text) == (429, True)
            assert sorted(one.result() for one in waiting) == [401] + [429] * 7


def test_a_guests_key_wins_no_fresh_guesses(door: AccessMiddleware, client: TestClient) -> None:
    for number in range(FREE):
        assert client.get("/v1/models", headers=KEYS[Role.GUEST]).status_code == 200
        assert client.get("/v1/models", headers=bearer(str(number))).status_code == 401
    assert door._attempts.wait_s("testclient") > 0


def test_wrong_keys_count_for_a_machine_whatever_address_of_its_network_it_takes(door: AccessMiddleware) -> None:
    door._attempts = Attempts()
    for number in range(FREE):
        with TestClient(door, base_url="http://127.0.0.1", client=(f"2001:db8::{number}", 50000)) as client:
            assert client.get("/v1/models", headers=bearer("x")).status_code == 401
            assert client.post("/login", data={"password": "x"}).status_code == 401
    assert door._attempts.wait_s("2001:db8::/64") > 1
    assert door._attempts.wait_s("2001:db8:0:1::/64") == 0


def test_how_long_a_model_stays_is_the_administrators_to_say(client: TestClient) -> None:
    """Else a guest could unload one, which is refused on its own route."""
    for path, body in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("embeddings", {"input": "x"}),
    ):
        for role, status, code in ((Role.GUEST, 403, "access_refused"), (Role.ADMIN, 400, "unsupported_parameter")):
            answer = client.post(f"/v1/{path}", json={**body, "keep_alive": 0}, headers=KEYS[role])
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
            assert answer.json()["error"]["param"] == "keep_alive"
            answer = client.post(f"/v1/{path}", json={**body, "keep_alive": None}, headers=KEYS[role])
            assert answer.json()["error"]["code"] == "nothing_loaded"


def test_two_servers_on_one_host_do_not_log_each_other_out(client: TestClient) -> None:
    """Cookies do not know ports: the browser sends all of them to each."""
    for port in (7860, 7861):
        answer = client.post(f"http://127.0.0.1:{port}/login", data={"user": "root", "password": "one"})
        assert answer.status_code == 303
    assert len(client.cookies) == 2
    client.post("http://127.0.0.1:7861/logout")
    assert client.get("http://127.0.0.1:7860/v1/models").status_code == 200
    assert client.get("http://127.0.0.1:7861/v1/models").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://evil.example", "content-type": "text/plain"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"x-forwarded-host": "evil.example"},
    ],
)
def test_pages_of_elsewhere_are_refused_with_a_key_too(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/v1/internal/model/unload", headers={**KEYS[Role.ADMIN], **headers})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (403, "access_refused")
    assert client.post("/login", data={"user": "root", "password": "one"}, headers=headers).status_code == 403


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    for path in ("/login", "/v1/models", "/nowhere"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'self'" in headers["content-security-policy"]


def test_a_body_that_is_too_long_is_not_read(client: TestClient) -> None:
    headers = {**KEYS[Role.ADMIN], "content-type": "application/json"}
    answer = client.post("/v1/chat/completions", content=b" " * (MOST_BYTES + 1), headers=headers)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "request_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(MOST_BYTES // 2**20 + 1):
            yield b" " * 2**20

    assert client.post("/v1/chat/completions", content=endless(), headers=headers).status_code in (400, 413)
    assert client.post("/login", content=b"password=" + b"x" * 10_000).status_code == 413
    assert client.post("/login", content=b"&".join(b"a%d=1" % n for n in range(9))).status_code == 413


def test_a_body_of_very_many_brackets_is_not_parsed(client: TestClient) -> None:
    """Parsing holds everybody up; what is too much is found out while it comes."""
    headers = {**KEYS[Role.GUEST], "content-type": "application/json"}
    begin = b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ['
    most = MOST_SIGNS[b"[{"]
    just, more = (begin + b",".join([b"[]"] * count) + b"]}}" for count in (most - 5, most - 4))
    answer = client.post("/v1/chat/completions", content=more, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert answer.headers["connection"] == "close"
    assert client.post("/v1/chat/completions", content=just, headers=headers).status_code != 413
    commas = begin + b",".join([b"1"] * (MOST_SIGNS[b","] + 2)) + b"]}}"
    assert client.post("/v1/chat/completions", content=commas, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "host", ["llm.example.org", "LLM.example.org.", "llm.example.org:8443", "https://llm.example.org:8443/llm"]
)
def test_a_further_name_may_be_given_as_an_address(host: str) -> None:
    hosts = web.open_door(ServerOptions(allowed_host=(host, ""))).hosts
    assert hosts.known("llm.example.org")
    assert not hosts.known("")
    assert not hosts.known("https")


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({}, "127.0.0.1"), ({"listen": True}, "127.0.0.1"), ({"listen_host": "::"}, "127.0.0.1"),
        ({"listen_host": "192.0.2.7"}, "192.0.2.7"),
    ],
)  # fmt: skip
def test_the_tunnel_leads_to_where_the_server_listens(options: dict[str, Any], address: str) -> None:
    assert local_address(ServerOptions(**options)) == address


def test_behind_a_proxy_under_a_path(demo_model: Path, tmp_path: Path) -> None:
    """Whether the proxy takes the path away or not."""
    server = ServerOptions(gradio_auth=("root:one",), subpath="llm/", allowed_host=("llm.example.org",))
    forwarded = {"x-forwarded-host": "llm.example.org", "x-forwarded-proto": "https"}
    with services(tmp_path, demo_model) as make, fresh(web.application(make(), web.open_door(server))) as client:
        for before in ("", "/llm"):
            answer = client.get(f"{before}/", headers={**PAGE, **forwarded})
            assert answer.headers["location"] == "/llm/login"
            body = {"user": "root", "password": "one"}
            headers = {**forwarded, "origin": "https://llm.example.org"}
            answer = client.post(f"{before}/login", data=body, headers=headers)
            assert answer.headers["location"] == "/llm/"
            assert "Path=/llm/" in answer.headers["set-cookie"]
            assert "Secure" in answer.headers["set-cookie"]
            cookie = {"cookie": answer.headers["set-cookie"].split(";")[0]}
            config = client.get(f"{before}/config", headers={**forwarded, **cookie}).json()
            assert config["root"] == "https://llm.example.org/llm"
            assert client.get(f"{before}/v1/models", headers={**forwarded, **cookie}).status_code == 200
        assert client.get("/llmodels").status_code == 401


@pytest.mark.parametrize(
    "name", ["../demo", "/etc/passwd", "..", "models/../../x", "demo/../../..", "C:\\x", "\0", "a" * 9000, "ä" * 200]
)
def test_names_do_not_leave_their_folders(client: TestClient, name: str) -> None:
    for path, body in (
        ("/v1/internal/model/load", {"model_name": name}),
        ("/v1/internal/model/plan", {"model_name": name}),
        ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = client.post(path, json=body, headers=KEYS[Role.ADMIN])
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["/etc/passwd", "settings.yaml", "models/demo/config.json", "../../../etc/passwd"])
def test_files_are_not_served(client: TestClient, path: str) -> None:
    for role in Role:
        for way in ("/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/"):
            answer = client.get(f"{way}{path}", headers=KEYS[role])
            assert answer.status_code >= 400, (role, way)


def test_a_chat_of_very_many_messages_is_refused_at_once(client: TestClient) -> None:
    messages = '{"role":"user","content":""},' * 999_999 + '{"role":"user","content":"x"}'
    headers = {**KEYS[Role.GUEST], "content-type": "application/json"}
    answer = client.post("/v1/chat/completions", content=f'{{"messages":[{messages}]}}', headers=headers)
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["message"]


def test_half_characters_are_refused_and_break_nothing(client: TestClient) -> None:
    half = b'"\\ud800"'
    headers = {**KEYS[Role.ADMIN], "content-type": "application/json"}
    for path, body in (
        ("/v1/internal/model/load", b'{"model_name": %s}'),
        ("/v1/internal/encode", b'{"text": %s}'),
        ("/v1/completions", b'{"prompt": %s}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": %s}]}'),
    ):
        answer = client.post(path, content=body % half, headers=headers)
        assert 400 <= answer.status_code < 500, (path, answer.text)
