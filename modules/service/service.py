"""What a user can do, once. The page, the API and the command line are thin skins over this.

The service holds no state of its own: what is loaded is the supervisor's, what lies on disk the library's,
what was saved the settings'. Every method may be called from any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from modules import copies, packages
from modules.checkpoint import refuse_quantization
from modules.devices import Machine
from modules.errors import CustomCodeRefused, LoadstoneError, MissingPackage, ModelNotFound, OptionError
from modules.library import Library, Model, ModelFacts
from modules.library.loras import LoraLibrary
from modules.options import LOAD_OPTIONS, Circumstances, LoadOptions, ServerOptions, check, context_tokens, parse_values
from modules.protocol import LoadOrder
from modules.service import custom_code
from modules.service.answering import Answering
from modules.service.badges import Badges
from modules.service.downloads import Downloads
from modules.service.fit import Fit, fit_of, refusal, without
from modules.service.learned import Learned
from modules.service.loras import LoraPlan, Loras, entries_of
from modules.service.on_demand import OnDemand, Prepared
from modules.service.perplexity import Perplexities
from modules.service.shelf import Shelf
from modules.service.traffic import Traffic
from modules.service.training import Training
from modules.service.view import View
from modules.settings import CodeApprovals, Resolved, Settings, contradicting, resolve
from modules.supervisor import Fleet, Snapshot, Supervisor

Source = Literal["page", "api", "command line", "request"]  # the last one: a request that names a model


class Service(Answering):
    """See the module. ``flags`` are the loader's and generation's values given on the command line."""

    def __init__(
        self,
        library: Library,
        settings: Settings,
        approvals: CodeApprovals,
        supervisor: Supervisor | Fleet,
        measure: Callable[[], Machine],
        *,
        cache_dir: Path,
        flags: Mapping[str, Any] | None = None,
        generation_flags: Mapping[str, Any] | None = None,
        loras: LoraLibrary | None = None,
        traffic: Traffic | None = None,
        server: ServerOptions | None = None,
    ) -> None:
        self.library = library
        self.settings = settings
        self.approvals = approvals
        self.fleet = supervisor if isinstance(supervisor, Fleet) else Fleet(supervisor)
        self.server = server or ServerOptions()
        self.on_demand = OnDemand(self.fleet, self._prepare_on_demand) if self.server.load_on_demand else None
        self.traffic = traffic or Traffic()
        self.measure = measure
        self.loras = Loras(loras or LoraLibrary([]), library, lambda: self.fleet.front, models_dir=cache_dir.parent)
        new_loras = cache_dir.parent.parent / "loras"
        self.downloads = Downloads(library, cache_dir.parent, new_loras, measure, self.fleet.loaded)
        self.shelf = Shelf(library, cache_dir.parent, self.downloads, self.fleet.held)
        self.learned = Learned(cache_dir, quantized_cache=self.server.quantized_cache)
        self.training = Training(
            library, self.fleet, measure, lambda: [lora.name for lora in self.loras.all()],
            loras_dir=new_loras, cache_dir=cache_dir,
        )  # fmt: skip
        self.perplexity = Perplexities(self.fleet.need, cache_dir)
        self._badges = Badges(library)
        self._cache_dir = cache_dir
        self._flags = {name: value for name, value in (flags or {}).items() if name != "model"}
        self._generation_flags = dict(generation_flags or {})
        self.preselected = str((flags or {}).get("model", ""))
        self.start_error: LoadstoneError | None = None  # why the model named at the start was refused
        self.start_error_for = ""  # that model

    # --- what there is ---

    def models(self) -> list[Model]:
        return self.library.models()

    def badges(self) -> dict[str, str]:
        """Model name → whether it would fit this machine if nothing else were loaded: ``fits in 4-bit``."""
        usual, _ = self.base("")
        return self._badges.all(without(self.measure(), *self.fleet.loaded()), usual.options)

    def find(self, name: str, source: Source = "page") -> Model:
        """The model of that name; a path is taken from the command line only. Raises ModelNotFound."""
        return self.library.find(name, allow_paths=source == "command line")

    def snapshot(self) -> Snapshot:
        return self.supervisor.snapshot()

    # --- before loading ---

    def base(self, name: str) -> tuple[Resolved[LoadOptions], str]:
        """The options that this model gets when nothing is changed by hand, and a warning about its saved file."""
        layers, warning = self._lower_layers(name)
        return resolve(layers), warning

    def _lower_layers(
        self, name: str, facts: ModelFacts | None = None
    ) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
        """The layers under the form, and a warning about the model's saved file."""
        saved, warning = self.settings.saved(name) if name else ({}, "")
        return [*self._machine_layers(facts), ("saved", saved), ("flag", self._flags)], warning

    def _machine_layers(self, facts: ModelFacts | None) -> list[tuple[str, Mapping[str, Any]]]:
        """The layers under what is saved. A yes to a model's code stands in for the option where nobody gave that."""
        return [
            (custom_code.APPROVED, {"trust_remote_code": True} if custom_code.approved(self.approvals, facts) else {}),
            ("settings.yaml", self.settings.load_values),
        ]

    def view(self, name: str, form: Mapping[str, Any] | None = None, source: Source = "page") -> View:
        """What the page shows of ``name`` with the options of ``form``. Problems are in the view, not raised."""
        machine = self.measure()
        facts: ModelFacts | None = None
        try:
            facts = self.library.facts(self.find(name, source)) if name else None
            if facts:
                refuse_quantization(facts.model.name, facts.quantization)
            resolved, warning = self._resolve(facts.model.name if facts else name, facts, form, source)
        except LoadstoneError as problem:
            plain, _ = self.base("")
            return View(name, facts, plain.options, plain.origin, _reasons(facts, plain.options, machine),
                        problem=problem)  # fmt: skip
        options, dropped = self._drop_inherited(resolved, facts, machine)
        options, bounded = _within_positions(options, facts)
        notes = (*dropped, *bounded, *([warning] if warning else []))
        found: LoadstoneError | None = None
        loras = LoraPlan()
        try:
            notes += check(options, _circumstances(facts, options, machine))
            loras = self._planned_loras(facts, options, resolved.origin["lora"])
        except LoadstoneError as problem:
            found = problem
        tokens = context_tokens(options, facts.context_tokens if facts else 0)
        return View(
            name, facts, options, resolved.origin, _reasons(facts, options, machine),
            notes=(*notes, *loras.notes), problem=found, context_tokens=tokens, loras=loras,
            fit=self._fit(facts, options, tokens, machine, loras, source) if facts else None,
            code_allowed=custom_code.allowed(self.approvals, facts, options, resolved.origin),
            code_approved=custom_code.approved(self.approvals, facts),
        )  # fmt: skip

    def _resolve(
        self, name: str, facts: ModelFacts | None, form: Mapping[str, Any] | None, source: Source = "page"
    ) -> tuple[Resolved[LoadOptions], str]:
        """The options of all layers. Of the form only what differs from the layers below is a choice of its own, and
        what is given beside something that it excludes: neither of the two may win without a word.

        Raises OptionError, also for a choice that only somebody at this machine may make.
        """
        layers, warning = self._lower_layers(name, facts)
        below = resolve(layers).options
        given = parse_values(LOAD_OPTIONS, form or {})
        clashing = contradicting(given)
        chosen = {key: value for key, value in given.items() if value != getattr(below, key) or key in clashing}
        for spec in (LOAD_OPTIONS[key] for key in chosen):
            if spec.local_only and source != "command line":
                raise OptionError(
                    f"{spec.flag} can only be given on the command line or in settings.yaml.", f"Leave {spec.name} out."
                )
        return resolve([*layers, ("form", chosen)]), warning

    def _drop_inherited(
        self, resolved: Resolved[LoadOptions], facts: ModelFacts | None, machine: Machine
    ) -> tuple[LoadOptions, tuple[str, ...]]:
        """Without values from settings.yaml or a flag for another model, where they cannot apply to this one.

        A person who starts with ``--load-in-4bit --model A`` and then picks the GPTQ model B is not refused.
        """
        if facts is None or facts.model.name == self.preselected:
            return resolved.options, ()
        reasons = _reasons(facts, resolved.options, machine)
        inherited = {
            name: spec.default
            for name, spec in LOAD_OPTIONS.items()
            if name in reasons and spec.strict and resolved.origin.get(name) in ("settings.yaml", "flag", "saved")
        }
        values = {n: d for n, d in inherited.items() if getattr(resolved.options, n) != d}
        notes = tuple(f"{LOAD_OPTIONS[n].flag} is left out here. {reasons[n]}" for n in values)
        return replace(resolved.options, **values), notes

    def _fit(
        self, facts: ModelFacts, options: LoadOptions, tokens: int, machine: Machine, loras: LoraPlan, source: Source
    ) -> Fit:
        """The plan beside what may end to make room for the model: what is loaded of the model itself first."""
        name = facts.model.name
        loaded = self.fleet.endable(by_hand=source != "request")
        ordered = sorted(loaded, key=lambda one: one.order.name != name)
        replaces = self.fleet.full(name) or any(one.order.name == name for one in ordered[:1])
        return fit_of(
            facts, options, tokens, machine, ordered, loras.adapters, self.learned, replaces=replaces,
        )  # fmt: skip

    def _planned_loras(self, facts: ModelFacts | None, options: LoadOptions, origin: str) -> LoraPlan:
        if facts is None or not options.lora:
            return LoraPlan()
        inherited = origin in ("settings.yaml", "flag") and facts.model.name != self.preselected
        return self.loras.planned(facts, options.lora, inherited=inherited)

    def allow_code(self, name: str, hashes: Mapping[str, str]) -> None:
        """Allow the Python files of a model as seen: file name → SHA-256. Raises CustomCodeRefused if they changed."""
        facts = self.library.facts(self.find(name))
        if {file.name: file.sha256 for file in facts.code_files} != dict(hashes):
            raise CustomCodeRefused(f"The Python files of {name} are not the ones that were shown.", "Look again.")
        self.approvals.allow(name, facts.code_files)

    def forget_code(self, name: str) -> None:
        """Take back the yes to a model's Python files: from its next load on they ask again."""
        self.approvals.forget(name)

    # --- loading ---

    def order(
        self, name: str, form: Mapping[str, Any] | None = None, source: Source = "page", *, anyway: bool = False
    ) -> LoadOrder:
        """The order for one load. Raises what a load would be refused for before it starts.

        ``anyway``: where the plan says that the model does not fit, let the libraries place its layers and risk
        that memory runs out.
        """
        return self._prepare(name, form, source, anyway)[0]

    def _prepare(
        self, name: str, form: Mapping[str, Any] | None, source: Source, anyway: bool
    ) -> tuple[LoadOrder, Fit]:
        """The order and the plan that it follows, from one view. Raises as :meth:`order` does."""
        if not name:
            raise ModelNotFound("No model is chosen.", "Choose one in the menu.")
        view = self.view(name, form, source)
        if view.problem:
            raise view.problem
        facts, fit = view.facts, view.fit
        if facts is None or fit is None:
            raise AssertionError("a view of a model without a problem has facts and a plan")
        if view.options.trust_remote_code and facts.code_files and not view.code_allowed:
            raise custom_code.refused(facts)
        _require_packages(view, facts)
        if not fit.fits and not anyway:
            raise refusal(fit)
        return self._order(view, facts, fit), fit

    def _order(self, view: View, facts: ModelFacts, fit: Fit) -> LoadOrder:
        by_hashes = view.code_allowed and not custom_code.owner_allows(view.options, view.origin)
        return LoadOrder(
            name=facts.model.name, path=str(facts.model.path), file_format=facts.model.file_format,
            task=facts.task, quantization=facts.quantization, options=view.options,
            ctx_tokens=view.context_tokens,
            offload_dir=_absolute(view.options.disk_cache_dir) or str(self._cache_dir / "offload"),
            cache_dir=str(self._cache_dir), custom_code_allowed=view.code_allowed,
            code_hashes={file.name: file.sha256 for file in facts.code_files} if by_hashes else {},
            device_map=dict(fit.plan.device_map) if fit.fits else {}, expected=fit.expected if fit.fits else (),
            quantized_cache=self.server.quantized_cache, notes=view.notes, adapters=view.loras.choices,
        )  # fmt: skip

    def load(
        self, name: str, form: Mapping[str, Any] | None = None, source: Source = "page", *, anyway: bool = False
    ) -> Supervisor:
        """Start loading; returns at once, with whom to ask how it goes. Raises what is known to be wrong beforehand,
        or Busy.
        """
        order, fit = self._prepare(name, form, source, anyway)
        self._forget_start_error()
        owner = self.fleet.load(order, beside=fit.beside, ends=fit.ends)
        self.shelf.used(order.name)
        return owner

    def _prepare_on_demand(self, name: str) -> Prepared:
        """For a request that names a model: with what is saved for it, and nothing that nobody has allowed."""
        order, fit = self._prepare(name, None, "request", False)
        self._forget_start_error()
        self.shelf.used(order.name)
        return Prepared(order, fit.beside, fit.ends)

    def start_model(self) -> str:
        """The name of the model named at the start. One named by its path is known by this name from now on.

        Raises what :meth:`Library.find` raises.
        """
        self.preselected = self.library.add(self.find(self.preselected, "command line")).name
        return self.preselected

    def load_at_start(self, *, anyway: bool = False) -> None:
        """Start loading the model named at the start. What it is refused for is raised, and kept for the page."""
        try:
            self.load(self.start_model(), source="command line", anyway=anyway)
        except LoadstoneError as error:
            self.start_error, self.start_error_for = error, self.preselected
            raise

    def _forget_start_error(self) -> None:
        self.start_error, self.start_error_for = None, ""

    def unload(self, name: str = "") -> None:
        """End the model of that name, or the one that the page shows. Raises ModelNotFound where it is not loaded."""
        self._forget_start_error()
        self.fleet.unload(name)

    def reload(self) -> None:
        """Load what is loaded, or was last, with the same options and LoRAs, planned for what is free now. What was
        loaded anyway has no plan. Raises NothingLoaded where nothing ever was, and as :meth:`load` does.
        """
        order = self.snapshot().last
        if order is None or not order.expected:
            self.supervisor.reload()
            self._forget_start_error()
        else:
            self.load(order.name, {**vars(order.options), "lora": entries_of(order.adapters)})

    def cancel(self) -> None:
        self.fleet.cancel()

    def close(self) -> None:
        """End what runs: a training, downloads and every model's process."""
        self.training.close()
        self.downloads.close()
        self.fleet.close()

    # --- quantized copies ---

    def quantized_copies(self) -> list[copies.QuantizedCopy]:
        """The quantized copies that loads have kept, by model."""
        return copies.copies(self._cache_dir)

    def delete_copy(self, key: str) -> None:
        """Delete one; a model that was loaded from it goes on. Raises UserError where there is none of that key."""
        copies.delete(self._cache_dir, key)

    # --- settings ---

    def save_settings(self, name: str, form: Mapping[str, Any]) -> Path:
        """Keep the options for this model: what differs from the table and settings.yaml. Raises OptionError."""
        model = self.find(name)
        try:
            facts: ModelFacts | None = self.library.facts(model)
        except LoadstoneError:  # it cannot be loaded now; its settings are kept all the same
            facts = None
        lower = resolve(self._machine_layers(facts)).options
        resolved, _ = self._resolve(name, facts, form)
        values = {
            key: value for key in LOAD_OPTIONS if (value := getattr(resolved.options, key)) != getattr(lower, key)
        }
        values.pop("model", None)
        return self.settings.save(name, values)


