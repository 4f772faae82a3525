"""What the documents show works: the examples run, the code of the pages runs, the flags are the command line's."""

import ast
import re
import runpy
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import tyro

from trimtab.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_LINE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
# Sketches of an interface, not programs.
SKETCHES = ("class Objective(Protocol)",)


def test_loop_dpo_learns(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(ROOT / "examples" / "loop_dpo.py"), run_name="__main__")
    told = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1
    assert "held-out accuracy before: 0.00" in told and "held-out accuracy after: 1.00" in told


def test_loop_rloo_raises_a_planted_reward(capsys: pytest.CaptureFixture[str]):
    names = runpy.run_path(str(ROOT / "examples" / "loop_rloo.py"), run_name="__main__")
    told = capsys.readouterr().out
    before, after = (float(told.split(f"held-out reward {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert before < 2.5 and after > 9  # 26 of 259 tokens are lower-case letters: 1.2 of 12 by chance
    kl = [float(found) for found in re.findall(r"KL (-?[\d.]+)", told)]
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 5
    groups = names["leave_one_out"](torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0] * 2))
    # The others of 1 have mean 35 / 7, those of 8 have 28 / 7.
    assert groups[0] == pytest.approx(1 - 5) and groups[15] == pytest.approx(8 - 4)


def code_of(page: Path) -> str:
    """The Python blocks of a page, one after the other, as a reader would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in blocks if not block.startswith(SKETCHES))


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    row = '{"prompt": "The grass is", "chosen": " green.", "rejected": " seven."}\n'
    (tmp_path / "pairs.jsonl").write_text(row, encoding="utf-8")
    run_and_compare(code_of(page))


def run_and_compare(code: str) -> None:
    """Run statements one by one; the value of an expression is what the comment behind it says."""
    names: dict[str, Any] = {}
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        said = lines[(statement.end_lineno or 0) - 1][statement.end_col_offset :].strip().removeprefix("# ")
        if isinstance(statement, ast.Expr):
            value = eval(ast.unparse(statement.value), names)
            assert not said.startswith(("tensor", "0.")) or repr(value) == said
        else:
            exec(ast.unparse(statement), names)


def flags_of(config: type) -> set[str]:
    """The flags of a composed config; what is given without a flag is left out."""
    hints = get_type_hints(config, include_extras=True)
    found: set[str] = set()
    for entry in fields(config):
        hint = hints[entry.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found |= flags_of(hint)
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            found.add("--" + entry.name.replace("_", "-"))
    return found


def shown_flags(text: str) -> set[str]:
    """The flags in the first columns of the tables of a text."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `-")]
    return {flag for cell in cells for flag in re.findall(r"`(--[\w-]+)`", cell)}


def sections() -> dict[str, str]:
    """The text under each heading of the command-line page."""
    headings = re.split(r"^## (.*)\n", COMMAND_LINE, flags=re.MULTILINE)
    return dict(zip(headings[1::2], headings[2::2], strict=True))


def described(command: str) -> set[str]:
    """The flags that the page gives a command: those of its section, and for training those that all share."""
    by_heading = sections()
    shared = by_heading["Flags of all training commands"] if command in {"sft", "reward", "dpo", "kto"} else ""
    own = [text for heading, text in by_heading.items() if command in re.split(", | and ", heading)]
    assert len(own) == 1, f"docs/command_line.md needs one section about {command}"
    return shown_flags(shared + own[0])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_names_every_flag(command: str):
    found = COMMANDS[command]
    config = getattr(import_module(f"trimtab.recipes.{found.module}"), found.config)
    assert flags_of(config) <= described(command)


def test_the_page_names_no_flag_that_is_gone():
    known = {
        flag
        for found in COMMANDS.values()
        for flag in flags_of(getattr(import_module(f"trimtab.recipes.{found.module}"), found.config))
    }
    assert shown_flags(COMMAND_LINE) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if target.startswith(("http:", "https:")):
            continue
        other = (page.parent / target).resolve() if target else page
        # The page of results is written from runs, last of all.
        assert other.exists() or other.name == "results.md", f"{page.name}: {target}"
        assert not anchor or anchor[1:] in anchors(other), f"{page.name}: {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, spaces as hyphens, punctuation gone."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
