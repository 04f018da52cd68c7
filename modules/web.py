"""The web application: page and API behind one access check, on one port of 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import webbrowser
from collections.abc import Callable

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import uvicorn
from fastapi import FastAPI

from modules import access, api, ui
from modules.errors import PortInUse
from modules.service import Service

HOST = "127.0.0.1"
_LAST_ANSWERS_S = 0.1  # for answers that waited for a model, once there is none to wait for


def listen(port: int) -> socket.socket:
    """A listening socket on that port, or on a free one for 0. Raises PortInUse."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise PortInUse(f"Port {port} on {HOST} cannot be opened: {error.strerror or error}.") from None
    listener.listen(128)
    return listener


def application(service: Service) -> access.AccessMiddleware:
    """Page and API, behind the access check."""
    app = FastAPI(title="Loadstone", docs_url=None, redoc_url=None)
    api.install(app, service)
    ui.mount(app, service)
    return access.AccessMiddleware(app)


class _Server(uvicorn.Server):
    """``when_up`` is called when requests are answered, ``when_ending`` before their connections are closed."""

    def __init__(self, config: uvicorn.Config, when_up: Callable[[], None], when_ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_up = when_up
        self._when_ending = when_ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what would not end by itself: an open page listens for as long as it is open.

        uvicorn waits for such connections, then cancels their tasks and logs a traceback for each.
        """
        await asyncio.to_thread(self._when_ending)
        await asyncio.sleep(_LAST_ANSWERS_S)
        for connection in list(self.server_state.connections):
            connection.transport.close()
        await super().shutdown(sockets)


def serve(service: Service, listener: socket.socket, *, open_browser: bool, verbose: bool) -> None:
    """Serve until Ctrl-C or SIGTERM, which end the workers too. The warm one starts when the page is up."""
    url = f"http://{HOST}:{listener.getsockname()[1]}"

    def when_up() -> None:
        print(f"Loadstone runs at {url}", flush=True)
        threading.Thread(target=service.supervisor.start, name="warm-worker-start", daemon=True).start()
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    config = uvicorn.Config(
        application(service),
        log_level="info" if verbose else "warning",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    _Server(config, when_up, when_ending=service.supervisor.close).run(sockets=[listener])
