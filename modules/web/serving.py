"""Page and API on one port: who gets which, where to listen, and the server that runs until it is ended."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import uvicorn
from fastapi import FastAPI

from modules import access, api, collector, ui
from modules.access import Role
from modules.errors import OptionError, PortInUse
from modules.options import ServerOptions
from modules.service import Service
from modules.web import announcing
from modules.web.connections import Connections, Listener, bounds, open_files
from modules.web.patience import PatientProtocol
from modules.web.watching import Watching

LOCAL = "127.0.0.1"
_EVERYWHERE = ("0.0.0.0", "::", "")
_LAST_ANSWERS_S = 0.3  # for answers that waited for a model, once there is none to wait for


@dataclass(frozen=True)
class Door:
    """Who may come in, under which names, with which certificate.

    ``made``: the password that was made, to be printed once; "" where none was needed.
    """

    credentials: access.Credentials
    hosts: access.Hosts
    subpath: str = ""
    made: str = ""
    certificate: str = ""  # the files for HTTPS; "" for HTTP
    certificate_key: str = ""


def open_door(server: ServerOptions) -> Door:
    """The access that the options ask for. Raises OptionError, for a certificate that cannot be used too."""
    credentials, made = access.from_options(server)
    address = listen_address(server)
    names = {*access.LOCAL_NAMES, *(_name(host) for host in server.allowed_host if _name(host))}
    if address not in _EVERYWHERE:
        names.add(address.lower())
    hosts = access.Hosts(names, listening=address not in access.LOCAL_NAMES)
    return Door(credentials, hosts, server.subpath, made, *_certificate(server))


def _name(host: str) -> str:
    """The name alone, of a whole address too: https://llm.example.org:8443/ is pasted."""
    return access.host_name(host.split("://")[-1])


def listen_address(server: ServerOptions) -> str:
    """The address to listen on: this machine alone, unless told otherwise."""
    return server.listen_host or ("0.0.0.0" if server.listen else LOCAL)


def local_address(server: ServerOptions) -> str:
    """An address under which the server listens to this machine: with --listen-host not always 127.0.0.1."""
    address = listen_address(server)
    return LOCAL if address in _EVERYWHERE else address


def listen(port: int, host: str = LOCAL) -> socket.socket:
    """A listening socket on that port, or on a free one for 0. Raises PortInUse, and OptionError for a bad address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OptionError(f"--listen-host: {host} is no address of this machine: {error.strerror}.") from None
    family, kind, _, _, address = found[0]
    listener = socket.socket(family, kind)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise PortInUse(f"Port {port} on {host} cannot be opened: {error.strerror or error}.") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for the client's ACK
    listener.listen(128)
    return listener


@collector.spared()
def application(service: Service, door: Door | None = None) -> access.AccessMiddleware:
    """Page and API, behind the access check. Guests get an application of their own, with nothing in it to abuse."""
    door = door or open_door(ServerOptions())
    root = "/" + door.subpath.strip("/") if door.subpath.strip("/") else ""
    applications = {}
    guests = None
    if door.credentials.has_guests:
        guests = applications[Role.GUEST] = FastAPI(title="Loadstone", docs_url=None, redoc_url=None)
        api.install(guests, service, for_guests=True)
        ui.mount(guests, service, for_guests=True, root_path=root)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if guests is not None:
                await stack.enter_async_context(guests.router.lifespan_context(guests))
            yield

    app = applications[Role.ADMIN] = FastAPI(title="Loadstone", docs_url=None, redoc_url=None, lifespan=lifespan)
    api.install(app, service)
    ui.mount(app, service, login=bool(door.credentials), root_path=root)
    return access.AccessMiddleware(applications, door.credentials, door.hosts, subpath=door.subpath)


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


def serve(service: Service, listener: socket.socket, server: ServerOptions, door: Door) -> None:
    """Serve until Ctrl-C or SIGTERM, which end the workers too. The warm one starts when the page is up."""
    port = listener.getsockname()[1]
    url, network = addresses(server, port)

    def when_up() -> None:
        announcing.announce(url, network, door.made)
        _in_background("warm-worker-start", service.fleet.start)
        service.downloads.start()
        if server.auto_launch:
            _in_background("browser", webbrowser.open, url)
        if server.share:
            _in_background("share", announcing.share, local_address(server), port, bool(door.certificate), shared)

    def shared(address: str) -> None:
        door.hosts.add(_name(address))
        announcing.announce_shared(address, door.made)

    config = uvicorn.Config(
        Watching(application(service, door), service.traffic),
        log_level="info" if server.verbose else "warning",
        timeout_graceful_shutdown=1,
        server_header=False,
        loop="asyncio",  # which counts connections
        http=PatientProtocol,
        ssl_certfile=door.certificate or None,
        ssl_keyfile=door.certificate_key or None,
    )
    counted = Listener(listener, Connections(bounds(open_files())))
    _Server(config, when_up, when_ending=service.fleet.close).run(sockets=[counted])


def _in_background(name: str, function: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, name=name, daemon=True).start()


def addresses(server: ServerOptions, port: int) -> tuple[str, list[str]]:
    """The page's address on this machine, and those on the network."""
    scheme = "https" if server.ssl_certfile else "http"
    host, path = listen_address(server), "/" + server.subpath.strip("/") if server.subpath.strip("/") else ""
    if host in _EVERYWHERE:
        names = [name for name in access.machine_addresses() if ":" not in name or host == "::"]
        return f"{scheme}://{LOCAL}:{port}{path}", [f"{scheme}://{_bracketed(name)}:{port}{path}" for name in names]
    url = f"{scheme}://{_bracketed(host)}:{port}{path}"
    return url, [] if host in access.LOCAL_NAMES else [url]


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _certificate(server: ServerOptions) -> tuple[str, str]:
    """The files of certificate and key, both "" for plain HTTP. Raises OptionError for some that cannot be used."""
    if not (server.ssl_certfile or server.ssl_keyfile):
        return "", ""
    if not (server.ssl_certfile and server.ssl_keyfile):
        raise OptionError("HTTPS needs both --ssl-certfile and --ssl-keyfile.")
    certificate, key = (str(Path(name).expanduser()) for name in (server.ssl_certfile, server.ssl_keyfile))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise OptionError(f"{certificate} and {key} cannot be used for HTTPS: {error}.") from None
    return certificate, key
