"""The supervisor's pure parts: what an exit means, and what a log's tail holds."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import WorkerCrashed, WorkerKilled
from modules.protocol import Progress
from modules.supervisor import decode_exit
from modules.supervisor.exits import oom_kills
from modules.supervisor.log_tail import MAX_LINES, LogTail
from modules.supervisor.state import Record, State
from tests.supervised import order


def test_a_kill_is_certain_only_where_the_kernel_counted_one() -> None:
    certain = decode_exit(-signal.SIGKILL, 4, 5, ["Loading …"])
    likely = decode_exit(-signal.SIGKILL, 4, 4, [])
    assert type(certain) is type(likely) is WorkerKilled
    assert "by the kernel's out-of-memory killer" in certain.message
    assert "most likely" in likely.message
    assert "someone ended it" in likely.message
    assert certain.details == "Loading …"


@given(st.integers(-64, 255), st.integers(0, 3), st.integers(0, 3), st.lists(st.text(), max_size=3))
def test_every_exit_has_a_message_that_names_it(status: int, before: int, after: int, tail: list[str]) -> None:
    error = decode_exit(status, before, after, tail)
    assert isinstance(error, WorkerCrashed)
    assert error.hint
    assert error.details == "\n".join(tail)
    known = {number.value: number.name for number in signal.Signals}
    assert known.get(-status, str(abs(status))) in error.message


def test_the_kernels_counters_can_be_read() -> None:
    assert oom_kills() >= 0


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo\n", ("one", "two")),
        (b"one\r\ntwo", ("one", "two")),
        (b" 10%\r 50%\r100%\ndone\n", ("100%", "done")),
        (b"\r 10%\r 50%", (" 50%",)),
        (b"\r100%\r", ("100%",)),
        (b"\x1b[A\x1b[31mred\x1b[0m\n", ("red",)),
        ("Größe\n".encode(), ("Größe",)),
        (b"\xff\n", ("\ufffd",)),
        (b"\n", ("",)),
        (b"", ()),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_log_reads_as_a_terminal_would_show_it(data: bytes, lines: tuple[str, ...], step: int) -> None:
    log = LogTail()
    for start in range(0, len(data), step):
        log.feed(data[start : start + step])
    assert log.lines() == lines


@given(st.lists(st.binary(max_size=50), max_size=30))
def test_a_log_is_the_same_however_the_stream_is_cut(pieces: list[bytes]) -> None:
    whole, cut = LogTail(), LogTail()
    whole.feed(b"".join(pieces))
    for piece in pieces:
        cut.feed(piece)
    assert whole.lines() == cut.lines()


def test_a_log_stays_small() -> None:
    log = LogTail()
    log.feed(b"x" * 10_000_000)
    for number in range(1000):
        log.feed(b"line %d\n" % number)
    assert len(log.lines()) == MAX_LINES
    assert log.lines()[-1] == "line 999"
    assert max(map(len, log.lines())) <= 2000


def test_the_time_left_is_unknown_without_a_total() -> None:
    record = Record()
    record.begin(order("first"))
    for done in (1, 2):
        record.advance(Progress("importing", done))
    assert record.eta_s is None
    record.advance(Progress("reading", 5, 10))
    assert record.eta_s is None  # one figure gives no rate
    record.advance(Progress("reading", 6, 10))
    assert record.eta_s is not None
    record.advance(Progress("reading", 10, 10))
    assert record.eta_s == 0


def test_a_worker_that_tells_how_far_it_is_loads() -> None:
    record = Record()
    record.begin(order("first"))
    record.advance(Progress("reading", 1, 10))
    assert record.state is State.LOADING
