"""The LoRAs of one loaded model: which are attached, and which of them act."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from modules.errors import AdapterError, LoadstoneError, MissingPackage, OutOfMemory
from modules.options.adapters import LEAST_WEIGHT, MOST_WEIGHT
from modules.protocol import AdapterChoice, AdaptersReport, LoadOrder
from modules.worker.adapters import files, fitting
from modules.worker.adapters.files import Fingerprint
from modules.worker.adapters.proof import Proof
from modules.worker.adapters.wrapping import Wrapping
from modules.worker.failures import translate

log = logging.getLogger(__name__)

# What stays attached of LoRAs that are not active, so that going back to them reads no file: the latest ones.
KEPT = 8
KEPT_BYTES = 512 * 1024**2
_KEPT_PROOFS = 256


@dataclass(frozen=True)
class Attached:
    """One adapter whose weights are in memory."""

    key: str  # its name in peft
    path: str
    fingerprint: Fingerprint
    kind: str
    replaces: frozenset[str]  # modules of which it brings weights of its own: all of them, or those of some tokens
    size_bytes: int


Set: TypeAlias = tuple[tuple[Attached, float], ...]  # with weights


class Adapters:
    """For one model; used on one thread, between its generations."""

    def __init__(self, model: Any, tokenizer: Any, order: LoadOrder) -> None:
        self._model = model
        self._order = order
        self._proof = Proof(model, tokenizer, order.task)
        self._proofs: OrderedDict[Any, float] = OrderedDict()
        self._wrappings: dict[str, Wrapping] = {}  # by kind
        self._shown: Wrapping | None = None
        self._attached: OrderedDict[tuple[str, Fingerprint], Attached] = OrderedDict()  # the latest used is the last
        self._count = 0
        self._active: Set = ()
        self._used: Set = ()  # by the last answer with LoRAs of its own
        self.active: tuple[AdapterChoice, ...] = ()

    def apply(self, choices: tuple[AdapterChoice, ...]) -> AdaptersReport:
        """Make this set the active one, or leave all as it was and raise an error of the tree."""
        started = time.perf_counter()
        if choices:
            self._measure_base()
        wanted = self._resolved(choices)
        try:
            self._switch(wanted)
            moved = self._moved(wanted) if choices else None
        except Exception as error:
            self._switch(self._active)
            raise self._typed(error) from error
        self._active, self.active, self._used = wanted, choices, ()
        self._forget_old()
        return AdaptersReport(choices, moved, round(time.perf_counter() - started, 4), _notes(choices, moved))

    @contextmanager
    def using(self, choices: tuple[AdapterChoice, ...] | None) -> Iterator[None]:
        """Let this set act meanwhile; None: the active one. Raises as :meth:`apply` does."""
        if choices is None or choices == self.active:
            yield
            return
        wanted = self._resolved(choices)
        try:
            self._switch(wanted)
            self._used = wanted or self._used
            yield
        finally:
            self._switch(self._active)
            self._forget_old()

    # --- which adapters ---

    def _resolved(self, choices: tuple[AdapterChoice, ...]) -> Set:
        """The set with every adapter attached. Where one cannot be, the active set acts as before."""
        _check_set(choices)
        try:
            found: list[tuple[Attached, float]] = []
            for choice in choices:
                found.append((self._find(choice) or self._attach(choice, found), choice.weight))
            _check_mix(choices, found)
        except Exception as error:
            self._switch(self._active)
            self._forget_old()
            raise self._typed(error) from error
        return tuple(found)

    def _find(self, choice: AdapterChoice) -> Attached | None:
        """The adapter, if it is attached and its files are unchanged; or gone: what is in memory is still good."""
        now = files.fingerprint(Path(choice.path))
        for key in reversed(self._attached):
            if key[0] == choice.path and now in (None, key[1]):
                self._attached.move_to_end(key)
                return self._attached[key]
        return None

    def _attach(self, choice: AdapterChoice, in_use: list[tuple[Attached, float]]) -> Attached:
        adapter = files.read(choice)
        self._show(None)
        fitting.check(adapter, self._model, self._order.name)
        wrapping = self._wrappings.setdefault(adapter.kind, Wrapping(self._model))
        self._show(wrapping)
        self._count += 1
        key = f"adapter{self._count}"
        size = wrapping.add(adapter, key)
        replaces = wrapping.replaced(adapter, key)
        attached = Attached(key, choice.path, adapter.fingerprint, adapter.kind, replaces, size)
        self._attached[choice.path, adapter.fingerprint] = attached
        log.info("%s: the LoRA %s is attached (%d bytes)", self._order.name, choice.name, size)
        return attached

    def _forget_old(self) -> None:
        """Free what exceeds the bounds, the longest unused first; never what is active, nor what was used last: an
        answer in many turns would have it read again for each of them."""
        active = {attached.key for attached, _ in self._active}
        idle = [item for item in reversed(self._attached.items()) if item[1].key not in active]
        used = {attached.key for attached, _ in self._used}
        kept_bytes = 0
        for place, (found, attached) in enumerate(idle):
            kept_bytes += attached.size_bytes
            if attached.key not in used and (place >= KEPT or kept_bytes > KEPT_BYTES):
                del self._attached[found]
                self._remove(attached)
        self._show_active()

    def _remove(self, attached: Attached) -> None:
        wrapping = self._wrappings[attached.kind]
        self._show(wrapping)
        wrapping.remove(attached.key)
        if wrapping.empty:
            self._show(None)
            del self._wrappings[attached.kind]

    # --- which of them act ---

    def _switch(self, wanted: Set) -> None:
        acting = sorted((item for item in wanted if item[1]), key=lambda item: item[0].path)
        if not acting:
            self._show(None)
            return
        wrapping = self._wrappings[acting[0][0].kind]
        self._show(wrapping)
        # In one order, however the set is written: floating-point sums depend on it.
        wrapping.activate({attached.key: weight for attached, weight in acting})

    def _show(self, wrapping: Wrapping | None) -> None:
        """Let these layers stand in the model; None: the model's own modules alone."""
        if wrapping is self._shown:
            return
        if self._shown is not None:
            self._shown.hide()
        if wrapping is not None:
            wrapping.show()
        self._shown = wrapping

    def _show_active(self) -> None:
        acting = next((attached.kind for attached, weight in self._active if weight), None)
        self._show(self._wrappings[acting] if acting else None)

    # --- what they do ---

    def _measure_base(self) -> None:
        if self._active:
            return  # it was measured before they were
        self._show(None)
        self._proof.measure_base()

    def _moved(self, wanted: Set) -> float:
        """See :meth:`Proof.moved_nats`; measured once for each set."""
        key = frozenset((attached.key, weight) for attached, weight in wanted if weight)
        if key not in self._proofs:
            self._proofs[key] = self._proof.moved_nats() if key else 0.0
            while len(self._proofs) > _KEPT_PROOFS:
                self._proofs.popitem(last=False)
        return self._proofs[key]

    def _typed(self, error: Exception) -> LoadstoneError:
        if isinstance(error, LoadstoneError):
            return error
        known = translate(error, self._order)
        if isinstance(known, OutOfMemory | MissingPackage):
            return known
        what = " ".join(str(error).split())[:300]
        return AdapterError(f"The LoRAs could not be applied: {type(error).__name__}: {what}", details=known.details)