def _circumstances(facts: ModelFacts | None, options: LoadOptions, machine: Machine) -> Circumstances:
    values = {name: getattr(options, name) for name in LOAD_OPTIONS}
    if facts is None:
        return Circumstances(gpu_names=machine.gpu_names, values=values)
    return facts.circumstances(machine.gpu_names, values)


def _reasons(facts: ModelFacts | None, options: LoadOptions, machine: Machine) -> dict[str, str]:
    """Why options do not apply, by name; only those."""
    circumstances = _circumstances(facts, options, machine)
    reasons = {name: spec.applies(circumstances) for name, spec in LOAD_OPTIONS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _within_positions(options: LoadOptions, facts: ModelFacts | None) -> tuple[LoadOptions, tuple[str, ...]]:
    """With a context of no more tokens than the model has positions, and a note where more were asked for."""
    if facts is None or not facts.positions or context_tokens(options, facts.context_tokens) <= facts.positions:
        return options, ()
    note = (
        f"A context of {options.ctx_size:,} tokens cannot be: the model has {facts.positions:,} positions, and those "
        "are used."
    )
    return replace(options, ctx_size=facts.positions), (note,) if options.ctx_size else ()


def _absolute(folder: str) -> str:
    """A folder as somebody here named it, for a process that runs elsewhere; "" stays."""
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


def _require_packages(view: View, facts: ModelFacts) -> None:
    """Raises MissingPackage for what the checkpoint's format or an option needs."""
    features = [facts.quantization]
    if "attn_implementation" not in view.reasons:
        features.append(view.options.attn_implementation)
    for feature in features:
        if feature in packages.EXTRAS and packages.missing(feature):
            raise MissingPackage(
                f"{facts.model.name} needs {', '.join(packages.missing(feature))}.",
                f"Run: {packages.install_line(*packages.EXTRAS[feature])}",
            )
