"""Python's garbage collector, kept from going through what stays for as long as the process does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spared() -> Iterator[None]:
    """For imports and what is built once: nothing is collected meanwhile, and no collection looks at it later.

    Otherwise a fifth of the web process's start and a quarter of importing the ML packages is spent on going through
    objects that are all in use, and each full collection afterwards takes 0.2 s. Cycles that are garbage already when
    the block ends stay too: a few MB.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_collecting:
            gc.enable()
