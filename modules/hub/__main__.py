"""The process of one download: reads an Order as a line of JSON, writes Progress … and, where it failed, Failed.

The end of its stdin means that the web process is gone: it exits then. What has come stays, to be gone on with.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback

from modules.errors import InternalError, LoadstoneError
from modules.hub.job import Order
from modules.hub.running import run
from modules.protocol import Failed, Progress, encode

_EVERY_S = 0.2
_output = threading.Lock()


def main() -> int:
    """The exit status: 0 when the model is in place."""
    order = Order.from_dict(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_exit_with_the_server, daemon=True).start()
    try:
        run(order, _Teller(order.size_bytes))
    except LoadstoneError as error:
        _write(Failed(error))
        return 1
    except Exception as error:
        details = traceback.format_exc()
        _write(Failed(InternalError(f"{type(error).__name__}: {error}", details=details)))
        return 1
    return 0


class _Teller:
    """Passes progress on, a few times a second and whenever the stage changes."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._last = (0.0, "")

    def __call__(self, stage: str, done: int) -> None:
        now = time.monotonic()
        if now - self._last[0] >= _EVERY_S or stage != self._last[1]:
            self._last = (now, stage)
            _write(Progress(stage, done, self._total, "bytes"))


def _write(message: Progress | Failed) -> None:
    with _output:
        sys.stdout.buffer.write(encode(message))
        sys.stdout.buffer.flush()


def _exit_with_the_server() -> None:
    while os.read(0, 1024):  # not through sys.stdin, whose lock a thread may not hold when the interpreter ends
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
