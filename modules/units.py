"""Numbers in words, the same on the page, in the API and on the command line."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """``269 MB``, ``1.02 GiB``: decimal megabytes below a GiB, GiB above, as file sizes and memory are read."""
    if count >= 2**30:
        return f"{count / 2**30:.3g} GiB" if count < 1000 * 2**30 else f"{count / 2**40:.3g} TiB"
    if count >= 1e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} B"


def format_count(count: float) -> str:
    """``135 M``, ``7.2 B``: parameters and other large numbers."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"


def counted(count: int, thing: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def format_tokens(count: int) -> str:
    """``8k`` for 8,192: contexts are powers of two more often than not."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count // 1024}k"
    return f"{count:,}"


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3:05``, ``1:02:03``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