def _check_set(choices: tuple[AdapterChoice, ...]) -> None:
    paths = [choice.path for choice in choices]
    if double := [choice.name for choice in choices if paths.count(choice.path) > 1]:
        raise AdapterError(f"{double[0]} stands in the set twice.", "Give it once, with the weight that you want.")
    for choice in choices:
        if not LEAST_WEIGHT <= choice.weight <= MOST_WEIGHT:
            raise AdapterError(
                f"The weight of {choice.name} is {choice.weight:g}.",
                f"Give a weight from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}; 1 is as it was trained.",
            )


def _check_mix(choices: tuple[AdapterChoice, ...], found: list[tuple[Attached, float]]) -> None:
    """Raise AdapterError where adapters that are each in order cannot act together as asked."""
    acting = [(choice, attached) for choice, (attached, weight) in zip(choices, found, strict=True) if weight]
    first = acting[0] if acting else None
    replaced: dict[str, str] = {}
    for choice, attached in acting:
        if first is not None and attached.kind != first[1].kind:
            raise AdapterError(
                f"{first[0].name} is a {first[1].kind} and {choice.name} a {attached.kind}: they cannot act together.",
                "Mix adapters of one kind; DoRA and rsLoRA are of the kind LoRA.",
            )
        if attached.replaces and choice.weight != 1:
            raise AdapterError(
                f"{choice.name} replaces weights of {', '.join(sorted(attached.replaces))}, which no weight can scale: "
                f"{choice.weight:g} was asked for.",
                "Give it the weight 1, or 0.",
            )
        for module in attached.replaces:
            if module in replaced:
                raise AdapterError(f"{replaced[module]} and {choice.name} both replace {module}: take one of them.")
            replaced[module] = choice.name


def _notes(choices: tuple[AdapterChoice, ...], moved: float | None) -> tuple[str, ...]:
    if moved != 0.0:
        return ()
    names = " and ".join(choice.name for choice in choices)
    why = "a weight of 0 has none" if not any(c.weight for c in choices) else "it may not have been trained at all"
    return (f"No effect: with {names} the model answers as without, to the bit; {why}.",)
