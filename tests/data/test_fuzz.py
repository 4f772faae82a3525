"""Whatever a file holds, `load` gives records or one of its two errors, and what it gives can be written and read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trimtab import data
from trimtab.data.checks import facts
from trimtab.data.files import READERS
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking, Record

KINDS: list[type[Record]] = [Prompt, Demonstration, Preference, Ranking, Feedback]
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

COLUMNS = (
    *("prompt", "question", "instruction", "input", "messages", "conversations", "text", "completion", "response"),
    *("chosen", "rejected", "completions", "output_1", "output_2", "label", "labels", "majority", "margin", "weight"),
    *("annotator", "user", "answer", "final_answer", "confidence", "output", "other"),
)
TURN = st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", "b\n", "Human:", "\ud800", "ü", "\0"])
TEXT = st.one_of(st.text(max_size=8), st.lists(TURN, max_size=6).map("".join))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "boss"]) | st.none(), "content": TEXT | st.none()}
)
MESSAGES = st.lists(MESSAGE, max_size=4)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
VALUE = st.one_of(
    TEXT, MESSAGES, st.lists(TEXT | MESSAGES, max_size=3), st.sampled_from([0, 1, 2, 0.5, True]), ANYTHING
)
ROW = st.dictionaries(st.sampled_from(COLUMNS), VALUE, min_size=1, max_size=6)


def loaded_or_refused(path: Path, kind: type[Record], *, skip_invalid: bool) -> list[Any]:
    """The records, or none where `load` refuses with one of its errors; every other exception fails the test."""
    try:
        return data.load(path, kind, skip_invalid=skip_invalid).records
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError)
        assert str(path) in str(error)
        str(error).encode()
        return []


@FUZZ
@given(rows=st.lists(ROW, max_size=3), kind=st.sampled_from(KINDS), skip_invalid=st.booleans())
def test_random_rows(tmp_path: Path, rows: list[dict[str, Any]], kind: type[Record], skip_invalid: bool):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = loaded_or_refused(path, kind, skip_invalid=skip_invalid)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps(data.to_row(record)) + "\n" for record in records), encoding="utf-8")
    if records:
        facts(records)
        assert written_and_read(again, kind) == records


def written_and_read(path: Path, kind: type[Record]) -> list[Any]:
    """The records of a file that `to_row` wrote."""
    return data.load(path, kind).records


@FUZZ
@given(content=st.binary(max_size=60), suffix=st.sampled_from(sorted(READERS)), packed=st.booleans())
def test_random_bytes(tmp_path: Path, content: bytes, suffix: str, packed: bool):
    path = tmp_path / (f"rows{suffix}" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    loaded_or_refused(path, Prompt, skip_invalid=True)


@FUZZ
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), suffix=st.sampled_from([".parquet", ".jsonl.gz"]))
def test_one_changed_byte(write, tmp_path: Path, position: int, value: int, suffix: str):
    path = Path(write({"prompt": "a"}, {"prompt": "b", "id": 3}, name=f"rows{suffix}"))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    loaded_or_refused(path, Prompt, skip_invalid=True)


@FUZZ
@given(source=st.text(max_size=20))
def test_random_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str):
    assume(source not in data.SOURCES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.data.sources.hub_rows", lambda source, split: iter(()))
    with pytest.raises((ValueError, FileNotFoundError)):
        data.load(source, Prompt)


LONG = settings(FUZZ, max_examples=3000)


@pytest.mark.slow
@LONG
@given(content=st.binary(max_size=300), suffix=st.sampled_from(sorted(READERS)), packed=st.booleans())
def test_random_bytes_long(tmp_path: Path, content: bytes, suffix: str, packed: bool):
    path = tmp_path / (f"rows{suffix}" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    loaded_or_refused(path, Prompt, skip_invalid=True)


@pytest.mark.slow
@LONG
@given(rows=st.lists(ROW, max_size=6), kind=st.sampled_from(KINDS), skip_invalid=st.booleans())
def test_random_rows_long(tmp_path: Path, rows: list[dict[str, Any]], kind: type[Record], skip_invalid: bool):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    loaded_or_refused(path, kind, skip_invalid=skip_invalid)
