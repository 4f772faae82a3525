"""Every loss has a section in the docs that shows its name, its hyperparameters and their defaults."""

from pathlib import Path

import pytest

from trimtab.losses.arguments import describe
from trimtab.losses.preference import ALL_LOSSES
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES

METHODS = Path(__file__).parents[2] / "docs" / "methods"
PAGES = {
    "preference_losses.md": ALL_LOSSES,
    "unpaired_losses.md": UNPAIRED_LOSSES,
    "reward_losses.md": {**REWARD_LOSSES, **RANKING_LOSSES},
}


def sections(page: str) -> dict[str, str]:
    """The text under each heading of the second and third level."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in (METHODS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith(("## ", "### ")):
            heading = line.lstrip("# ")
        found.setdefault(heading, []).append(line)
    return {heading: "\n".join(lines) for heading, lines in found.items()}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, losses in PAGES.items() for name in losses])
def test_section_shows_the_defaults_of_the_code(page, name):
    assert f"`{describe(PAGES[page][name])}`" in sections(page)[name]
    assert len(sections(page)[name]) > 150
