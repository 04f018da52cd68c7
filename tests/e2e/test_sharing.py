"""The page shared: two people in two browsers, on a phone and in the dark, over TLS and behind a proxy."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from modules.web.announcing import announce, qr_code
from tests.e2e.conftest import ROOT, Server, wait_for

Launch = Callable[..., Server]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address in a browser of its own. What fails there is printed, for the message of a failing test."""
    contexts = []

    def opened(url: str, *, width: int = 1280, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", ignore_https_errors=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: print("error on the page:", error))
        page.on("requestfailed", lambda request: print("failed:", request.url, request.failure))
        page.on("response", lambda answer: print(answer.status, answer.url) if answer.status >= 400 else None)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()


def log_in(page: Page, user: str, password: str) -> None:
    page.fill("#user", user)
    page.fill("#password", password)
    page.get_by_role("button", name="Log in").click()


def test_a_guest_and_an_administrator_in_two_browsers(
    launch: Launch, visit: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the public address that was asked for cannot be had."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody is there
    server = launch("--gradio-auth", "root:one", "--guest-auth", "gast:drei", "--no-warm-worker", "--share")
    guest = visit(server.url, width=390, dark=True)
    assert guest.evaluate("document.documentElement.scrollWidth") <= 390
    assert guest.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 23, 42)"
    log_in(guest, "gast", "wrong")
    expect(guest.get_by_role("alert")).to_have_text("That is not right.")
    log_in(guest, "gast", "drei")
    expect(guest.get_by_role("tab", name="Chat")).to_be_visible(timeout=30_000)
    assert guest.get_by_role("tab").all_text_contents() == ["Chat"]
    assert guest.locator("#load, #unload, #session").count() == 0

    admin = visit(server.url)
    log_in(admin, "root", "one")
    expect(admin.locator("#model input")).not_to_have_value("", timeout=30_000)
    admin.locator("#load").click()
    expect(guest.locator("#status")).to_contain_text("float32", timeout=60_000)  # loaded, and nobody reloaded the page
    guest.locator("#message textarea").fill("What is the capital of France?")
    guest.keyboard.press("Enter")
    expect(guest.locator("#chatbot .bot")).to_contain_text(re.compile(r"\w\w"), timeout=60_000)
    guest.get_by_role("button", name="Log out").click()
    expect(guest.locator("#password")).to_be_visible()
    guest.goto(server.url)
    expect(guest.locator("#password")).to_be_visible()
    assert "no public address" in "".join(server.output)


@pytest.fixture
def behind_nginx(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start nginx in front of a server, with TLS and the lines that README gives; the address of the page there."""
    if not (nginx := shutil.which("nginx")):
        pytest.skip("nginx is not installed")
    folder = tmp_path / "nginx"
    folder.mkdir()
    file, key = certificate(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    location = re.search(r"^ +location /llm/ \{.*?^ +\}$", readme, re.DOTALL | re.MULTILINE)
    assert location is not None
    running: list[subprocess.Popen[bytes]] = []

    def start(url: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        temporary = "".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}} "
            f"http {{ {temporary} access_log off; server {{ listen 127.0.0.1:{port} ssl; "
            f"ssl_certificate {file}; ssl_certificate_key {key};\n"
            f"{location[0].replace('http://127.0.0.1:7860', url)}\n}} }}"
        )
        running.append(subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"]))
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "nginx")
        return f"https://localhost:{port}/llm/"

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def test_two_roles_behind_nginx_under_a_path_with_tls(
    launch: Launch, visit: Callable[..., Page], behind_nginx: Callable[[str], str]
) -> None:
    """Logging in, loading, an answer as it comes, and out again; the API beside it."""
    server = launch("--subpath", "/llm", "--gradio-auth", "root:one", "--guest-auth", "gast:drei", "--no-warm-worker")
    url = behind_nginx(server.url.removesuffix("/llm"))
    admin, guest = visit(url), visit(url, width=390, dark=True)
    log_in(admin, "root", "one")
    log_in(guest, "gast", "drei")
    expect(admin.locator("#model input")).not_to_have_value("", timeout=30_000)
    expect(guest.get_by_role("tab", name="Chat")).to_be_visible(timeout=30_000)
    assert guest.locator("#load, #unload, #session").count() == 0
    for page in (admin, guest):
        assert page.url == url
        [cookie] = page.context.cookies()
        assert (cookie["secure"], cookie["path"]) == (True, "/llm/")
    admin.locator("#load").click()
    expect(guest.locator("#status")).to_contain_text("float32", timeout=60_000)
    guest.locator("#message textarea").fill("What is the capital of France?")
    guest.keyboard.press("Enter")
    expect(guest.locator("#chatbot .bot")).to_contain_text(re.compile(r"\w\w"), timeout=60_000)
    trusting = httpx.Client(verify=False, headers={"origin": url.removesuffix("/llm/")})
    assert trusting.get(f"{url}v1/models").status_code == 401
    assert trusting.get(f"{url}v1/models", auth=("gast", "drei")).json()["data"][0]["loaded"] is True
    assert trusting.get(f"{url}v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    guest.get_by_role("button", name="Log out").click()
    expect(guest.locator("#password")).to_be_visible()
    expect(admin.locator("#status")).to_contain_text("float32")


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost and its key, made by openssl."""
    key, file = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", file, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return file, key


def test_over_tls_by_the_address_in_the_qr_code(launch: Launch, visit: Callable[..., Page], tmp_path: Path) -> None:
    """With a password that was made; its address logs in by itself, and does not keep it in the browser's bar."""
    file, key = certificate(tmp_path)
    server = launch("--listen", "--ssl-certfile", str(file), "--ssl-keyfile", str(key), "--no-warm-worker")
    assert server.url.startswith("https://127.0.0.1:")
    password = re.search(r"Password: +(\S+)", "".join(server.output))
    assert password is not None
    page = visit(f"{server.url}/login#key={password[1]}")
    expect(page.get_by_role("tab", name="Model")).to_be_visible(timeout=30_000)
    assert page.url == f"{server.url}/"
    [cookie] = page.context.cookies()
    assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Lax")
    trusted = ssl.create_default_context(cafile=str(file))
    answer = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {password[1]}"}, verify=trusted)
    assert answer.status_code == 200
    assert httpx.get(f"{server.url}/v1/models", verify=trusted).status_code == 401


def test_a_terminal_shows_where_to_go_and_the_code_for_it() -> None:
    """Addresses, the password once, and the QR code, which holds both; in a log there is no code."""
    network, password = ["http://192.0.2.7:7860", "http://[2001:db8::7]:7860"], "abcd-efgh"
    log = io.StringIO()
    announce("http://127.0.0.1:7860", network, password, log)
    assert [address for address in network if address not in log.getvalue()] == []
    assert log.getvalue().count(password) == 1
    expected = f"{log.getvalue()}{qr_code(f'{network[0]}/login#key={password}')}\n"
    main, other = pty.openpty()
    with os.fdopen(other, "w", encoding="utf-8") as terminal, os.fdopen(main, "r", encoding="utf-8") as screen:
        announce("http://127.0.0.1:7860", network, password, terminal)
        shown = screen.read(len(expected))
    assert shown == expected
    assert "█" in shown
    assert qr_code("x", "ascii") == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gradio-auth", "hunter2"), "user:password"),
        (("--ssl-certfile", "/nowhere"), "both --ssl-certfile and --ssl-keyfile"),
        (("--ssl-certfile", "/nowhere", "--ssl-keyfile", "/nowhere"), "cannot be used for HTTPS"),
        (("--listen-host", "no.such.host.invalid"), "--listen-host"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(home: Path, flags: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "server.py", "--home", str(home), "--no-hf-cache", "--listen-port", "0", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "Traceback" not in ended.stderr
