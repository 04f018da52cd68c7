"""Host and Origin checks, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from modules.access import LOCAL_NAMES, Hosts, host_name, machine_addresses, machine_names, refusal


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:7860", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:7860", "::1"),
        ("localhost.", "localhost"),
        ("", ""),
        ("[::1", ""),
        ("user@evil.example", "evil.example"),
        ("127.0.0.1.evil.example", "127.0.0.1.evil.example"),
    ],
)
def test_host_name(authority: str, name: str) -> None:
    assert host_name(authority) == name


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        ({"host": "127.0.0.1:7860"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, True),
        ({"host": "localhost", "origin": "http://localhost", "sec-fetch-site": "same-origin"}, True),
        ({"host": "localhost", "sec-fetch-site": "none"}, True),
        ({"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "document"}, True),
        ({}, False),
        ({"host": "evil.example"}, False),
        ({"host": "localhost.evil.example"}, False),
        ({"host": "localhost:7860", "origin": "http://localhost:7861"}, False),
        ({"host": "localhost", "origin": "https://localhost"}, False),
        ({"host": "localhost", "origin": "null"}, False),
        ({"host": "localhost", "origin": ""}, False),
        ({"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "iframe"}, False),
    ],
)  # fmt: skip
def test_refusal(headers: dict[str, str], served: bool) -> None:
    assert (refusal(Headers(headers), "http", LOCAL_NAMES) is None) is served


@given(st.text(max_size=60))
def test_no_host_but_the_servers_own_is_served(host: str) -> None:
    if refusal(Headers({"host": "x"}), "http", LOCAL_NAMES) is None:
        raise AssertionError
    error = refusal(Headers(raw=[(b"host", host.encode("latin-1", "replace"))]), "http", LOCAL_NAMES)
    assert error is None or error.kind == "access_refused"
    if error is None:
        assert host_name(host) in LOCAL_NAMES


def test_what_a_proxy_forwards_counts_beside_what_it_sends() -> None:
    hosts = Hosts({*LOCAL_NAMES, "llm.example.org"})
    forwarded = {"host": "127.0.0.1:7860", "x-forwarded-host": "llm.example.org", "x-forwarded-proto": "https"}
    for origin in ("https://llm.example.org", "http://127.0.0.1:7860"):
        assert refusal(Headers({**forwarded, "origin": origin}), "http", hosts) is None
    assert refusal(Headers({**forwarded, "origin": "https://evil.example"}), "http", hosts) is not None
    assert refusal(Headers({**forwarded, "x-forwarded-host": "evil.example"}), "http", hosts) is not None
    # A page that reached this server under a name of its own can send any header, but not another Host.
    assert refusal(Headers({**forwarded, "host": "evil.example"}), "http", hosts) is not None


def test_who_listens_goes_by_the_machines_names_and_addresses() -> None:
    names = [*machine_names(), *machine_addresses()]
    assert machine_names()
    assert all(Hosts(listening=True).known(name) for name in names)
    assert not any(Hosts().known(name) for name in names if name not in LOCAL_NAMES)
    assert not Hosts(listening=True).known("evil.example")
    hosts = Hosts()
    hosts.add("abc.tunnel.example")
    assert hosts.known("abc.tunnel.example")
