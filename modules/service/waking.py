"""A model that ended because nobody used it comes back for the message that is sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from modules.errors import Busy, NothingLoaded
from modules.service.stopping import Stop
from modules.supervisor import LOAD_STATES, Snapshot

if TYPE_CHECKING:
    from modules.service.service import Service

_LOOK_S = 0.25  # between looks at how the load stands


def nothing_loaded(snapshot: Snapshot) -> NothingLoaded:
    """Why the model that the page shows does not answer."""
    if snapshot.idled:
        words = f"{snapshot.idled} was unloaded because nobody used it."
        return NothingLoaded(words, "Reload on the Model tab loads it again; guests wait until that is done.")
    return NothingLoaded("No model is loaded.")


def comes(service: Service, snapshot: Snapshot) -> bool:
    """Whether a message may wait for the model: with --load-on-demand, for one that is loading, or is to be again."""
    return service.on_demand is not None and bool(snapshot.idled or snapshot.state in LOAD_STATES)


def awake(service: Service, stop: Stop) -> Iterator[str]:
    """Returns when the model that the page shows answers, or ``stop`` is set; says meanwhile which one is waited for.

    One that ended because nobody used it is loaded again, with the options and LoRAs that it had. Raises NothingLoaded
    where none :func:`comes`, what the load is refused for, and what it failed with.
    """
    while (snapshot := service.snapshot()).loaded is None and not stop.wait():
        if not comes(service, snapshot):
            raise snapshot.error or nothing_loaded(snapshot)
        if snapshot.idled:
            with suppress(Busy):  # another model is being loaded: this one is next
                service.reload()
        yield snapshot.idled or (snapshot.order.name if snapshot.order else "a model")
        stop.wait(_LOOK_S)
