"""Training LoRAs on the model that is loaded: one at a time, in a process of its own, that can go on after a crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.devices import Machine
from modules.errors import (
    AdapterNotFound,
    Busy,
    DiskFull,
    LoadstoneError,
    MustUnload,
    NameTaken,
    NothingLoaded,
    NotTrainable,
    OptionError,
    OutOfMemory,
)
from modules.library import Library, ModelFacts
from modules.options import TrainingOptions, training_options
from modules.planner import from_facts
from modules.planner.training import missing_targets
from modules.protocol import LoadOrder, decode
from modules.service.names import folder_name
from modules.service.training.estimating import Pace, estimate
from modules.service.training.job import Room, TrainJob
from modules.service.training.state import Data, Estimate, Run, TrainState
from modules.supervisor import Fleet, Loaded
from modules.training import data as reading
from modules.training import runs
from modules.training.messages import PREVIEW, DataFile, Preview, PreviewOrder, TrainOrder
from modules.units import format_bytes

_SPARE_BYTES = 64 * 2**20
_WAYS_OUT = "It comes back when the training is over."


class Training:
    """See the module. May be used from any thread.

    ``fleet``: the model in its front is trained on. ``names``: those that LoRAs have. ``loras_dir``: where
    finished LoRAs go. ``cache_dir``: where unfinished runs are kept, in ``training/``.
    """

    def __init__(
        self, library: Library, fleet: Fleet, measure: Callable[[], Machine],
        names: Callable[[], Iterable[str]], *, loras_dir: Path, cache_dir: Path,
    ) -> None:  # fmt: skip
        self._library = library
        self._fleet = fleet
        self._measure = measure
        self._names = names
        self._loras_dir = loras_dir
        self._runs_dir = cache_dir / "training"
        self._pace = Pace(cache_dir / "training.json")
        self.job = TrainJob(self._pace.note)

    # --- before it starts ---

    def options(self, values: Mapping[str, Any]) -> TrainingOptions:
        """The training options that these values give over the defaults. Raises OptionError."""
        return training_options(values)

    def preview(self, data: Data, values: Mapping[str, Any], examples: int = 5) -> Preview:
        """The first examples as the loaded model will see them, and counts. Does not wait for answers.

        Raises NothingLoaded, OptionError, BrokenData, which names the line, and MissingPackage.
        """
        options = self.options(values)
        self._loaded()
        with reading.on_disk(data.path, data.text, data.hub, data.data_format, self._runs_dir) as file:
            return self._look(file, options, examples)

    def _look(self, file: DataFile, options: TrainingOptions, examples: int) -> Preview:
        preview = decode(self._fleet.front.ask(PREVIEW, PreviewOrder(file, options, examples))["preview"])
        if not isinstance(preview, Preview):
            raise AssertionError(f"the worker answered with {type(preview).__name__}")
        return preview

    def estimate(self, data: Data, values: Mapping[str, Any], preview: Preview | None = None) -> Estimate:
        """What it would take beside all that runs now. Raises as :meth:`preview` does, which it makes without one."""
        options = self.options(values)
        loaded = self._loaded()
        preview = preview or self.preview(data, values, 0)
        return self._estimate(loaded.order, options, preview.longest, preview)

    def _estimate(
        self, order: LoadOrder, options: TrainingOptions, longest_tokens: int, preview: Preview | None = None
    ) -> Estimate:
        facts = self._facts(order)
        loaded = self._fleet.front.snapshot().loaded
        return estimate(
            facts, order.options, options, longest_tokens, preview, self._measure(), loaded, self._pace,
            order.device_map,
        )  # fmt: skip

    def _facts(self, order: LoadOrder) -> ModelFacts:
        """Of the model at the order's path: it need not lie in a model folder. Raises what the library raises."""
        return self._library.facts(self._library.find(order.path, allow_paths=True))

    def problem(self, values: Mapping[str, Any]) -> LoadstoneError | None:
        """What makes training the loaded model with these options impossible; ``fix`` holds loader options that mend
        it."""
        try:
            loaded = self._loaded()
            self._check(loaded.order, self.options(values), loaded)
        except LoadstoneError as problem:
            return problem
        return None

    def _loaded(self) -> Loaded:
        loaded = self._fleet.front.snapshot().loaded
        if loaded is None:
            raise NothingLoaded("No model is loaded that a LoRA could be trained on.")
        return loaded

    def _check(self, order: LoadOrder, options: TrainingOptions, loaded: Loaded | None = None) -> None:
        """Raises NotTrainable for what the load options make impossible, OptionError for modules not there."""
        refuse(order, loaded)
        if options.dora and order.quantization == "gptq":
            raise NotTrainable("DoRA cannot be trained on GPTQ layers (peft 0.21).", "Turn dora off.")
        if options.target_modules:
            checkpoint = from_facts(self._facts(order))
            if missing := missing_targets(checkpoint, options.target_modules):
                raise OptionError(
                    f"{order.name} has no module {missing[0]!r}.", "Leave target_modules empty to take all linear ones."
                )

    # --- training ---

    def start(
        self, name: str, data: Data, values: Mapping[str, Any], *, unload: bool = False, anyway: bool = False,
        load: LoadOrder | None = None,
    ) -> TrainOrder:  # fmt: skip
        """Begin to train the LoRA ``name`` on the loaded model, or on the one of ``load``; returns at once.

        ``unload``: the loaded model may be unloaded where both do not fit; it is loaded again afterwards.
        ``anyway``: train even where the estimate says that it does not fit.
        Raises NothingLoaded, NotTrainable, OptionError, BrokenData, NameTaken, DiskFull, Busy, MustUnload, OutOfMemory.
        """
        options = self.options(values)
        source = load or self._loaded().order
        self._check(source, options, self._fleet.front.snapshot().loaded if load is None else None)
        folder, out = self._new_folders(name)
        with reading.on_disk(data.path, data.text, data.hub, data.data_format, self._runs_dir) as file:
            found = reading.read(file)
            longest = found.longest_tokens
            if load is None:  # by the loaded model's tokens, so that what was shown before is what is done
                preview = self._look(file, options, 0)
                longest = preview.longest if preview.counted == preview.total else longest
            room, notes = self._room(source, options, longest, unload=unload, anyway=anyway)
            self._check_disk(file)
            kept = DataFile(str(folder / f"data{Path(file.path).suffix}"), found.data_format, file.name)
            order = TrainOrder(
                out.name, _plain(source), kept, options, str(out), str(folder), (*found.notes, *notes),
                whole=True,
            )  # fmt: skip
            self.job.start(order, room, lambda: self._make(order, file))
        return order

    def _make(self, order: TrainOrder, file: DataFile) -> None:
        folder = Path(order.folder)
        if folder.exists():  # somebody was faster
            raise NameTaken(f"The training of {order.name} has begun already.")
        try:
            folder.mkdir(parents=True)
            shutil.copyfile(file.path, order.data.path)
            runs.write_order(folder, order)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DiskFull(f"The training cannot be kept in {folder}: {error.strerror}.") from None

    def _new_folders(self, name: str) -> tuple[Path, Path]:
        """The run's and the LoRA's. Raises OptionError for a name that cannot be one, NameTaken, and Busy where another
        process is at that training."""
        plain = folder_name(name, "LoRA")
        if ":" in plain:
            raise OptionError(f"{name!r} cannot be the name of a LoRA: behind a colon stands its weight.")
        out, folder = self._loras_dir / plain, self._runs_dir / plain
        if out.exists() or plain in set(self._names()):
            raise NameTaken(f"There is a LoRA {plain} already.")
        if folder.exists():
            _refuse_held(runs.read_order(folder))
            raise NameTaken(
                f"There is an unfinished training of {plain}.", "Go on with it, or delete it, or choose another name."
            )
        return folder, out

    def _check_disk(self, file: DataFile) -> None:
        needed = Path(file.path).stat().st_size + _SPARE_BYTES
        for folder in (self._runs_dir, self._loras_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DiskFull(f"{folder} cannot be made: {error.strerror}.") from None
            if (free := shutil.disk_usage(folder).free) < needed:
                raise DiskFull(
                    f"A training takes {format_bytes(needed)} and more in {folder}; {format_bytes(free)} are free."
                )

    def _room(
        self, order: LoadOrder, options: TrainingOptions, longest_tokens: int, *, unload: bool, anyway: bool
    ) -> tuple[Room, tuple[str, ...]]:
        """How the loaded model makes room. Raises MustUnload, Busy and OutOfMemory."""
        made = self._estimate(order, options, longest_tokens)
        if not made.fits and not anyway:
            raise OutOfMemory(
                f"Training takes about {format_bytes(made.total_bytes)} on {made.on}; "
                f"{format_bytes(made.free_bytes)} can be free.",
                " Or: ".join(made.suggestions),
            )
        if not made.ends_first:
            return Room(), made.notes
        snapshot = self._fleet.front.snapshot()
        if snapshot.generating:
            raise Busy(
                f"{made.ends_first} has to make room, and it is answering.",
                "Wait for the answers to end, or stop them.",
            )
        if not unload:
            raise MustUnload(
                f"Training takes about {format_bytes(made.total_bytes)} on {made.on}, which is not there beside "
                f"{made.ends_first}.",
                f"Let {made.ends_first} be unloaded for the time. {_WAYS_OUT}",
            )
        assert snapshot.loaded is not None
        back = snapshot.loaded.order
        notes = (*made.notes, f"{made.ends_first} is unloaded for the time. {_WAYS_OUT}")
        return Room(made.ends_first, self._fleet.front.unload, lambda: bring_back(self._fleet, back)), notes

    def pause(self) -> None:
        """Let the training write a checkpoint and end its process; :meth:`resume` goes on. Returns at once."""
        self.job.ask("pause")

    def stop_and_keep(self) -> None:
        """Let the training end now, and keep the LoRA as it is, or its best. Returns at once."""
        self.job.ask("keep")

    def cancel(self) -> None:
        """End the training and delete its run; returns when its process is gone."""
        self.job.cancel()

    def close(self) -> None:
        """End the process; the run can go on later."""
        self.job.close()

    def state(self) -> TrainState:
        return self.job.state()

    def wait(self, version: int, timeout_s: float) -> TrainState:
        """The state as soon as it is newer than ``version``, or as it stands after ``timeout_s``."""
        return self.job.wait(version, timeout_s)

    def wait_over(self, timeout_s: float | None = None) -> TrainState:
        """The state as soon as no training runs."""
        return self.job.wait_over(timeout_s)

    # --- unfinished runs ---

    def runs(self) -> list[Run]:
        """Those that can go on, the newest first; without those that run, here or in another process."""
        return [run for run in self._unfinished() if not runs.held(run.order)]

    def _unfinished(self) -> list[Run]:
        state, found = self.state(), []
        for folder in sorted(self._runs_dir.glob("*")) if self._runs_dir.is_dir() else []:
            order = runs.read_order(folder)
            if order is None or (state.running and state.name == order.name) or Path(order.out).exists():
                continue
            last = runs.checkpoints(folder)[-1:]
            changed = (last[0][1] if last else folder / runs.ORDER).stat().st_mtime
            found.append(Run(order.name, order, last[0][0] if last else 0, runs.total_steps(folder), changed))
        return sorted(found, key=lambda run: -run.changed)

    def find(self, name: str) -> Run:
        """The unfinished run of that name. Raises AdapterNotFound, and Busy where another process is at it."""
        for run in self._unfinished():
            if run.name == name:
                _refuse_held(run.order)
                return run
        raise AdapterNotFound(f"There is no unfinished training of {name!r}.", "Start a new one.")

    def resume(self, name: str, *, unload: bool = False, anyway: bool = False) -> TrainOrder:
        """Go on with an unfinished run from its last checkpoint, with the model and options that it began with.

        Raises AdapterNotFound where there is none, and as :meth:`start` does: Busy where another process is at it too.
        """
        order = self.find(name).order
        if Path(order.out).exists():
            raise NameTaken(f"There is a LoRA {order.name} already.")
        longest = reading.read(order.data).longest_tokens
        room, notes = self._room(order.load, order.options, longest, unload=unload, anyway=anyway)
        order = replace(order, notes=tuple(dict.fromkeys((*order.notes, *notes))))
        self.job.start(order, room)
        return order

    def discard(self, name: str) -> None:
        """Delete an unfinished run. Raises AdapterNotFound, and Busy where another process is at it."""
        runs.remove(self.find(name).order)


def _refuse_held(order: TrainOrder | None) -> None:
    """Raises Busy where another process is training as the order says."""
    if order is not None and runs.held(order):
        raise Busy(f"Another process is training {order.name}.", "Wait until it has ended.")


def bring_back(fleet: Fleet, order: LoadOrder) -> None:
    """Load again what made room, unless something else has taken its place. Raises LoadstoneError."""
    if not fleet.full(order.name) and order.name not in (loaded.order.name for loaded in fleet.loaded()):
        fleet.load(order, beside=True)


def _plain(order: LoadOrder) -> LoadOrder:
    """The order without LoRAs: they are not trained on, and not carried over. The model lies where it lay."""
    options = replace(order.options, lora=())
    return replace(order, adapters=(), options=options, expected=())


def refuse(order: LoadOrder, loaded: Loaded | None) -> None:
    """Raises NotTrainable where a model that is loaded so cannot be trained."""
    if order.task == "seq2seq":
        raise NotTrainable(
            f"{order.name} is an encoder-decoder model, which cannot be trained here.", "Load a causal language model."
        )
    if order.quantization == "gptq" and not order.options.disable_exllama:
        raise NotTrainable(
            f"{order.name} is loaded with a kernel that cannot be trained (ExLlama's, where it is there).",
            "Load it again with disable_exllama.",
            fix={"disable_exllama": True},
        )
    if order.quantization not in ("", "gptq", "bitsandbytes", "gguf"):
        raise NotTrainable(
            f"{order.name} is quantized with {order.quantization}, whose layers cannot be trained.",
            "Train on the 16-bit model, in 4-bit if memory is short, or on a GPTQ copy.",
        )
    places = set(order.device_map.values()) | set(loaded.report.device_map.values() if loaded else ())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise NotTrainable(
            f"Layers of {order.name} lie on disk or in RAM beside a GPU, where they cannot be trained.",
            "Load it in 4-bit, so that it fits the GPU.",
            fix={"load_in_4bit": True, "load_in_8bit": False} if not order.quantization else {},
        )
