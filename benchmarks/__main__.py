"""`python -m benchmarks`: the commands."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import alternate, gpu, growth, profiling, report, sampling


@dataclass(frozen=True)
class Show:
    """The table of the results that were written."""

    out: str = str(report.RESULTS)
    """Folder of the JSON files."""


def show(config: Show) -> None:
    """Read and print."""
    alternate.print_table(report.read_all(Path(config.out)))


COMMANDS = {
    "cpu": (alternate.Cpu, alternate.cpu),
    "gpu": (gpu.Gpu, gpu.gpu),
    "growth": (growth.Growth, growth.growth),
    "sampling": (sampling.Sampling, sampling.sampling),
    "profile": (profiling.Profile, profiling.profile_step),
    "show": (Show, show),
}


def main() -> int:
    """Run one command; 2 for a user's mistake."""
    config = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()}, prog="python -m benchmarks"
    )
    [function] = [function for kind, function in COMMANDS.values() if type(config) is kind]
    try:
        function(config)  # pyright: ignore[reportArgumentType] (each function takes its own config)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
