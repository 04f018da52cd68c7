"""What the process owes to its surroundings: memory that is freed while a model is loaded goes back at once."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from modules.worker import process
from tests.conftest import ROOT

MIB = 2**20
# Frees every second one of 100 pieces of 2 MiB, as a load frees tensors between others that stay.
SCRIPT = """
import ctypes, json, sys
from modules.worker.process import memory_given_back, memory_of_this_process
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def given_back():
    pieces = [libc.malloc(2 << 20) for _ in range(100)]
    for piece in pieces:
        libc.memset(piece, 1, 2 << 20)
    before = memory_of_this_process()[0]
    for piece in pieces[::2]:
        libc.free(piece)
    return before - memory_of_this_process()[0]
with memory_given_back():
    inside = given_back()
print(json.dumps([inside, given_back()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_while_loading_goes_back_and_is_kept_while_answering() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    inside, afterwards = json.loads(done.stdout)
    assert inside > 90 * MIB
    assert afterwards < 20 * MIB


def test_a_worker_starts_where_python_has_no_posix_modules() -> None:
    """As on Windows: every process that speaks the protocol imports this one."""
    hidden = "import psutil, sys; sys.modules['resource'] = sys.modules['fcntl'] = None; "
    subprocess.run([sys.executable, "-c", hidden + "import modules.worker.process"], check=True, cwd=ROOT)


def test_gpus_are_in_the_plans_order_and_other_settings_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "TOKENIZERS_PARALLELISM": "true"}
    monkeypatch.setattr(os, "environ", mine)
    process.set_environment()
    assert mine["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert mine["TOKENIZERS_PARALLELISM"] == "true"
    assert mine["HF_HUB_OFFLINE"] == "1"
