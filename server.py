"""Loadstone: parse flags, build the objects, wire them, serve. The only place where objects are made."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modules import collector, flags
from modules.errors import Cancelled, LoadstoneError, SettingsError
from modules.options import COMMAND_OPTIONS, SERVER_OPTIONS, ServerOptions
from modules.units import format_seconds

if TYPE_CHECKING:
    from modules.protocol import LoadOrder
    from modules.service import Service

HERE = Path(__file__).resolve().parent
log = logging.getLogger("loadstone")


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 2 for what the user can mend, 1 for the rest."""
    try:
        parsed = flags.parse(argv)  # before anything heavy: --help and a typo are answered at once
        if isinstance(parsed, flags.Help):
            print(parsed.text)
            return 0
        service, server = prepare(parsed)
        try:
            return _run(service, server, parsed)
        finally:
            service.close()
    except LoadstoneError as error:
        print(f"loadstone: {_with_details(error)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


@collector.spared()
def prepare(parsed: flags.Parsed) -> tuple[Service, ServerOptions]:
    """Every object, wired; nothing is started. Raises SettingsError, and what bringing the demo model raises."""
    from modules import commands, devices
    from modules.library import Library, default_hf_cache
    from modules.library.loras import LoraLibrary
    from modules.service import Service, Traffic
    from modules.settings import CodeApprovals, Settings
    from modules.supervisor import NEVER, Fleet, Supervisor

    given = ServerOptions(**parsed.server)
    home = Path(given.home).expanduser().resolve() if given.home else HERE
    models = home / "models"
    settings = Settings(_settings_file(given.settings, home), models)
    server = parsed.server_options(settings.server_values)
    _log_to_stderr(verbose=server.verbose)
    if parsed.command_options().demo:
        parsed.load.setdefault("model", commands.demo(models))
    hf_cache = default_hf_cache() if server.hf_cache else None
    traffic = Traffic()
    serves = not any(COMMAND_OPTIONS[name].alone for name, value in parsed.command.items() if value is not False)

    def load_ended(order: LoadOrder, seconds: float, error: LoadstoneError | None) -> None:
        traffic.load_ended(order, seconds, error)
        if serves:  # a command says so itself
            _log_load(order.name, seconds, error)

    def measure() -> devices.Machine:
        return devices.measure(models if models.is_dir() else home)

    def supervisor(*, warm: bool = False) -> Supervisor:
        return Supervisor(warm_worker=warm and server.warm_worker, measure=measure, on_load=load_ended)

    service = Service(
        Library(_folders(models, "model_dir", server.model_dir), hf_cache),
        settings,
        CodeApprovals(models / ".cache" / "allowed-code.json"),
        Fleet(supervisor(warm=True), supervisor, most=server.max_loaded, idle_s=server.idle_timeout * 60 or NEVER),
        measure,
        cache_dir=models / ".cache",
        flags=parsed.load,
        generation_flags=parsed.generation,
        loras=LoraLibrary(_folders(home / "loras", "lora_dir", server.lora_dir), hf_cache),
        traffic=traffic,
        server=server,
    )
    return service, server


def _settings_file(given: str, home: Path) -> Path:
    """The file with this machine's defaults. Raises SettingsError where one was named that is not there."""
    file = Path(given).expanduser() if given else home / "settings.yaml"
    if given and not file.exists():
        raise SettingsError(
            f"{SERVER_OPTIONS['settings'].flag} names {file}, which is not there.",
            "Check the path; without the flag settings.yaml is read, where there is one.",
        )
    return file


def _folders(own: Path, option: str, further: Iterable[str]) -> list[Path]:
    """Where something is looked for: our own folder first, then those that flags and settings name.

    One of those that is not there is said, and kept: it may be on a drive that is mounted later.
    """
    named = [Path(folder).expanduser().resolve() for folder in further]
    for folder in named:
        if not os.path.isdir(folder):
            log.warning("%s names %s, which is no folder here now.", SERVER_OPTIONS[option].flag, folder)
    return [own, *named]


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "asyncio", "markdown_it", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _run(service: Service, server: ServerOptions, parsed: flags.Parsed) -> int:
    from modules import commands

    command = parsed.command_options()
    if command.check:
        return commands.check(service)
    if command.download:
        return commands.download(service, command.download, command.file)
    if command.plan:
        return commands.print_plan(service, as_json=command.json)
    if "merge" in parsed.command:
        return commands.merge(service, command.merge, command.max_shard_size)
    if "train" in parsed.command:
        return commands.train(service, Path(command.train), anyway=command.load_anyway)
    if "prompt" in parsed.command:  # given, if only as an empty text
        return commands.prompt(service, command.prompt, raw=command.raw_prompt, anyway=command.load_anyway)
    with collector.spared():
        from modules import web

    door = web.open_door(server)
    listener = web.listen(server.listen_port, web.listen_address(server))
    if service.preselected:
        _load_at_start(service, anyway=command.load_anyway)
    web.serve(service, listener, server, door)
    return 0


def _load_at_start(service: Service, *, anyway: bool) -> None:
    """A model that cannot be loaded does not keep the page from opening: the error is on it."""
    try:
        service.load_at_start(anyway=anyway)
    except LoadstoneError as error:
        log.error("%s: %s", service.preselected, _with_details(error))


def _log_load(name: str, seconds: float, error: LoadstoneError | None) -> None:
    if error is None:
        log.info("%s is ready after %s.", name, format_seconds(seconds))
    elif isinstance(error, Cancelled):
        log.info("%s", error)
    else:
        log.error("%s was not loaded: %s", name, _with_details(error))


def _with_details(error: LoadstoneError) -> str:
    """The error in words, and below it the traceback or log that belongs to it, or how to see that."""
    if not error.details:
        return str(error)
    shown = error.details if log.isEnabledFor(logging.DEBUG) else f"{SERVER_OPTIONS['verbose'].flag} shows the details."
    return f"{error}\n{shown}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
