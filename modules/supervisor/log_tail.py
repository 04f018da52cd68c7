"""The last lines of a worker's stderr, as a terminal would show them."""

from __future__ import annotations

import codecs
import re
import threading
from collections import deque

MAX_LINES = 200
_MAX_LINE_CHARS = 2000
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BREAKS = re.compile(r"(\r\n|\n|\r)")


class LogTail:
    """At most 200 lines of at most 2,000 characters. A progress bar that redraws itself after \\r is one line."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._open = ""  # the line that has not ended yet
        self._rewind = False  # \r came: what comes next replaces the open line
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lock = threading.Lock()

    def feed(self, data: bytes) -> None:
        """More of the stream, cut anywhere."""
        with self._lock:
            for part in _BREAKS.split(self._decoder.decode(data)):
                self._take(part)

    def add(self, line: str) -> None:
        """A whole line from elsewhere."""
        with self._lock:
            self._lines.append(line[:_MAX_LINE_CHARS])

    def _take(self, part: str) -> None:
        if part == "\r":
            self._rewind = True
        elif part in ("\n", "\r\n"):
            self._lines.append(_ESCAPES.sub("", self._open))
            self._open, self._rewind = "", False
        elif part:
            self._open = (part if self._rewind else self._open + part)[:_MAX_LINE_CHARS]
            self._rewind = False

    def lines(self) -> tuple[str, ...]:
        with self._lock:
            open_line = _ESCAPES.sub("", self._open)
            lines = (*self._lines, open_line) if open_line.strip() else tuple(self._lines)
            return lines[-MAX_LINES:]
