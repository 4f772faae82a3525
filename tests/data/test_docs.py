"""The examples of docs/data.md are read as their sections say."""

import json
import re
from pathlib import Path

import pytest

from trimtab import data
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking, Record

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[Record]] = {
    "### Prompts": Prompt,
    "### Demonstrations": Demonstration,
    "### Preferences": Preference,
    "### Rankings": Ranking,
    "### Unpaired feedback": Feedback,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_examples_of_the_page(write, section: str):
    found = re.search(r"```json\n(.*?)```", PAGE[PAGE.index(section) :], re.DOTALL)
    assert found is not None
    rows = [json.loads(line) for line in found[1].splitlines()]
    records = data.load(write(*rows), SECTIONS[section]).records
    assert len(records) == len(rows)


def test_the_page_names_every_source_and_suffix():
    for name in [*data.SOURCES, ".jsonl", ".json", ".csv", ".parquet"]:
        assert f"`{name}`" in PAGE
