"""LoRAs: which there are, which fit, which are active, and merging them into a model of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import AdapterError, LoadstoneError, NothingLoaded, OptionError, UserError
from modules.library import Library, ModelFacts
from modules.library.loras import Lora, LoraFacts, LoraLibrary
from modules.options import LOAD_OPTIONS, adapter_text, split_adapter
from modules.planner.adapters import Adapters
from modules.planner.lora_fit import LoraFit, lora_bytes, lora_fit
from modules.protocol import AdapterChoice, AdaptersReport, MergeOrder
from modules.service.merging import Merger
from modules.service.names import folder_name
from modules.supervisor import Loaded, Supervisor

logger = logging.getLogger(__name__)

LORA = LOAD_OPTIONS["lora"]
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class LoraOffer:
    """One LoRA of the menu. ``problem``: why it cannot be applied to the model; None where it can, as far as known."""

    lora: Lora
    facts: LoraFacts | None = None
    problem: LoadstoneError | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class LoraPlan:
    """The LoRAs of one load: what the order names, what they take in the plan, what deserves a word."""

    choices: tuple[AdapterChoice, ...] = ()
    adapters: Adapters = ()
    notes: tuple[str, ...] = ()


class Loras:
    """What a user can do with LoRAs. A set is named as the option ``lora`` names it: ``["pirate", "cheese:0.5"]``.

    ``front`` owns the model that sets are applied to; ``models_dir`` is where merged models are written. May be used
    from any thread.
    """

    def __init__(
        self, library: LoraLibrary, models: Library, front: Callable[[], Supervisor], models_dir: Path
    ) -> None:
        self.library = library
        self.merger = Merger()
        self._models = models
        self._front = front
        self._models_dir = models_dir

    # --- what there is ---

    def all(self) -> list[Lora]:
        """Every LoRA, by name. Names alone: nothing is opened."""
        return self.library.loras()

    def offers(self, model: str = "") -> list[LoraOffer]:
        """Every LoRA, those that fit ``model`` first; without a model, or one that cannot be read, each might."""
        facts: ModelFacts | None = None
        if model:
            try:
                facts = self._models.facts(model)
            except LoadstoneError:
                facts = None
        offers = [self._offer(lora, facts) for lora in self.library.loras()]
        return sorted(offers, key=lambda offer: not offer.fits)

    def _offer(self, lora: Lora, model: ModelFacts | None) -> LoraOffer:
        facts: LoraFacts | None = None
        try:
            facts = self.library.facts(lora)
            fit = lora_fit(facts, model) if model else LoraFit(checked=False)
        except LoadstoneError as problem:
            return LoraOffer(lora, facts, problem)
        except Exception as error:  # whatever one holds, the others are offered
            logger.warning("The LoRA %s cannot be described", lora.name, exc_info=True)
            return LoraOffer(lora, facts, AdapterError(f"The LoRA {lora.name} cannot be read: {error!r}."))
        return LoraOffer(lora, facts, warnings=fit.warnings)

    def choices(self, entries: Sequence[str]) -> tuple[AdapterChoice, ...]:
        """The set that is named so. Raises OptionError for what names no set, AdapterNotFound for a LoRA not there."""
        pairs = [split_adapter(entry) for entry in LORA.parse(list(entries))]
        return tuple(AdapterChoice(name, str(self.library.find(name).path), weight) for name, weight in pairs)

    # --- before loading ---

    def planned(self, model: ModelFacts, entries: Sequence[str], *, inherited: bool = False) -> LoraPlan:
        """The set as a load of ``model`` would apply it.

        Raises AdapterNotFound, AdapterError and AdapterMismatch for one that it would be refused for. ``inherited``:
        it was not asked for this very model, so a set that does not fit is left out, with a note.
        """
        try:
            choices = self.choices(entries)
            found = [(self.library.facts(choice.name), choice) for choice in choices]
            notes = [note for facts, _ in found for note in lora_fit(facts, model).warnings]
        except LoadstoneError as problem:
            if not inherited:
                raise
            return LoraPlan(notes=(f"{LORA.flag} is left out here. {problem.message}",))
        adapters = tuple(part for facts, _ in found for part in lora_bytes(facts).items())
        return LoraPlan(choices, adapters, tuple(notes))

    # --- with the loaded model ---

    @property
    def active(self) -> tuple[AdapterChoice, ...]:
        """The set that is active now; empty where nothing is loaded."""
        loaded = self._front().snapshot().loaded
        return loaded.order.adapters if loaded else ()

    def checked(self, entries: Sequence[str], loaded: Loaded | None = None) -> tuple[AdapterChoice, ...]:
        """The set, checked against ``loaded``, or the front model, by headers. Raises NothingLoaded and as
        :meth:`planned` does.
        """
        loaded = loaded or self._front().snapshot().loaded
        if loaded is None:
            raise NothingLoaded("No model is loaded that LoRAs could be applied to.")
        try:
            facts = self._models.facts(loaded.order.name)
        except LoadstoneError:  # its files are gone, or it was named by a path: the worker looks at the model itself
            return self.choices(entries)
        return self.planned(facts, entries).choices

    def apply(self, entries: Sequence[str]) -> AdaptersReport:
        """Make this set the active one, or leave all as it is; returns when it is active. Waits for running answers.

        Raises NothingLoaded, Busy, OptionError, AdapterError and its kin.
        """
        return self._front().apply_adapters(self.checked(entries))

    # --- merging ---

    def merge(
        self, model: str, entries: Sequence[str], name: str, max_shard_size: str = DEFAULT_SHARD_SIZE
    ) -> MergeOrder:
        """Begin to write ``model`` with the set merged in as the new model ``name``; :attr:`merger` tells how it goes.

        Raises Busy while another is being written, OptionError for a name or a size that cannot be used,
        UserError for a model whose weights are quantized, and as :meth:`planned` does.
        """
        facts = self._models.facts(model)
        if facts.quantization:
            raise UserError(
                f"{model} cannot be merged into: its weights are quantized ({facts.quantization_detail}).",
                "Merge into the 16-bit model, and load the result in 4-bit or 8-bit.",
            )
        if not entries:
            raise OptionError("There is nothing to merge: no LoRA is chosen.", "Choose one.")
        if facts.code_files:
            raise UserError(f"{model} brings Python code; such models cannot be merged here.", "Use peft in a script.")
        order = MergeOrder(
            name=facts.model.name, path=str(facts.model.path), file_format=facts.model.file_format, task=facts.task,
            adapters=self.planned(facts, entries).choices, out=str(self._new_folder(name)),
            max_shard_size=_shard_size(max_shard_size),
        )  # fmt: skip
        self.merger.start(order)
        return order

    def _new_folder(self, name: str) -> Path:
        plain = folder_name(name, "model")
        folder = self._models_dir / plain
        if folder.exists():
            raise OptionError(f"There is a model {plain} already.", "Choose another name.")
        return folder


def merged_name(model: str, names: Iterable[str]) -> str:
    """What a merged model is called where nobody says otherwise: ``SmolLM2-135M-Instruct-pirate``."""
    return "-".join(part.rpartition("/")[2] for part in (model, *names))


def entries_of(choices: Iterable[AdapterChoice]) -> list[str]:
    """The set as the option ``lora`` names it."""
    return [adapter_text(choice.name, choice.weight) for choice in choices]


def _shard_size(text: str) -> str:
    """``5GB``, ``500MB``. Raises OptionError."""
    plain = text.strip().upper() or DEFAULT_SHARD_SIZE
    number = plain.removesuffix("GB") if plain.endswith("GB") else plain.removesuffix("MB")
    if number == plain or not number.isdigit() or int(number) == 0:
        raise OptionError(f"{text!r} is no size of a file.", "Write it as 5GB or 500MB.")
    return plain
