"""Downloads in words, the same on the page and on the command line."""

from __future__ import annotations

from collections.abc import Iterable

from modules.hub.job import Job, JobState
from modules.units import format_bytes, format_seconds


def job_in_words(job: Job) -> str:
    """``112 MB of 269 MB · 23 MB/s · 0:41 left``, or what became of it."""
    total = format_bytes(job.order.size_bytes)
    if job.state is JobState.DONE:
        return f"{total} · every file verified"
    if job.state is JobState.CANCELLED:
        return "cancelled"
    parts = [f"{format_bytes(job.done_bytes)} of {total}"]
    if job.state is not JobState.RUNNING:
        parts.append(job.state.value)
    elif job.stage:
        parts.append(job.stage)
    elif job.speed:
        parts.append(f"{format_bytes(job.speed)}/s")
        if job.seconds_left is not None:
            parts.append(f"{format_seconds(job.seconds_left)} left")
    return " · ".join(parts)


def pattern_of(names: Iterable[str]) -> str:
    """The pattern that names exactly these files."""
    return ",".join(name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names)
