"""Getting models and LoRAs from the Hub: search, look, check, download. One for each service."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modules.devices import Machine
from modules.errors import LoadstoneError, NotOnHub, UserError
from modules.hub import (
    Ask,
    Choice,
    DownloadQueue,
    Found,
    Hub,
    Job,
    Order,
    RemoteFile,
    Repository,
    checks,
    choose,
    choose_again,
    keeping,
    parse,
    placing,
    tokens,
)
from modules.hub.choosing import WEIGHT_ENDINGS
from modules.hub.phantom import phantom
from modules.hub.queue import key_of
from modules.library import Library, Model, ModelFacts
from modules.library.facts import read_facts
from modules.options import LoadOptions, context_tokens
from modules.service.badges import IN_4BIT, badge
from modules.service.fit import Fit, fit_of, without
from modules.supervisor import Loaded

_SIXTEEN_BIT, _FOUR_BIT = 1.15, 0.4  # of a model's 16-bit bytes: what it takes in memory, roughly
_FITS = {"fits": "fits", "4-bit": "fits in 4-bit", "": "too large"}


@dataclass(frozen=True)
class Offer:
    """What would be downloaded. ``here_bytes`` of it lie on this machine already; ``note`` says what is unexpected."""

    ask: Ask
    repository: Repository
    choice: Choice
    order: Order
    here_bytes: int
    free_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def missing_bytes(self) -> int:
        return self.order.size_bytes - self.here_bytes


@dataclass(frozen=True)
class Result:
    """One model that a search found. ``fits`` in words, "" where its size is not known."""

    found: Found
    fits: str


class Downloads:
    """See the module. May be used from any thread; asks nothing and starts nothing before it is told to."""

    def __init__(
        self, library: Library, models_dir: Path, loras_dir: Path, measure: Callable[[], Machine],
        loaded: Callable[[], Sequence[Loaded]],
    ) -> None:  # fmt: skip
        self.hub = Hub()
        self.queue = DownloadQueue(models_dir / ".cache" / "downloads.json")
        self._library = library
        self._roots = {"model": models_dir, "lora": loras_dir}
        self._measure = measure
        self._loaded = loaded

    def start(self) -> None:
        """Go on with the downloads that were open when the server ended. Returns at once."""
        threading.Thread(target=self._start, name="downloads-start", daemon=True).start()

    def _start(self) -> None:
        self.queue.start()
        known = {job.key for job in self.queue.jobs()}
        for root in self._roots.values():
            placing.remove_forgotten(root, known)
            keeping.empty_trash(root)

    def alone(self) -> None:
        """For one download without a page: no other goes on, and none is remembered."""
        self.queue = DownloadQueue(None)

    def close(self) -> None:
        """End the download processes; what is open goes on with the next start."""
        self.queue.close()

    # --- search ---

    def search(
        self, text: str, *, task: str = "", size: str = "", sort: str = "downloads", fitting: bool = False
    ) -> list[Result]:
        """Models on the Hub whose names hold ``text``; with ``fitting`` those that fit this machine."""
        machine = self._free_machine()
        results = [
            Result(found, fits_roughly(found.weights_bytes, found.parameters, machine))
            for found in self.hub.search(text, task=task, size=size, sort=sort, limit=60 if fitting else 20)
        ]
        kept = [result for result in results if not fitting or result.fits not in ("", _FITS[""])]
        return kept[:20]

    # --- before the first byte ---

    def look(self, text: str, pattern: str = "") -> Offer:
        """What ``text`` (``user/model:branch`` or an address) would bring. Raises UserError and the Hub's refusals.

        ``pattern`` names files, or globs, set apart by commas; without one what suits is chosen.
        """
        ask = parse(text, pattern)
        repository = self.hub.repository(ask)
        return self._offer(ask, repository, choose(repository.name, repository.files, ask.pattern))

    def narrowed(self, offer: Offer, pattern: str) -> Offer:
        """The same repository with other files chosen, without asking again. Raises NotOnHub."""
        return self._offer(offer.ask, offer.repository, choose(offer.repository.name, offer.repository.files, pattern))

    def _offer(self, ask: Ask, repository: Repository, choice: Choice) -> Offer:
        order = self._order(ask, repository, choice)
        free = checks.free_bytes(self._roots[choice.kind])
        return Offer(ask, repository, choice, order, self._here(order), free, _notes(repository, order))

    def _order(self, ask: Ask, repository: Repository, choice: Choice, *, check_all: bool = False) -> Order:
        root = self._roots[choice.kind]
        cache = self._library.hf_cache
        order = Order(
            repository.name, ask.revision, repository.commit, choice.kind, choice.wanted,
            target=str(root / replace(ask, repo=repository.name).folder), partial="", endpoint=self.hub.endpoint,
            cache=str(cache) if cache else "", check_all=check_all,
        )  # fmt: skip
        return replace(order, partial=str(placing.partial_folder(root, key_of(order))))

    def _here(self, order: Order) -> int:
        """The bytes that need not be fetched: they lie in the model's folder, the cache, or from an earlier try."""
        target, record = Path(order.target), placing.read_record(Path(order.target))
        size = 0
        for file in order.files:
            recorded = record.files.get(file.name) if record else None
            blob = Path(order.cache, f"models--{order.repo.replace('/', '--')}", "blobs", file.hash or "-")
            in_target = bool(recorded and recorded.hash == file.hash and (target / file.name).is_file())
            if in_target or (order.cache and file.hash and blob.is_file()):
                size += file.size
            else:
                size += placing.fetched_bytes(replace(order, files=(file,)))
        return size

    def check(self, offer: Offer) -> None:
        """Raises UserError where nothing is chosen, where the folder is another repository's, holds files of somebody's
        own, would lose its weights, or is not writable; DiskFull.
        """
        if offer.choice.question:
            raise UserError(offer.choice.question, "Name it as the file.")
        _refuse_another(offer.order)
        _refuse_to_drop_weights(offer.order)
        placing.refuse_to_replace(offer.order, _has_another_size)
        checks.check_room(Path(offer.order.target).parent, offer.missing_bytes)

    def describe(self, offer: Offer) -> tuple[ModelFacts, str, Fit] | None:
        """What the model is, a word on whether it fits, and the plan, by its headers; None for what is no model.

        Raises what the Hub raises; what the library says of it where it is broken.
        """
        if offer.choice.kind == "lora" or not offer.order.files:
            return None
        folder = Path(tempfile.mkdtemp(prefix="loadstone-"))
        try:
            phantom(self.hub, offer.repository, offer.order.files, folder)
            facts = read_facts(_model_in(folder, offer))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        options, machine = LoadOptions(), self._measure()
        tokens_ = context_tokens(options, facts.context_tokens)
        fit = fit_of(facts, options, tokens_, machine, self._loaded())
        return facts, badge(facts, self._free_machine()), fit

    def verdict(self, offer: Offer) -> str:
        """The plan's verdict in a sentence; why there is none where it cannot be made."""
        try:
            described = self.describe(offer)
        except LoadstoneError as error:
            return f"Whether it fits cannot be said: {error.message}"
        except OSError as error:  # of the disk that the headers are put on
            return f"Whether it fits cannot be said: {error.strerror or error}."
        if described is None:
            return ""
        facts, word, fit = described
        better = word.startswith("fits") if not fit.fits else fit.plan.away_bytes and word == IN_4BIT
        ways = f" It {word}." if better else ""
        return f"{facts.summary()}. {fit.verdict}{ways}"

    # --- downloading ---

    def download(self, text: str, pattern: str = "") -> Job:
        """Look, check, and queue the download. Raises what :meth:`look` and :meth:`check` raise."""
        return self.begin(self.look(text, pattern))

    def begin(self, offer: Offer) -> Job:
        """Queue what was looked at. Raises what :meth:`check` raises."""
        self.check(offer)
        return self.queue.add(offer.order, offer.notes)

    def open_targets(self) -> set[Path]:
        """The folders that downloads are about to fill."""
        return {Path(job.order.target) for job in self.queue.jobs() if job.state.is_open}

    def repair(self, folder: Path) -> Job:
        """Fetch again what of a downloaded model is missing or damaged. Raises UserError as :func:`recorded`.

        The Hub in use is asked, whatever the record says: a folder that was copied here brings its record along.
        """
        order, source = replace(self.recorded_order(folder), check_all=True), recorded(folder).endpoint
        checks.check_room(folder.parent, 0)
        note = f"It was downloaded from {source}; what is broken comes from {order.endpoint}."
        return self.queue.add(order, (note,) if source != order.endpoint else ())

    def update(self, folder: Path) -> Job:
        """Bring a downloaded model to the commit that its branch has now; what has not changed is not fetched.

        Raises what the Hub refuses with, and UserError as :func:`recorded` and for files of somebody's own.
        """
        record = recorded(folder)
        ask = Ask(record.repo, record.revision)
        repository = self.hub.repository(ask)
        choice = choose_again(repository.name, repository.files, record.files, self._files_at(record))
        order = self._order(ask, repository, choice)
        order = replace(order, target=str(folder), partial=str(placing.partial_folder(folder.parent, "-")))
        placing.refuse_to_replace(order, _has_another_size)
        checks.check_room(folder.parent, order.size_bytes - self._here(order))
        return self.queue.add(order)

    def _files_at(self, record: placing.Record) -> tuple[RemoteFile, ...]:
        """All files of the commit that is here; none where the Hub has that commit no more."""
        try:
            return self.hub.repository(Ask(record.repo, record.commit)).files
        except NotOnHub:
            return ()

    def newer_commit(self, folder: Path) -> str:
        """The commit that the model's branch has now, where that is another; "" where it is up to date."""
        record = recorded(folder)
        now = self.hub.commit(Ask(record.repo, record.revision))
        return now if now != record.commit else ""

    def recorded_order(self, folder: Path) -> Order:
        """The order that would bring the same files of the same commit again, from the Hub in use. Raises UserError."""
        record = recorded(folder)
        kind = "lora" if folder.parent == self._roots["lora"] else "model"
        return Order(
            record.repo, record.revision, record.commit, kind, tuple(record.files.values()),  # type: ignore[arg-type]
            target=str(folder), partial=str(placing.partial_folder(folder.parent, "-")), endpoint=self.hub.endpoint,
        )  # fmt: skip

    # --- the token ---

    def token(self) -> tokens.TokenStatus:
        return tokens.status()

    def save_token(self, token: str) -> str:
        """Keep a token for this machine once the Hub knows it; its owner's name. Raises HubTokenRefused."""
        return tokens.save(self.hub, token)

    def forget_token(self) -> None:
        tokens.forget()

    def test_token(self) -> str:
        """The name of the owner of the token in use. Raises HubTokenRefused."""
        return tokens.tested(self.hub)

    def _free_machine(self) -> Machine:
        return without(self._measure(), *self._loaded())


