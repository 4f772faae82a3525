"""`trimtab watch`: the report of runs that go on, in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Watch:
    """The page of `trimtab report` on a local web server; new figures and texts come in by themselves."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or one that holds several runs, such as quickstart's."""
    port: int = 8377
    """Where the page is served; 0: any free port."""
    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine alone."""


def watch(config: Watch) -> None:
    """Serve the page until Ctrl-C."""
    from contextlib import suppress
    from pathlib import Path

    from trimtab.progress import console
    from trimtab.report.watch import THIS_MACHINE, open_server

    if not config.runs:
        raise ValueError("give at least one run directory.")
    if not 0 <= config.port < 2**16:
        raise ValueError(f"--port {config.port}: a number from 0 to 65535 is needed.")
    if not config.host:
        raise ValueError("--host '': an address is needed, such as 127.0.0.1.")
    with open_server([Path(run) for run in config.runs], config.host, config.port) as server:
        console.print(
            f"watching {', '.join(config.runs)} at http://{config.host}:{server.server_port}/ (Ctrl-C ends it)"
        )
        if config.host not in THIS_MACHINE:
            console.print("[yellow]whoever can reach this address can read these runs[/yellow]")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
