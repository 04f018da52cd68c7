"""Loadstone: parse flags, build the objects, wire them, serve. The only place where objects are made."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from modules import flags
from modules.errors import LoadstoneError, PortInUse, UserError

if TYPE_CHECKING:
    from modules.service import Service

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
CACHE = MODELS / ".cache"

log = logging.getLogger("loadstone")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for what the user can mend, 1 for the rest."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except LoadstoneError as error:
        print(f"loadstone: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    parsed = flags.parse(argv)  # before anything heavy: --help and a typo are answered at once
    if isinstance(parsed, flags.Help):
        print(parsed.text)
        return 0
    from modules import commands
    from modules.settings import Settings

    settings = Settings(Path(parsed.settings_file or HERE / "settings.yaml"), MODELS)
    server, command = parsed.layered(settings.server_values)
    logging.basicConfig(
        level=logging.DEBUG if server.verbose else logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if command.demo:
        parsed.load.setdefault("model", commands.demo(MODELS))
    service = build(settings, parsed, server)
    try:
        if command.check:
            return commands.check(service)
        if command.prompt:
            return commands.prompt(service, command.prompt, raw=command.raw_prompt)
        return serve(service, server)
    finally:
        service.supervisor.close()


def build(settings: Settings, parsed: flags.Parsed, server: flags.ServerOptions) -> Service:
    """Every object, wired. Starts nothing."""
    from modules import devices
    from modules.library import Library, default_hf_cache
    from modules.service import Service
    from modules.settings import CodeApprovals
    from modules.supervisor import Supervisor

    roots = [MODELS, *(Path(folder).expanduser().resolve() for folder in server.model_dir)]

    def measure() -> devices.Machine:
        return devices.measure(MODELS)

    return Service(
        Library(roots, default_hf_cache() if server.hf_cache else None),
        settings,
        CodeApprovals(CACHE / "allowed-code.json"),
        Supervisor(warm_worker=server.warm_worker, measure=measure),
        measure,
        cache_dir=CACHE,
        flags=parsed.load,
        generation_flags=parsed.generation,
    )


def serve(service: Service, server: ServerOptions) -> int:
    """Serve the page until Ctrl-C or SIGTERM. Raises PortInUse."""
    from modules import web

    listener = web.listen(server.listen_port)
    if service.preselected:
        _load_at_start(service)
    web.serve(service, listener, open_browser=server.auto_launch, verbose=server.verbose)
    return 0


def _load_at_start(service: Service) -> None:
    """A model that cannot be loaded does not keep the page from opening: the error is on it."""
    try:
        service.load(service.preselected, source="command line")
    except LoadstoneError as error:
        service.start_error = error
        log.error("%s: %s", service.preselected, error)


if __name__ == "__main__":
    sys.exit(main())
