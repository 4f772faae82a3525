"""The table of data facts: what `data check` found, as it stands in data.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.report.records import record
from trimtab.recipes.training import facts_of
from trimtab.records import Preference, Prompt
from trimtab.report.data_facts import FACTS, cell, data_table


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(Prompt.from_user(prompt), chosen, rejected)


def test_what_data_check_finds_stands_in_the_table():
    train = [pair("a", "long answer", "no"), pair("a", "no", "long answer"), pair("b", "yes, it is", "no")]
    held_out = [pair("b", "yes, it is", "no"), pair("c", "x", "yy")]
    facts = {"train": {"facts": facts_of(train, train)}, "eval": {"facts": facts_of(held_out, train)}}
    table = data_table(record("dpo", "dpo", data=json.loads(json.dumps(facts))))
    assert table is not None and (table.run, table.parts) == ("dpo", ["training", "held out"])
    rows = dict(table.rows)
    assert rows["kind of record"] == ["Preference", "Preference"] and rows["records"] == ["3", "2"]
    assert rows["different prompts"] == ["2", "2"] and rows["contradictory pairs"] == ["1", "0"]
    assert rows["rows also in the training data"] == ["", "1"]
    assert rows["the longer answer wins"][0].startswith("67% of 3 (95% interval")
    assert rows["prompt length"][0] == "median 1 characters, 95% up to 1, longest 1"
    assert "annotators" not in rows, "what no part has is no row"


def test_every_fact_of_the_table_is_a_fact():
    known = facts_of([pair("a", "b", "c")], [])
    assert FACTS.keys() <= known.keys()


def test_a_run_without_facts_has_no_table():
    for data in ({}, {"train": {"rows": 3}}, {"train": 3}, {"train": {"facts": {"duplicates": None, "lengths": []}}}):
        assert data_table(record(data=data)) is None


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (None, ""),
        (1234, "1,234"),
        ({"count": 2, "examples": ["x:1"]}, "2"),
        ({"count": 1, "total": 4, "low": 0.046, "high": 0.699}, "25% of 4 (95% interval 5% to 70%)"),
        ({"count": 0, "total": 0, "low": 0.0, "high": 1.0}, "0"),
        ({"count": {"count": {}}}, ""),
        ([1], ""),
        (True, ""),
    ],
)
def test_cells(fact: Any, said: str):
    assert cell(fact) == said
