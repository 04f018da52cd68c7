"""Keeping the library: what each model takes, favourites, verifying, updating, deleting, duplicates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import ModelInUse, UserError
from modules.hub import Job, keeping, placing
from modules.hub.keeping import Duplicate, Marks, Told, Verified
from modules.library import Library, Model
from modules.library.scan import HUB_CACHE
from modules.protocol import LoadOrder
from modules.service.downloads import Downloads, recorded


@dataclass(frozen=True)
class Kept:
    """One model as the shelf shows it. ``used`` in seconds since the epoch, 0 for never."""

    name: str
    path: Path
    size_bytes: int
    used: float
    favourite: bool
    source: str  # user/model:branch at a commit, "Hugging Face cache", or ""
    repairable: bool  # its source is recorded


class Shelf:
    """See the module. May be used from any thread."""

    def __init__(
        self, library: Library, models_dir: Path, downloads: Downloads, held: Callable[[], Sequence[LoadOrder]]
    ) -> None:
        self._library = library
        self._downloads = downloads
        self._held = held  # what processes read, or are about to
        self.marks = Marks(models_dir / ".cache" / "library.json")

    def kept(self) -> list[Kept]:
        """Every model that is offered: favourites first, then by name. Sizes are read from the disk."""
        favourites, used = self.marks.favourites(), self.marks.last_used()
        models = [self._kept(model, favourites, used) for model in self._library.models()]
        return sorted(models, key=lambda kept: (not kept.favourite, kept.name.casefold()))

    def _kept(self, model: Model, favourites: frozenset[str], used: dict[str, float]) -> Kept:
        record = placing.read_record(_folder(model))
        source = f"{record.repo}:{record.revision} at {record.commit[:8]}" if record else ""
        if model.root == self._library.hf_cache:
            source = HUB_CACHE
        return Kept(
            model.name, model.path, keeping.size_of(model.path), used.get(model.name, 0.0), model.name in favourites,
            source, record is not None,
        )  # fmt: skip

    def size_of(self, name: str) -> int:
        """The bytes that this one takes. Raises ModelNotFound."""
        return keeping.size_of(self._library.find(name).path)

    def used(self, name: str) -> None:
        """The model is being loaded."""
        self.marks.used(name, time.time())

    def favourite(self, name: str, on: bool) -> None:
        self._library.find(name)
        self.marks.set_favourite(name, on)

    def verify(self, name: str, told: Told = keeping.silent) -> Verified:
        """Compare every file with what the Hub said of it. Raises ModelNotFound, UserError where that is not known.

        ``told`` gets how far it is; what it raises ends it.
        """
        folder = _folder(self._library.find(name))
        return keeping.verify(folder, recorded(folder).files.values(), told)

    def repair(self, name: str) -> Job:
        """Fetch what is broken of it, in the background. Raises as :meth:`verify`, and what the Hub refuses."""
        return self._downloads.repair(_folder(self._library.find(name)))

    def newer_commit(self, name: str) -> str:
        """The commit that its branch has now, "" where that is the one that is here. Asks the Hub."""
        return self._downloads.newer_commit(_folder(self._library.find(name)))

    def update(self, name: str) -> Job:
        """Bring it to its branch's newest commit, in the background."""
        return self._downloads.update(_folder(self._library.find(name)))

    def delete(self, name: str) -> int:
        """Delete the model; the bytes that it took. Raises UserError where other models lie in it, and ModelInUse where
        it, or what lies in it, is loaded or being downloaded.

        Models in the Hugging Face cache are that cache's own.
        """
        model = self._library.find(name)
        if model.root == self._library.hf_cache:
            raise UserError(f"{name} lies in the Hugging Face cache.", "Delete it with the command hf cache rm.")
        if model.root not in self._library.roots:
            raise UserError(f"{name} lies in no model folder: {model.path}.", "Delete it by hand.")
        self._refuse_in_use(model)
        self._refuse_with_others(model)
        size = keeping.size_of(model.path) if not model.path.is_symlink() else 0
        keeping.remove(model.path, model.root)
        self.marks.forget(name)
        return size

    def _refuse_in_use(self, model: Model) -> None:
        if held := [path for order in self._held() if _goes_with(path := Path(order.path), model.path)]:
            what = model.name if held[0] == model.path else f"{held[0].name} in {model.name}"
            raise ModelInUse(f"{what} is loaded.", "Unload it first.")
        targets = self._downloads.open_targets()
        if _folder(model) in targets or any(_goes_with(target, model.path) for target in targets):
            raise ModelInUse(f"{model.name} is being downloaded.", "Cancel the download first.")

    def _refuse_with_others(self, model: Model) -> None:
        """A folder may hold GGUF files that are offered by themselves, or be the folder of an owner's models."""
        if others := [other.name for other in self._library.models() if model.path in other.path.parents]:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise UserError(f"{model.name} holds other models: {others[0]}{more}.", "Delete these first.")

    def duplicates(self, told: Told = keeping.silent) -> list[Duplicate]:
        """Weight files that take their space more than once. Reads files of equal size whose hash is not recorded.

        ``told``: see :meth:`verify`.
        """
        models = {model.name: model.path for model in self._library.models()}
        return keeping.duplicates(models, told)


def _folder(model: Model) -> Path:
    """The folder that a download fills: a GGUF file lies in it, a model is it."""
    if model.file_format != "gguf":
        return model.path
    return model.path.parent


def _goes_with(path: Path, removed: Path) -> bool:
    """Whether ``path`` is gone when ``removed`` is: it is that, or lies in it. Of a link nothing but the link goes."""
    if path == removed or removed.is_symlink():
        return path == removed
    return removed in path.parents or path.resolve().is_relative_to(removed.resolve())
