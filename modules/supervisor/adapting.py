"""Another set of LoRAs for the model that answers: asked of its worker, and written down when it is active."""

from __future__ import annotations

from collections.abc import Callable

from modules.errors import NothingLoaded, WorkerCrashed
from modules.protocol import ADAPTERS, AdapterChoice, AdaptersOrder, AdaptersReport, LoadOrder, decode
from modules.supervisor.child import Child
from modules.supervisor.owner import Job, Owner

_WORK_S = 300.0  # for the worker to read the files and attach them, once no answer is in its way


def apply(
    owner: Owner, adapters: tuple[AdapterChoice, ...], wait_s: float, on_success: Callable[[LoadOrder], None]
) -> AdaptersReport:
    """Make ``adapters`` the active set; returns when it is. ``on_success`` gets the loaded order with the set, under
    the lock.

    Waits ``wait_s`` seconds at most for the answers that were asked for earlier. Raises NothingLoaded, Busy (a load
    is under way, or an answer takes longer) and what the worker refuses with: then all is as before. The worker's
    end, as WorkerCrashed or WorkerKilled, leaves the last set in the order that is to be loaded again.
    """
    job, child = _begin(owner)
    try:
        answer = decode(child.call("POST", ADAPTERS, AdaptersOrder(adapters, wait_s), timeout_s=wait_s + _WORK_S))
        if not isinstance(answer, AdaptersReport):
            raise WorkerCrashed(f"The model's process answered with {type(answer).__name__}, and no AdaptersReport.")
        _write_down(owner, child, answer, on_success)
        return answer
    finally:
        with owner.changed:
            owner.end_job(job)


def _begin(owner: Owner) -> tuple[Job, Child]:
    with owner.changed:
        child, loaded = owner.child, owner.record.loaded
        if child is None or loaded is None:
            raise NothingLoaded("No model is loaded that LoRAs could be applied to.")
        job = Job(f"applying LoRAs to {loaded.order.name}", asked=child)
        owner.take_job(job)
        owner.changed.notify_all()
        return job, child


def _write_down(owner: Owner, child: Child, report: AdaptersReport, on_success: Callable[[LoadOrder], None]) -> None:
    """Raises why the worker died, where it did after it had answered."""
    with owner.changed:
        if owner.child is not child or owner.record.loaded is None:
            raise child.death()
        owner.record.adapted(report)
        on_success(owner.record.loaded.order)
        owner.changed.notify_all()
