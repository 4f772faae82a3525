"""What the tests of the readers share: files made on the spot, in every format."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., str]


def encode(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows({key: as_cell(value) for key, value in row.items()} for row in rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_cell(value: Any) -> Any:
    """A value as people put it into a csv cell."""
    return json.dumps(value) if isinstance(value, list) else value


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes rows to a file and returns its path."""

    def write_rows(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name.removesuffix(".gz")
        encode(list(rows), path)
        if name.endswith(".gz"):
            packed = tmp_path / name
            packed.write_bytes(gzip.compress(path.read_bytes()))
            return str(packed)
        return str(path)

    return write_rows
