"""One answer under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.protocol import AdapterChoice
from modules.worker.batching.choosing import Chooser
from modules.worker.batching.line import Ticket
from modules.worker.generation import Answer

if TYPE_CHECKING:
    from modules.worker.batching.slabs import Slab

Set = tuple[AdapterChoice, ...]


@dataclass(eq=False)
class Sequence:
    """Tokens, and where their keys and values lie: in a cache of their own, in a slab with others, or nowhere yet.

    ``read``: of how many of ``ids`` there are keys and values. All but the last one's when a step is due.
    """

    ids: list[int]
    adapters: Set = ()
    read: int = 0
    cache: Any = None
    slab: Slab | None = None

    @property
    def reading(self) -> bool:
        """Whether the model has to go through more than the last token first."""
        return self.slab is None and (self.cache is None or len(self.ids) - self.read > 1)

    def forget(self) -> None:
        """Give up keys and values of its own, which can be read again."""
        self.cache, self.read = None, 0


@dataclass(eq=False)
class Row(Sequence):
    """A sequence that is the prompt and the answer of one ticket."""

    ticket: Ticket = field(kw_only=True)
    answer: Answer = field(kw_only=True)
    chooser: Chooser = field(kw_only=True)
