"""What test_parallel.py runs on every rank: commands one after the other, in the same processes."""

import json
import sys
from importlib import import_module
from pathlib import Path

from trimtab import parallel
from trimtab.cli import COMMANDS, read_config
from trimtab.lock import released


def run(name: str, flags: list[str]) -> None:
    command = COMMANDS[name]
    recipe = import_module(f"trimtab.recipes.{command.module}")
    config = read_config(getattr(recipe, command.config), [*command.preset, *flags], prog=f"trimtab {name}", about=name)
    with released():
        getattr(recipe, command.function)(config)


if __name__ == "__main__":
    parallel.start()
    assert parallel.ranks() > 1, "start this with torchrun"
    asked = json.loads(Path(sys.argv[1]).read_text())
    parallel.ENOUGH = parallel.ENOUGH if asked["room"] else 0.0
    for name, flags in asked["cases"]:
        run(name, flags)
    parallel.leave(0)
