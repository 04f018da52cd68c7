"""What ``server.py`` does without a page: answer one prompt, check the machine, merge, train, bring the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from modules import demo as demo_model
from modules import packages
from modules.errors import NameTaken, SettingsError, UserError
from modules.hub import Job
from modules.options import LOAD_OPTIONS, TRAINING_FILE, TRAINING_OPTIONS, TrainingOptions
from modules.protocol import Done, Piece
from modules.service import Service
from modules.service.training import Data, Phase, Training, TrainState
from modules.settings import read_values
from modules.supervisor import LOAD_STATES, Snapshot
from modules.training.messages import TrainOrder
from modules.units import counted, format_bytes, format_seconds

HERE = Path(__file__).resolve().parent.parent
_POLL_S = 1.0


def say(text: str) -> None:
    """To stderr: stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def demo(models_dir: Path) -> str:
    """Bring the demo model into ``models_dir``; its name."""
    return demo_model.bring(models_dir, say)


def _model_for(flag: str, service: Service) -> str:
    """The name of the model named at the start. Raises UserError where there is none, and ModelNotFound."""
    if not service.preselected:
        raise UserError(f"{flag} needs a model.", "Name one with --model, or use --demo.")
    return service.start_model()


def print_plan(service: Service, *, as_json: bool) -> int:
    """Print the plan for the model named at the start; 0 if it fits, else 2. Raises what is wrong with the options."""
    view = service.view(_model_for("--plan", service), source="command line")
    if view.problem or view.fit is None:
        raise view.problem or UserError("There is nothing to plan.")
    plan = view.fit.plan
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1))
        return 0 if plan.fits else 2
    print(f"{plan.model}: {view.fit.verdict}")
    print(f"{'':8} {'weights':>10} {'context':>10} {'working':>10} {'process':>10} {'total':>10} {'allowed':>10}")
    for device in plan.devices:
        sizes = (device.weights_bytes, device.kv_cache_bytes, device.working_bytes, device.fixed_bytes,
                 device.total_bytes, device.cap_bytes)  # fmt: skip
        print(f"{device.name:8} " + " ".join(f"{format_bytes(size):>10}" for size in sizes))
    print(f"{'at most':8} {plan.peak}")
    for name, free in service.measure().in_words:
        print(f"{name:8} {free}")
    for note in (*view.notes, *plan.notes):
        print(f"note: {note}")
    for suggestion in plan.suggestions:
        print(f"or: {suggestion.text}")
    return 0 if plan.fits else 2


