"""Every loss has a section in the docs that shows its name, its hyperparameters and their defaults."""

from pathlib import Path

import pytest

from trimtab.advantages import ADVANTAGES, SCORE_SHAPES
from trimtab.algorithms import ALGORITHMS
from trimtab.kl import KL_LOSSES
from trimtab.losses.arguments import describe
from trimtab.losses.policy import POLICY_LOSSES
from trimtab.losses.preference import ALL_LOSSES
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.losses.value import VALUE_LOSSES

METHODS = Path(__file__).parents[2] / "docs" / "methods"
PAGES = {
    "preference_losses.md": ALL_LOSSES,
    "unpaired_losses.md": UNPAIRED_LOSSES,
    "reward_losses.md": {**REWARD_LOSSES, **RANKING_LOSSES},
    "policy_losses.md": {**ADVANTAGES, **POLICY_LOSSES, **VALUE_LOSSES, **KL_LOSSES, **SCORE_SHAPES},
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


def test_the_page_of_online_rl_shows_the_table_of_the_code():
    page = (METHODS / "policy_gradient.md").read_text(encoding="utf-8")
    shown = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line]
    rows = {cells[0]: cells[1:] for cells in shown if cells[0] in ALGORITHMS}
    assert rows.keys() == ALGORITHMS.keys()
    for name, row in ALGORITHMS.items():
        names = [row.advantage, row.loss, row.kl_in, row.kl, f"{row.kl_coefficient:g}", row.mean_over, row.value_loss]
        assert rows[name] == [*names, str(row.epochs), str(row.minibatches)]
