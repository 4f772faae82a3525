"""From files to rows: one reader a suffix, each yielding `(where, row)`.

`where` says where the row stands: `train.jsonl:17` (the line, for jsonl and csv) or `train.json:row 17` (for json and
parquet, counted from 1). A row that cannot be read at all is a `Problem` in the place of its mapping, so that the
caller decides whether to stop or to skip it; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..untrusted import (
    MOST_LINE,
    MOST_ROWS,
    lines_of,
    open_inflated,
    open_regular,
    parse_json,
    read_whole,
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One row that is not what it should be: where it stands, which field, and what is wrong with it."""

    where: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.message}"


Located = tuple[str, Row | Problem]


def shorten(value: Any, width: int = 60) -> str:
    """A value as Python writes it, cut to a width, for error messages."""
    # Cut strings before repr(): an answer can be megabytes long.
    if isinstance(value, str) and len(value) > width:
        return repr(value[: width - 3]) + "..."
    try:
        shown = "null" if value is None else repr(value)
    except RecursionError:
        shown = f"a deeply nested {type(value).__name__}"
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def parse_object(where: str, raw: bytes) -> Row | Problem:
    """One line of jsonl as a mapping, or what is wrong with it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(where, "line", f"found bytes that are not UTF-8 ({error.reason} at byte {error.start})")
    try:
        value = parse_json(text)
    except ValueError as error:
        return Problem(where, "line", f"found {shorten(text)}, expected one JSON object a line ({error})")
    return checked_object(where, value, "line")


def checked_object(where: str, value: Any, field: str) -> Row | Problem:
    """A value that should be a mapping from column names, or what is wrong with it."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return value
    return Problem(where, field, f"found {shorten(value)}, expected an object with column names")


def read_jsonl(name: str, stream: IO[bytes]) -> Iterator[Located]:
    """Rows of JSON Lines, one at a time; blank lines are no rows."""
    for line, raw in lines_of(name, stream):
        text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if text.strip():
            where = f"{name}:{line}"
            yield where, parse_object(where, text)


def read_json(name: str, stream: IO[bytes]) -> Iterator[Located]:
    """Rows of one JSON list of objects. A `.json` file that holds JSON Lines, as many do, is read as such."""
    content = read_whole(name, stream).removeprefix(b"\xef\xbb\xbf")
    try:
        value = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            yield from read_jsonl(name, io.BytesIO(content))
            return
        raise ValueError(f"{name}: not JSON ({error}); expected a list of objects") from None
    for where, row in numbered(name, value if isinstance(value, list) else [value]):
        yield where, checked_object(where, row, "row")


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Rows with their places, counted from 1."""
    for index, row in enumerate(rows, start=1):
        yield f"{name}:row {index}", row


def decoded_lines(name: str, stream: IO[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 file, line ends kept."""
    for line, raw in lines_of(name, stream, keep_blank=True):
        try:
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{line}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None


def read_csv(name: str, stream: IO[bytes]) -> Iterator[Located]:
    """Rows of comma-separated values with a header line. An empty cell is a missing value."""
    csv.field_size_limit(MOST_LINE)  # the default, 128 KiB, is less than a long conversation
    reader = csv.reader(decoded_lines(name, stream), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{name}:1: the header names a column twice: {', '.join(header)}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{name}:{line}", csv_row(f"{name}:{line}", header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}:{reader.line_num}: not comma-separated values ({error})") from None


def csv_row(where: str, header: list[str], cells: list[str]) -> Row | Problem:
    """One line of a csv file as a mapping, or what is wrong with it."""
    if len(cells) != len(header):
        return Problem(where, "line", f"found {len(cells)} cells, expected {len(header)} ({', '.join(header)})")
    return {column: csv_cell(cell, column) for column, cell in zip(header, cells, strict=True)}


def csv_cell(cell: str, column: str) -> Any:
    """A cell as text, as nothing (empty), or, where it holds a JSON list of messages or of answers, as that list."""
    if not cell:
        return None
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = parse_json(cell)
    except ValueError:
        return cell
    is_messages = bool(value) and all(isinstance(item, dict) and {"role", "from"} & set(item) for item in value)
    return value if is_messages or column == "completions" else cell


def read_parquet(name: str, stream: IO[bytes]) -> Iterator[Located]:
    """Rows of a parquet file, a batch in memory at a time."""
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(stream)
        batches = file.iter_batches(batch_size=rows_in_memory(file.metadata))
        yield from numbered(name, (row for batch in batches for row in batch.to_pylist()))
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{name}: not a readable parquet file ({error})") from None


def rows_in_memory(metadata: Any) -> int:
    """Rows to unpack at a time: each may hold the largest values of its columns, which are stored once for all of them.

    Columns are not asked one by one: pyarrow 26 ends the process where what a file says of one of them is damaged.
    """
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    return max(1, min(1024, MOST_ROWS // max(1, *sizes, 1)))


READERS: dict[str, Callable[[str, IO[bytes]], Iterator[Located]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read, without a closing `.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends with `.gz`."""
    if path.suffix.lower() != ".gz":
        return open_regular(path)
    if suffix_of(path) != ".parquet":
        return open_inflated(path)
    with open_inflated(path) as stream:
        return io.BytesIO(read_whole(path, stream))


def read_rows(path: Path) -> Iterator[Located]:
    """The rows of a file. Errors: `ValueError` for a suffix nobody reads and for a file that cannot be read."""
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise ValueError(f"{path}: expected a file that ends with {', '.join(READERS)} (each also with .gz)")
    try:
        with open_bytes(path) as stream:
            yield from reader(str(path), stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