def recorded(folder: Path) -> placing.Record:
    """The record of where a model is from. Raises UserError where it was not downloaded here."""
    if (record := placing.read_record(folder)) is None:
        raise UserError(
            f"It is not known where {folder.name} is from.", "Download it here, and it can be verified and updated."
        )
    return record


def _refuse_another(order: Order) -> None:
    """Raises UserError where the folder holds a model that has another name on the Hub: user/a_b and user/a:b."""
    record = placing.read_record(Path(order.target))
    if record and (record.repo.casefold(), record.revision) != (order.repo.casefold(), order.revision):
        raise UserError(
            f"The folder {order.name} holds {Ask(record.repo, record.revision).name}, which would be replaced.",
            "Delete that model, or rename its folder, and try again.",
        )


def _refuse_to_drop_weights(order: Order) -> None:
    """Raises UserError where small files of a newer commit would come without weights: the older ones do not stay."""
    if any(file.name.endswith(WEIGHT_ENDINGS) for file in order.files):
        return
    if lost := [name for name in placing.stale_in(order) if name.endswith(WEIGHT_ENDINGS)]:
        raise UserError(
            f"{order.name} holds {lost[0]} of an older commit, which would be removed.",
            "Update the model on the Session tab, or choose its weights too.",
        )


def _has_another_size(path: Path, file: RemoteFile) -> bool:
    """What can be said at once; a file of the same size is hashed by the download's process."""
    return path.stat().st_size != file.size


