"""``python -m modules.worker.train``: a LoRA, trained as a :class:`TrainOrder` says.

Reads the order from stdin, then :class:`TrainCommand` lines; the end of stdin ends the process, and so does SIGTERM.
Writes what :mod:`modules.training.messages` lists, and Failed with exit status 1.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

from modules import collector
from modules.checkpoint import identity_of
from modules.errors import DiskFull, LoadstoneError, NotTrainable
from modules.protocol import Failed, Progress, decode
from modules.training import runs
from modules.training.messages import TrainCommand, TrainOrder
from modules.worker import process
from modules.worker.training.control import Control
from modules.worker.training.visible import with_own_gpus

_LOCK_S = 15.0  # for a process to end whose server was killed


def _typed(error: Exception, order: TrainOrder) -> LoadstoneError:
    if isinstance(error, LoadstoneError):
        return error
    from modules.worker.failures import translate

    typed = translate(error, order.load)
    if "PytorchStreamWriter failed" in str(error):  # torch.save says no more where the disk is full
        return DiskFull(f"A checkpoint cannot be written in {order.folder}.", details=typed.details)
    return typed


def check_base(order: TrainOrder) -> None:
    """Note the base model's files where the training begins. Raises NotTrainable where it goes on with others."""
    folder = Path(order.folder)
    now, before = identity_of(Path(order.load.path), order.load.file_format), runs.read_base(folder)
    if before is None or not runs.checkpoints(folder):
        runs.write_base(folder, now)
    elif now != before:
        names = sorted({str(facts[0]) for facts in [*now, *before] if facts not in now or facts not in before})
        raise NotTrainable(
            f"{order.load.name} has changed since the training of {order.name} began: {', '.join(names)}.",
            "Bring the former files back, their times included, to go on; or delete the training and start it anew.",
        )


def obey(stdin: int, control: Control) -> None:
    """Take commands from ``stdin`` on a thread of its own; its end ends this process and its children."""

    def watch() -> None:
        while line := process.read_line(stdin):
            command = decode(line)
            if isinstance(command, TrainCommand):
                control.asked = command.action
        process.end_group()

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def main() -> int:
    """The exit status: 0 when the LoRA or the checkpoint is there, 1 after Failed, 2 where stdin is no order."""
    stdin = process.claim_stdin()
    emit = process.claim_stdout()
    process.take_signals()
    process.set_environment()
    process.offer_to_oom_killer()
    order = process.read_order(stdin, TrainOrder)
    if order is None:
        return 2
    order = replace(order, load=with_own_gpus(order.load))
    emit(Progress("starting"))
    control = Control()
    obey(stdin, control)
    try:
        Path(order.folder).mkdir(parents=True, exist_ok=True)
        with runs.alone(order, _LOCK_S):
            with collector.spared():
                process.import_packages()
                from modules.worker.training.run import train
            check_base(order)
            emit(train(order, control, emit))
    except Exception as error:
        emit(Failed(_typed(error, order)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
