"""Progress of what transformers does in loops that it draws bars for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import modeling_gguf_pytorch_utils as gguf_reading
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


@contextlib.contextmanager
def counting_unpacked(stage: str, progress: Callable[[Progress], None]) -> Iterator[None]:
    """Report the tensors of a GGUF file as transformers 5.23 unpacks them, past its own hook: by the bar that it takes
    from tqdm itself. No bar is drawn."""

    def counted(tensors: Sequence[Any], **_bar: Any) -> Iterator[Any]:
        return _counted(tensors, len(tensors), Progress(stage, unit="tensors"), progress)

    drawn = gguf_reading.tqdm
    gguf_reading.tqdm = counted
    try:
        yield
    finally:
        gguf_reading.tqdm = drawn


def _counted(items: Iterable[Any], total: int, stage: Progress, progress: Callable[[Progress], None]) -> Iterator[Any]:
    last = 0.0
    for done, item in enumerate(items):
        if (now := time.monotonic()) - last >= _INTERVAL_S:
            last = now
            progress(replace(stage, done=done, total=total))
        yield item
    progress(replace(stage, done=total, total=total))
