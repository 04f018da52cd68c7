"""A real child process that speaks modules/protocol.py without an ML package, and can be told to misbehave.

Started with the command line ``fake_worker.py [TAG=…] [FAULT …]``; the faults of starting:

================  =======================================================
never-listen      says nothing, for ever
exit=N            exits with status N before it listens
fail-warm         says that its imports failed
die-warm          says that it is warm, then exits with status 7
ignore-term       ignores SIGTERM from the beginning
================  =======================================================

What a load does stands in the order's name, as words set apart by spaces; other words are a name only:

================  =======================================================
hang              never gets ready
steps=N           N steps of progress, 20 ms each; ``slow`` is steps=100
signal=NAME       dies by that signal while it loads
exit=N            exits with status N while it loads
fail              answers Failed(OutOfMemory)
refuse            refuses the order
ignore-term       ignores SIGTERM
grandchild        starts a process that ignores SIGTERM, and holds the pipes
garbage           prints on stdout what is no message
bar               draws a progress bar on stderr, and three hundred lines
================  =======================================================

What a set of LoRAs does stands in their names, as words: ``hang``, ``refuse``, ``signal=NAME``; their folders are
not looked at. The report says that each moves the model by its weight.

What an answer does stands in the prompt: ``hang`` (after one piece), ``mute`` (no piece at all), ``fail``,
``too long`` (refused), ``cut`` (ends without an end), ``signal=NAME`` (after two pieces), ``forever``, or a
number of tokens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from modules.errors import (
    AdapterMismatch,
    LoadstoneError,
    MissingPackage,
    OutOfMemory,
    RequestTooLong,
    UnsupportedModel,
)
from modules.protocol import (
    ADAPTERS,
    COUNT,
    GENERATE,
    LOAD,
    MEMORY,
    AdapterChoice,
    AdaptersOrder,
    AdaptersReport,
    Done,
    Failed,
    GenerateOrder,
    Hello,
    Listening,
    LoadOrder,
    LoadReport,
    Memory,
    Piece,
    Progress,
    Ready,
    Warm,
    decode,
    encode,
)

_output = threading.Lock()
_ignores_term = threading.Event()


def say(event: Any) -> None:
    with _output:
        sys.stdout.buffer.write(encode(event))
        sys.stdout.buffer.flush()


def forever() -> None:
    while True:
        time.sleep(3600)


def value_of(words: list[str], key: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), "")


def die(words: list[str]) -> None:
    """End as the words say, if they do."""
    if name := value_of(words, "signal"):
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.Signals[name])
        forever()
    if status := value_of(words, "exit"):
        print("last words", file=sys.stderr, flush=True)
        os._exit(int(status))


def report(name: str) -> LoadReport:
    """The report's kwargs are this process's environment, for the test that reads it back."""
    return LoadReport(
        architecture="FakeForCausalLM", parameters=1, footprint_bytes=2, device_bytes={"cpu": 2}, dtype="bfloat16",
        layer_classes={"Linear": 1}, device_map={"": "cpu"}, context_limit=2048, tokenizer_class="Fake",
        tokenizer_is_fast=True, has_chat_template=True, attn_implementation="sdpa",
        kwargs={**os.environ, "cwd": os.getcwd(), "argv": " ".join(sys.argv)}, load_seconds=0.0, notes=(name,),
    )  # fmt: skip


def applied(adapters: tuple[AdapterChoice, ...]) -> AdaptersReport:
    return AdaptersReport(adapters, sum(choice.weight for choice in adapters) if adapters else None, 0.0)


def load(order: LoadOrder) -> None:
    words = order.name.split()
    if "ignore-term" in words:
        _ignores_term.set()
    if "grandchild" in words:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
        command = [sys.executable, "-c", f"{code}; time.sleep(3600)", *sys.argv[1:]]
        subprocess.Popen(command, stdout=sys.stderr)
    if "garbage" in words:
        with _output:
            sys.stdout.buffer.write(b'garbage \xff on stdout\n{"is": "Ready"}\n[1, 2]\n{"is": "Nothing"}\n')
    if "bar" in words:
        lines = "".join(f"line {number}\n" for number in range(300))
        print(lines, "".join(f"\r{percent}%" for percent in range(101)), sep="", file=sys.stderr, flush=True)
    say(Progress("reading", 1, 10, "bytes"))
    die(words)
    if "hang" in words:
        forever()
    steps = 100 if "slow" in words else int(value_of(words, "steps") or 0)
    for step in range(steps):
        say(Progress("reading", step, steps, "bytes"))
        time.sleep(0.02)
    if "fail" in words:
        say(Failed(OutOfMemory("The fake GPU is full.", fix={"load_in_4bit": True})))
        forever()
    adapters = applied(order.adapters) if order.adapters else None
    say(Ready(report(order.name), Memory(rss_bytes=os.getpid(), peak_rss_bytes=1), adapters))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as the worker: else what follows waits 40 ms for the reader's ACK
    secret = ""

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._allowed() and self.path == MEMORY:
            self._answer(200, encode(Memory(rss_bytes=os.getpid(), peak_rss_bytes=1)))

    def do_POST(self) -> None:
        message = decode(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path == LOAD:
            self._load(message)
        elif self.path == ADAPTERS:
            self._apply(message)
        elif self.path == COUNT:
            self._answer(200, json.dumps({"tokens": len(message.prompt.split())}).encode())
        elif self.path == GENERATE:
            self._generate(message)

    def _allowed(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {self.secret}":
            return True
        self._answer(401, b"no")
        return False

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, error: LoadstoneError) -> None:
        self._answer(error.status, json.dumps(error.to_dict()).encode())

    def _load(self, order: LoadOrder) -> None:
        if "refuse" in order.name.split():
            self._refuse(UnsupportedModel("The fake takes no such order."))
            return
        self._answer(202, b"{}")
        threading.Thread(target=load, args=(order,), daemon=True).start()

    def _apply(self, order: AdaptersOrder) -> None:
        words = [word for choice in order.adapters for word in choice.name.split()]
        die(words)
        if "hang" in words:
            forever()
        if "refuse" in words:
            self._refuse(AdapterMismatch("The fake takes no such LoRA."))
            return
        self._answer(200, encode(applied(order.adapters)))

    def _generate(self, order: GenerateOrder) -> None:
        words = order.prompt.split()
        if order.prompt == "too long":
            self._refuse(RequestTooLong("The fake's context is short."))
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(words)
        except OSError:
            print("the reader went away", file=sys.stderr, flush=True)
            self.close_connection = True

    def _stream(self, words: list[str]) -> None:
        if "mute" in words:
            forever()
        count = next((int(word) for word in words if word.isdigit()), 2)
        for number in range(1, (10**9 if "forever" in words else count) + 1):
            self._chunk(encode(Piece(f"{number} ", number)))
            time.sleep(0.005)
            if "hang" in words:
                forever()
        die(words)
        if "cut" in words:
            self.close_connection = True
            return
        if "fail" in words:
            self._chunk(encode(Failed(OutOfMemory("The fake GPU is full."))))
        else:
            self._chunk(encode(Done("stop", 10, count, 0.1, count / 50)))
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def exit_with_the_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def end_unless_told_not_to(number: int, _: object) -> None:
    if not _ignores_term.is_set():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def main() -> None:
    words = sys.argv[1:]
    signal.signal(signal.SIGTERM, end_unless_told_not_to)
    if "ignore-term" in words:
        _ignores_term.set()
    hello = decode(sys.stdin.buffer.readline())
    assert isinstance(hello, Hello)
    threading.Thread(target=exit_with_the_parent, daemon=True).start()
    die(words)
    if "never-listen" in words:
        forever()
    Handler.secret = hello.secret
    ThreadingHTTPServer.request_queue_size = 128  # as the worker's: with 5, many at once are reset
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    say(Listening(os.getpid(), server.server_address[1]))
    if hello.imports and "fail-warm" in words:
        say(Failed(MissingPackage("torch is missing.")))
    elif hello.imports:
        say(Warm(0.0))
        if "die-warm" in words:
            os._exit(7)
    server.serve_forever()


if __name__ == "__main__":
    main()