def prompt(service: Service, text: str, *, raw: bool, anyway: bool = False) -> int:
    """Load the model, print its answer to ``text``; the exit status. Raises what loading or generating raises."""
    if not text:
        raise UserError("--prompt has no text.", "Give the text to answer in quotation marks.")
    service.load(_model_for("--prompt", service), source="command line", anyway=anyway)
    snapshot = _loaded(service)
    if snapshot.error or snapshot.loaded is None:
        raise snapshot.error or UserError("Nothing was loaded.")
    report = snapshot.loaded.report
    as_chat = report.has_chat_template and not raw
    say(
        f"{snapshot.loaded.order.name} loaded in {format_seconds(report.load_seconds)}, "
        f"{format_bytes(report.footprint_bytes)}; {'chat' if as_chat else 'plain completion'}"
    )
    for note in (*snapshot.notes, *report.notes):
        say(f"note: {note}")
    asked = {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
    for chunk in service.generate({}, **asked):
        if isinstance(chunk, Piece):
            print(chunk.text, end="", flush=True)
        elif isinstance(chunk, Done):
            print(flush=True)
            speed = chunk.completion_tokens / chunk.seconds if chunk.seconds else 0
            say(f"{chunk.completion_tokens} tokens, {speed:.1f} tokens/s")
            if chunk.left_out:
                say(f"note: {chunk.left_out}")
    return 0


def _loaded(service: Service) -> Snapshot:
    """The snapshot when the load is over. Until then a terminal shows how far it is, on one line that goes away."""
    if not sys.stderr.isatty():
        return service.supervisor.wait_loaded()
    from tqdm import tqdm

    with tqdm(bar_format="{desc}", leave=False) as line:
        while (snapshot := service.snapshot()).state in LOAD_STATES:
            if progress := snapshot.progress:
                share = f", {100 * progress.done // progress.total} %" if progress.total else ""
                line.set_description_str(f"{snapshot.order.name if snapshot.order else ''}: {progress.stage}{share}")
            service.supervisor.wait(snapshot.version, _POLL_S)
    return service.supervisor.wait_loaded()


def download(service: Service, text: str, pattern: str = "") -> int:
    """Bring what ``text`` names from the Hub, with a progress bar on stderr; its folder on stdout.

    Raises what is wrong with the name, the disk or the Hub. Ctrl-C keeps what has come.
    """
    from tqdm import tqdm

    service.downloads.alone()
    offer = service.downloads.look(text, pattern)
    for note in offer.notes:
        say(f"note: {note}")
    say(f"{offer.repository.name}: {counted(len(offer.order.files), 'file')}, {format_bytes(offer.order.size_bytes)}")
    if left_out := len(offer.choice.left_out):
        say(f"{left_out} further files are left out; --file '*' takes all.")
    job = service.downloads.begin(offer)
    if verdict := service.downloads.verdict(offer):
        say(verdict)
    try:
        with tqdm(total=job.order.size_bytes, unit="B", unit_scale=True, desc=job.order.name) as bar:
            job = service.downloads.queue.wait_for(job.key, lambda now: _draw(bar, now))
    except KeyboardInterrupt:
        again = " ".join(["--download", text, *(["--file", pattern] if pattern else [])])
        say(f"Stopped. What has come is kept: the same command goes on with it.\n    ./start.sh {again}")
        return 130
    if job.error:
        raise job.error
    print(job.order.target)
    return 0


def _draw(bar: Any, job: Job) -> None:
    bar.n = job.done_bytes
    bar.set_postfix_str(job.stage, refresh=False)
    bar.refresh()


def merge(service: Service, name: str, max_shard_size: str) -> int:
    """Write the model named at the start with its LoRAs merged in, and say where; 0. Raises what merging raises."""
    model = _model_for("--merge", service)
    view = service.view(model, source="command line")
    if view.problem:
        raise view.problem
    merger = service.loras.merger
    service.loras.merge(model, view.options.lora, name, max_shard_size)
    said = ""
    try:
        while (state := merger.state()).running:
            if state.progress and state.progress.stage != said:
                say(said := state.progress.stage)
            merger.wait(state.version, _POLL_S)
    finally:
        merger.cancel()  # where Ctrl-C ended the loop
    if state.merged is None:
        raise state.error or UserError("Nothing was merged.")
    for note in state.merged.notes:
        say(f"note: {note}")
    say(f"{format_bytes(state.merged.size_bytes)}; {state.merged.tokens} tokens are those of the unmerged pair")
    print(state.merged.path)
    return 0


def train(service: Service, file: Path, *, anyway: bool = False) -> int:
    """Train the LoRA that the YAML file describes, with a progress bar on stderr; its folder on stdout.

    Goes on with an unfinished training of the same name. Ctrl-C pauses. Raises SettingsError, and what loading and
    training raise.
    """
    from tqdm import tqdm

    training = service.training
    order = _begin_training(service, file, anyway)
    for note in order.notes:
        say(f"note: {note}")
    try:
        with tqdm(unit="step", desc=order.name) as bar:
            state = _follow_training(training, bar)
    except KeyboardInterrupt:
        say("\nPausing: a checkpoint is being written. Ctrl-C once more ends it at once.")
        training.pause()
        state = training.wait_over()
    finally:
        training.close()
    if state.phase is Phase.PAUSED:
        say(f"Paused at step {state.last.step if state.last else 0}. The same command goes on with it.")
        return 130
    if state.trained is None:
        raise state.error or UserError("Nothing was trained.")
    made = state.trained
    for note in state.notes[len(order.notes) :]:
        say(f"note: {note}")
    measured = "" if made.evaluation_loss is None else f", {made.evaluation_loss:.4f} on the examples kept aside"
    say(f"{made.steps} steps, {made.tokens_per_second:,.0f} tokens/s; loss {made.loss:.4f}{measured}; the LoRA is that "
        f"of step {made.step}")  # fmt: skip
    print(made.path)
    return 0


def _begin_training(service: Service, file: Path, anyway: bool) -> TrainOrder:
    """Start, or go on with an unfinished training of the same name. Raises what is wrong with the file."""
    values = read_training(file)
    described = {key: values.pop(key, spec.default) for key, spec in TRAINING_FILE.items()}
    loading = {key: values.pop(key) for key in list(values) if key in LOAD_OPTIONS}
    service.preselected = str(loading.pop("model", "") or service.preselected)
    name = str(described["name"]) or file.stem
    options = service.training.options(values)
    if any(run.name == name for run in service.training.runs()):
        return _go_on(service, name, options, anyway)
    load = service.order(_model_for("--train", service), loading, "command line", anyway=anyway)
    path = str(file.parent / str(described["data"])) if described["data"] else ""
    data = Data(path, "", str(described["hub"]), described["data_format"])
    return service.training.start(name, data, values, anyway=anyway, load=load)


def _go_on(service: Service, name: str, options: TrainingOptions, anyway: bool) -> TrainOrder:
    """Raises NameTaken where the unfinished training was begun with other options."""
    run = service.training.find(name)
    if run.order.options != options:
        raise NameTaken(
            f"There is an unfinished training of {name}, which was begun with other options.",
            "Give those again to go on with it, or choose another name.",
        )
    say(f"Going on with {name} from step {run.step}, with the model and the data that it began with.")
    return service.training.resume(name, anyway=anyway)


def read_training(file: Path) -> dict[str, Any]:
    """The values of a training's file. Raises SettingsError, with the line."""
    if not file.is_file():
        raise SettingsError(f"There is no file {file}.", "Name the YAML file that says what to train; see README.")
    return read_values(file, {**TRAINING_FILE, **TRAINING_OPTIONS, **LOAD_OPTIONS})


def _follow_training(training: Training, bar: Any) -> TrainState:
    said = ""
    while (state := training.state()).running:
        if state.progress and state.progress.stage != said:
            bar.set_postfix_str(said := state.progress.stage)
        if state.last:
            bar.total, bar.n, said = state.total_steps, state.last.step, ""
            bar.set_postfix_str(
                f"loss {state.last.loss:.4f}, {state.last.tokens_per_second:,.0f} tokens/s", refresh=False
            )
            bar.refresh()
        training.wait(state.version, _POLL_S)
    return state


def check(service: Service) -> int:
    """Print what of this machine and its packages works; 0 if models can be loaded, else 1."""
    machine = service.measure()
    print(f"Python      {sys.version.split()[0]}")
    print(f"RAM         {format_bytes(machine.ram_free_bytes)} of {format_bytes(machine.ram_total_bytes)} free")
    print(f"Disk        {format_bytes(machine.disk_free_bytes)} free")
    for gpu in machine.gpus:
        size = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
        print(f"GPU {gpu.index}       {gpu.name}, {size}")
    if not machine.gpus:
        print("GPU         none found: models will run on the CPU")
    for name, version in packages.installed_versions().items():
        print(f"{name:<20} {version or 'MISSING'}")
    for feature in packages.EXTRAS:
        missing = packages.missing(feature)
        print(f"{feature:<20} {'ok' if not missing else 'optional, missing: ' + ', '.join(missing)}")
    print(f"Models      {len(service.models())} found")
    print("Worker      trying a load process …", flush=True)
    ok = subprocess.run([sys.executable, "-m", "modules.worker.check"], cwd=HERE, check=False).returncode == 0
    print("All that is needed works." if ok else "Loading models will fail; see above.")
    return 0 if ok else 1
