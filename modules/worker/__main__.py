"""``python -m modules.worker``: read Hello from stdin, serve the commands, load one model, end with stdin."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import traceback
from typing import NoReturn

from modules.protocol import Hello, Listening, decode
from modules.worker import process

_SWITCH_S = 0.0005  # how long the engine may keep the interpreter from the thread that sends what it made
_FOR_EVER_S = 10 * 365 * 86400


def main() -> NoReturn:
    """Serve until the process is ended. Exits with status 2 where stdin does not begin with Hello."""
    stdin = process.claim_stdin()
    emit = process.claim_stdout()
    process.take_signals()
    process.set_environment()
    process.offer_to_oom_killer()
    hello = _hello(process.read_line(stdin))
    process.end_with(stdin)

    from modules.worker.app import Worker, make_app  # from here on the end of stdin is watched
    from modules.worker.engine import Engine

    engine = Engine()
    worker = Worker(engine, emit)
    if hello.imports:
        engine.submit(worker.warm_up)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so for sockets of its own alone
    threading.Thread(target=_serve, args=(make_app(worker, hello.secret), listener), daemon=True).start()
    emit(Listening(os.getpid(), listener.getsockname()[1]))
    sys.setswitchinterval(_SWITCH_S)
    engine.run()


def _hello(line: bytes) -> Hello:
    try:
        hello = decode(line)
        if isinstance(hello, Hello):
            return hello
    except ValueError:
        pass
    print(f"A worker is started by the web process, which says Hello first, not {line[:80]!r}.", file=sys.stderr)
    sys.exit(2)


def _serve(app: object, listener: socket.socket) -> None:
    """Serve on a thread of its own: the main thread is the engine's, where libraries may set signals."""
    import uvicorn

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        timeout_keep_alive=_FOR_EVER_S,  # the web process keeps its connections, and must not find one just closed
    )
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    except BaseException:
        traceback.print_exc()  # the log is all that is left to tell why
    finally:
        process.end_group()  # a worker that hears no commands is of no use


if __name__ == "__main__":
    main()
