"""Progress of what transformers does in loops that it draws bars for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from transformers.utils import logging as transformers_logging

from modules.protocol import Progress

_INTERVAL_S = 0.1


@contextlib.contextmanager
def counting(bar: str, stage: str, unit: str, progress: Callable[[Progress], None]) -> Iterator[None]:
    """Report what the progress bar ``bar`` of transformers would show; no bar is drawn.

    ``bar``: its description, "Loading weights" (``unit`` "tensors") or "Writing model shards" ("files").
    """

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and kwargs.get("desc") == bar:
            return _counted(args[0], len(args[0]), Progress(stage, unit=unit), progress)
        return factory(*args, **{**kwargs, "disable": True})

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _counted(items: Iterable[Any], total: int, stage: Progress, progress: Callable[[Progress], None]) -> Iterator[Any]:
    last = 0.0
    for done, item in enumerate(items):
        if (now := time.monotonic()) - last >= _INTERVAL_S:
            last = now
            progress(replace(stage, done=done, total=total))
        yield item
    progress(replace(stage, done=total, total=total))
