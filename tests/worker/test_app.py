"""A real worker process, spoken to as the supervisor does it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from modules.errors import AccessRefused, Busy, LoadstoneError, NothingLoaded, Overloaded, error_from_dict
from modules.options import GenerationOptions
from modules.protocol import (
    COUNT,
    GENERATE,
    LOAD,
    MEMORY,
    Chunk,
    CountOrder,
    Done,
    EncodeOrder,
    Failed,
    GenerateOrder,
    Hello,
    LoadOrder,
    Piece,
    Progress,
    Warm,
    encode,
)
from modules.worker import app
from modules.worker.app import Worker
from modules.worker.engine import Engine
from tests.conftest import ROOT, StartWorker, WorkerProcess, wait_until
from tests.machine import BF16

END_LIMIT_S = 2


def asking(text: str, max_new_tokens: int = 24, temperature: float = 0, **options: float) -> GenerateOrder:
    chosen = GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, **options)  # type: ignore[arg-type]
    return GenerateOrder(chosen, messages=({"role": "user", "content": text},))


LONG = asking("Count upwards from one, and never stop.", max_new_tokens=1500, temperature=1, seed=1)


def test_end_of_stdin_ends_a_worker_that_warms_up(worker: WorkerProcess) -> None:
    worker.close_stdin()
    assert worker.process.wait(END_LIMIT_S) == -signal.SIGKILL
    assert not any(b"Warm" in line for line in worker.lines)  # it was still at it


def test_end_of_stdin_ends_an_idle_worker_and_its_children(start_worker: StartWorker) -> None:
    worker = start_worker(code="import subprocess; subprocess.Popen(['sleep', '600'])")
    worker.wait_for(Warm)
    children = psutil.Process(worker.process.pid).children()
    assert children
    worker.close_stdin()
    assert worker.process.wait(END_LIMIT_S) == -signal.SIGKILL
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), END_LIMIT_S)


def test_end_of_stdin_ends_a_worker_that_loads(worker: WorkerProcess, demo_order: LoadOrder) -> None:
    worker.post(LOAD, demo_order)
    worker.wait_for(Progress)
    worker.close_stdin()
    assert worker.process.wait(END_LIMIT_S) == -signal.SIGKILL


def test_end_of_stdin_ends_a_worker_that_generates(worker: WorkerProcess, demo_order: LoadOrder) -> None:
    worker.load(demo_order)
    with worker.generating(LONG) as stream:
        assert isinstance(next(stream), Piece)
        worker.close_stdin()
        assert worker.process.wait(END_LIMIT_S) == -signal.SIGKILL


def test_ctrl_c_is_left_to_the_web_process_and_a_termination_is_obeyed(worker: WorkerProcess) -> None:
    worker.wait_for(Warm)
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.memory().rss_bytes > 0  # it answers on
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.process.wait(END_LIMIT_S) == -signal.SIGTERM


@pytest.mark.parametrize("line", [b"", b"hello\n", b"[]\n", encode(CountOrder())])
def test_a_worker_that_nobody_greets_says_so_and_exits(line: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modules.worker"], input=line, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"Hello" in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Bearer é"])
def test_nothing_is_answered_without_the_secret(worker: WorkerProcess, demo_order: LoadOrder, given: str) -> None:
    headers = {b"authorization": given.encode()}
    with worker.http() as client:
        answers = [client.post(path, content=encode(demo_order), headers=headers) for path in (LOAD, GENERATE, COUNT)]
        answers.append(client.get(MEMORY, headers=headers))
        answers.append(client.get("/elsewhere", headers=headers))
    assert [answer.status_code for answer in answers] == [403] * 5
    assert isinstance(error_from_dict(answers[0].json()), AccessRefused)
    assert worker.secret not in answers[0].text


def test_the_secret_is_neither_an_argument_nor_in_the_environment(worker: WorkerProcess) -> None:
    process = psutil.Process(worker.process.pid)
    assert worker.secret not in " ".join(process.cmdline())
    assert worker.secret not in str(process.environ())


def test_before_a_load_there_is_nothing_to_use(start_worker: StartWorker) -> None:
    worker = start_worker(Hello("quiet", imports=False))
    for path, order in ((GENERATE, asking("Hi")), (COUNT, CountOrder(prompt="Hi"))):
        answer = worker.post(path, order)
        assert answer.status_code == NothingLoaded.status
        assert isinstance(error_from_dict(answer.json()), NothingLoaded)
    assert worker.memory().gpu_bytes == ()


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b'{"is":"Nothing"}', b'{"is":"LoadOrder","name":"x"}', encode(CountOrder())]
)
def test_what_is_no_order_is_refused(demo_worker: WorkerProcess, body: bytes) -> None:
    with demo_worker.http() as client:
        answer = client.post(LOAD, content=body)
    assert answer.status_code == 400
    assert "LoadOrder" in error_from_dict(answer.json()).message


def test_a_load_reports_its_stages_and_what_is_there(worker: WorkerProcess, demo_order: LoadOrder) -> None:
    ready = worker.load(demo_order)
    assert any(b'"is":"Progress"' in line for line in worker.lines)
    assert ready.report.architecture == "LlamaForCausalLM"
    assert ready.report.footprint_bytes == pytest.approx(269e6 if BF16 else 538e6, rel=0.01)
    assert ready.memory.peak_rss_bytes >= ready.memory.rss_bytes > ready.report.footprint_bytes
    second = worker.post(LOAD, demo_order)
    assert second.status_code == Busy.status
    assert isinstance(error_from_dict(second.json()), Busy)
    assert isinstance(worker.generate(asking("Hi", 2))[1], Done)  # the first stays as it was


def test_a_worker_that_was_not_told_to_import_loads_all_the_same(
    start_worker: StartWorker, demo_order: LoadOrder
) -> None:
    worker = start_worker(Hello("quiet", imports=False))
    worker.load(demo_order)
    assert not any(b'"is":"Warm"' in line for line in worker.lines)


def test_a_failed_load_is_told_and_the_process_stays(
    worker: WorkerProcess, demo_order: LoadOrder, tmp_path: Path
) -> None:
    worker.post(LOAD, dataclasses.replace(demo_order, path=str(tmp_path)))
    error = worker.wait_for(Failed).error
    assert isinstance(error, LoadstoneError)
    assert error.message
    assert worker.post(LOAD, demo_order).status_code == Busy.status
    assert worker.memory().rss_bytes > 0


def test_what_libraries_print_does_not_reach_the_protocol(start_worker: StartWorker, demo_order: LoadOrder) -> None:
    noise = "import builtins, os, sys, threading\n" + "\n".join(
        [
            "def noise():",
            "    for n in range(10**6):",
            "        print('printed', flush=True); os.write(1, b'from C'); os.system('echo from a child')",
            "        threading.Event().wait(0.05)",
            "import modules.worker.process as p",
            "claim = p.claim_stdout",
            "def claim_and_print():",
            "    emit = claim(); threading.Thread(target=noise, daemon=True).start(); return emit",
            "p.claim_stdout = claim_and_print",
        ]
    )
    worker = start_worker(code=noise)
    worker.load(demo_order)
    assert worker.lines
    assert all(line.startswith(b'{"is":') for line in worker.lines)


def test_the_stream_flows_while_the_answer_grows(demo_worker: WorkerProcess) -> None:
    with demo_worker.generating(asking("Tell me a story.", 40)) as stream:
        arrivals = [(time.monotonic(), chunk) for chunk in stream]
    pieces = [chunk for _, chunk in arrivals if isinstance(chunk, Piece)]
    assert len(pieces) > 5
    assert [piece.tokens for piece in pieces] == sorted({piece.tokens for piece in pieces})
    done = arrivals[-1][1]
    assert isinstance(done, Done)
    assert done.completion_tokens == 40
    assert done.finish_reason == "length"
    assert arrivals[-1][0] - arrivals[0][0] > done.seconds / 2


def test_closing_the_connection_stops_the_generation(demo_worker: WorkerProcess) -> None:
    begin = time.monotonic()
    whole = asking("Hi", 4)
    with demo_worker.generating(LONG) as stream:
        list(itertools.islice(stream, 3))
    _, done = demo_worker.generate(whole)  # one at a time: it could not begin before the other had stopped
    assert isinstance(done, Done)
    assert time.monotonic() - begin < 15  # the other would have taken a minute


def test_two_at_once_are_both_right(demo_worker: WorkerProcess) -> None:
    # Few tokens: in bfloat16 the sums of two rows round unlike those of one.
    orders = [asking("What is the capital of France?", 4), asking("Name a colour.", 4)]
    alone = [demo_worker.generate(order)[0] for order in orders]
    together: dict[int, str] = {}

    def ask(index: int) -> None:
        together[index] = demo_worker.generate(orders[index])[0]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone
    assert alone[0] != alone[1]


def test_who_waits_and_gives_up_leaves_the_queue(demo_worker: WorkerProcess) -> None:
    with demo_worker.generating(LONG) as first:
        next(first)
        with demo_worker.generating(LONG):
            pass  # its answer never began
        last: list[Chunk] = []
        third = threading.Thread(target=lambda: last.append(demo_worker.generate(asking("Hi", 4))[1]))
        third.start()
        next(first)
        assert not last
    third.join(20)
    assert isinstance(last[0], Done)


def test_counting_does_not_wait_for_a_generation(demo_worker: WorkerProcess) -> None:
    messages = ({"role": "user", "content": "How long is this?"},)
    with demo_worker.generating(LONG) as stream:
        next(stream)
        tokens = demo_worker.count(CountOrder(messages))
        assert isinstance(next(stream), Piece)
    _, done = demo_worker.generate(GenerateOrder(GenerationOptions(max_new_tokens=1), messages))
    assert isinstance(done, Done)
    assert tokens == done.prompt_tokens


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="only Linux has it")
def test_the_kernel_takes_the_worker_first(worker: WorkerProcess) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{worker.process.pid}/oom_score_adj").read_text()) > own


class Slow:
    """A tokenizer that tells how many at a time it is given."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.go_on = threading.Event()

    def __call__(self, text: str, **_: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.go_on.wait(30)
        time.sleep(0.05)  # so that others would be seen
        self.inside -= 1
        return SimpleNamespace(input_ids=[len(text)])


class Holding(Worker):
    """A worker that holds no more than a tokenizer."""

    def __init__(self, tokenizer: Any, order: LoadOrder) -> None:
        super().__init__(Engine(), lambda _: None)
        self._holds: Any = SimpleNamespace(tokenizer=tokenizer, order=order)

    def loaded(self) -> Any:
        return self._holds


def test_texts_are_tokenized_one_at_a_time_and_nobody_waits_for_long(
    demo_order: LoadOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Slow()
    worker = Holding(tokenizer, demo_order)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(worker.encode, EncodeOrder("four"))]
        wait_until(lambda: tokenizer.inside == 1, 10)
        with monkeypatch.context() as patch:
            patch.setattr(app, "_TOKENIZING_WAIT_S", 0.1)
            with pytest.raises(Overloaded, match=r"for 0\.1 s"):
                worker.encode(EncodeOrder("five"))
        asked += [pool.submit(worker.encode, EncodeOrder("four")) for _ in range(3)]
        tokenizer.go_on.set()
        assert [one.result() for one in asked] == [[4]] * 4
    assert tokenizer.most == 1
