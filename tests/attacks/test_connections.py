"""More connections than a server may hold open, on real sockets: those who open them keep nobody else out."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from modules.web.connections import Bounds, Connections, Listener, bounds
from tests.conftest import ROOT, wait_until
from tests.e2e.conftest import Server
from tests.supervised import until

FILES = 256
LIMITED = ("bash", "-c", f'ulimit -n {FILES}; exec "$@"', "-")


@pytest.fixture
def scarce(tmp_path: Path) -> Iterator[Server]:
    """A server that may hold few files open."""
    command = [*LIMITED, sys.executable, "server.py", "--listen-port", "0", "--no-hf-cache", "--no-warm-worker",
               "--api-key", "guest-key", "--home", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Server(process, tmp_path)
    until(lambda: bool(server.url) or process.poll() is not None, "the server's address", 120)
    yield server
    process.terminate()
    process.wait(15)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def healthy(url: str, address: str = "127.0.0.2") -> bool:
    """Whether the server answers somebody at another address of this machine, without a connection of before."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=5) as client:
        return client.get(f"{url}/healthz").status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine")
def test_connections_of_one_address_keep_nobody_out(scarce: Server) -> None:
    host, _, port = scarce.url.removeprefix("http://").partition(":")
    most = bounds(FILES).loopback
    with ExitStack() as stack:
        held = [
            stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=10)))
            for _ in range(FILES + 50)
        ]
        wait_until(lambda: sum(map(is_closed, held)) >= len(held) - most)
        assert healthy(scarce.url)
        assert sum(not is_closed(one) for one in held) == most
    wait_until(lambda: healthy(scarce.url, host))
    output = "".join(scarce.output)
    assert "Traceback" not in output
    assert output.count("further ones, of 127.0.0.1 for one, are closed") == 1


def test_an_address_has_a_quarter_of_all_connections() -> None:
    connections = Connections(bounds(64))
    taken = [connections.enter("192.0.2.1") for _ in range(10)]
    assert [leave is not None for leave in taken] == [True] * 8 + [False] * 2
    assert connections.enter("192.0.2.2")
    network = [connections.enter(f"2001:db8::{at}") for at in range(1, 11)]
    assert [leave is not None for leave in network] == [True] * 8 + [False] * 2, "one machine may have all of these"
    assert taken[0] is not None
    taken[0]()
    assert connections.enter("192.0.2.1")
    assert not connections.enter("192.0.2.1")


def test_all_together_have_a_bound() -> None:
    connections = Connections(Bounds(together=6, each=2, loopback=4))
    proxy = [connections.enter("127.0.0.1") for _ in range(5)]
    assert [leave is not None for leave in proxy] == [True] * 4 + [False]
    assert connections.enter("192.0.2.1")
    assert connections.enter("192.0.2.2")
    assert not connections.enter("192.0.2.3")
    assert proxy[0] is not None
    proxy[0]()
    assert connections.enter("192.0.2.3")


def test_a_connection_counts_until_it_is_closed() -> None:
    connections = Connections(Bounds(2, 1, 1))
    with Listener(socket.create_server(("127.0.0.1", 0)), connections) as listener:
        with ExitStack() as stack:
            stack.enter_context(closing(socket.create_connection(listener.getsockname())))
            taken = stack.enter_context(closing(listener.accept()[0]))
            taken.close()  # twice, in the end, and counted once
            second = stack.enter_context(closing(socket.create_connection(listener.getsockname())))
            stack.enter_context(closing(listener.accept()[0]))
            late = stack.enter_context(closing(socket.create_connection(listener.getsockname())))
            with pytest.raises(ConnectionAbortedError):
                listener.accept()
            late.settimeout(5)
            assert late.recv(1) == b""
            assert not is_closed(second)
        assert not connections._open


def test_the_bounds_follow_from_the_files_that_may_be_open() -> None:
    assert bounds(1024) == Bounds(512, 128, 384)
    assert bounds(1 << 20) == Bounds(4096, 1024, 3072)
    assert bounds(0).each >= 1


def test_the_soft_limit_of_files_is_raised_to_the_hard_one() -> None:
    code = ("import resource as r; from modules.web.connections import open_files; "
            "r.setrlimit(r.RLIMIT_NOFILE, (128, 512)); print(open_files(), r.getrlimit(r.RLIMIT_NOFILE))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "512 (512, 512)\n"