def fits_roughly(weights_bytes: int, parameters: int, machine: Machine) -> str:
    """A word on a model of which only the size is known; "" where not even that is."""
    size = weights_bytes or 2 * parameters
    if not size:
        return ""
    free = max((gpu.free_bytes for gpu in machine.gpus), default=machine.ram_free_bytes)
    way = "fits" if size * _SIXTEEN_BIT <= free else "4-bit" if 2 * parameters * _FOUR_BIT <= free else ""
    return _FITS[way]


def _model_in(folder: Path, offer: Offer) -> Model:
    """The phantom as the library would list it."""
    name = Path(offer.order.target).name
    gguf = next((file.name for file in offer.order.files if file.name.endswith(".gguf")), "")
    names = {file.name for file in offer.order.files}
    if gguf and "config.json" not in names:
        return Model(name, folder / gguf, folder, "gguf")
    has_safetensors = any(other.endswith(".safetensors") for other in names)
    return Model(name, folder, folder, "safetensors" if has_safetensors else "pytorch")


def _notes(repository: Repository, order: Order) -> tuple[str, ...]:
    notes = []
    if repository.asked:
        notes.append(f"{repository.asked} is called {repository.name} now.")
    if any(file.name.endswith(".py") for file in order.files):
        notes.append("It brings Python code, which runs only after you allow it.")
    if not any(file.name.endswith(".safetensors") for file in order.files) and any(
        file.name.endswith(".bin") for file in order.files
    ):
        notes.append("Its weights are pickles (.bin), which are opened without running code.")
    return tuple(notes)
