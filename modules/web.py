"""The web application: page and API behind one access check, on one port of 127.0.0.1."""

from __future__ import annotations

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
    def __init__(self, config: uvicorn.Config, when_up: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_up = when_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_up()


def serve(service: Service, listener: socket.socket, *, open_browser: bool, verbose: bool) -> None:
    """Serve until Ctrl-C or SIGTERM. The warm worker starts when the page is up, not before."""
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
    _Server(config, when_up).run(sockets=[listener])
