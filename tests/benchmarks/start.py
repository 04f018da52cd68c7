"""From the process's start to the first page, its memory, and how soon ``--help`` answers."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from tests.benchmarks.common import ROOT, Row, environment, free_port, medians, ratio_row, server_command, started

HELLO_WORLD = """
import sys, gradio as gr
with gr.Blocks(analytics_enabled=False) as page:
    name = gr.Textbox(label="Name")
    answer = gr.Textbox(label="Answer")
    gr.Button("Greet").click(lambda text: f"Hello, {text}", name, answer)
page.launch(server_port=int(sys.argv[1]), quiet=True)
"""


def rows(runs: int = 5) -> list[Row]:
    memory: dict[str, list[float]] = {"ours": [], "hello": []}

    def serve(kind: str) -> float:
        port = free_port()
        ours = server_command(port, "--no-warm-worker")
        command = ours if kind == "ours" else [sys.executable, "-c", HELLO_WORLD, str(port)]
        with started(command, port) as (process, seconds):
            memory[kind].append(psutil.Process(process.pid).memory_info().rss / 2**20)
            return seconds

    ours, hello = medians([lambda: serve("ours"), lambda: serve("hello")], runs)
    [help_s] = medians([_help], runs)
    return [
        ratio_row("start to first page, against a hello-world Blocks app", ours, hello, "s", "≤ 1.25 ×"),
        ratio_row(
            "web process's memory, against the same", sorted(memory["ours"])[runs // 2],
            sorted(memory["hello"])[runs // 2], "MiB", "≤ 1.5 ×",
        ),
        Row("server.py --help", f"{help_s:.2f} s", "", "", "≤ 0.5 s"),
    ]  # fmt: skip


def _help() -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "server.py", "--help"], cwd=ROOT, env=environment(), check=True, capture_output=True
    )
    return time.perf_counter() - begun
