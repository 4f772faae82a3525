"""Files that are no data end `trimtab data check` with status 2 and one message, in bounded time and memory."""

import gzip
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab import data, untrusted
from trimtab.records import Prompt

MEMORY = 2500 * 2**20  # of address space, of which pyarrow reserves a gigabyte at once
ROW = b'{"prompt": "p"}\n'


def bomb(path: Path, before: bytes, piece: bytes) -> None:
    """A .gz file of about a megabyte that inflates to a gigabyte: one packed piece again and again."""
    packed = gzip.compress(piece * (2**24 // len(piece)))
    path.write_bytes(gzip.compress(before) + packed * 64)


def one_value_many_times(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    value = pyarrow.array(["p" * 20_000_000])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), value)
    parquet.write_table(pyarrow.table({"prompt": rows}), path, dictionary_pagesize_limit=2**26)


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a pipe": ("rows.jsonl", os.mkfifo, "is a pipe"),
    "a packed pipe": ("rows.jsonl.gz", os.mkfifo, "is a pipe"),
    "a device without end": ("rows.jsonl", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a link to itself": ("rows.jsonl", lambda path: path.symlink_to(path), "does not exist"),
    "a directory": ("rows.jsonl", lambda path: path.mkdir(), "is a directory"),
    "a field of 100 MB": (
        "rows.jsonl",
        lambda path: path.write_bytes(ROW + b'{"prompt": "' + b"a" * 10**8 + b'"}'),
        "rows.jsonl:2: line: longer than 16 MB",
    ),
    "a line that inflates": ("rows.jsonl.gz", lambda path: bomb(path, ROW, b"a" * 2**20), "jsonl.gz:2: line: longer"),
    "blank lines that inflate": ("rows.jsonl.gz", lambda path: bomb(path, ROW, b"\n" * 2**20), "blank lines"),
    "a cell that inflates": (
        "rows.csv.gz",
        lambda path: bomb(path, b'prompt\n"', b"a" * 2**20),
        "csv.gz:2: line: longer",
    ),
    "a list that inflates": ("rows.json.gz", lambda path: bomb(path, b"[", b"a" * 2**20), "inflates to more than"),
    "one value many times": ("rows.parquet", one_value_many_times, "row 1: prompt: found 20,000,000 characters"),
}


def bounded_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
@pytest.mark.parametrize("name", FILES)
def test_a_command_ends_with_one_message(tmp_path: Path, name: str):
    file, write, words = FILES[name]
    write(tmp_path / file)
    command = [sys.executable, "-m", "trimtab", "data", "check", str(tmp_path / file)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=bounded_memory)
    assert told.returncode == 2, told.stderr
    assert words in told.stderr and str(tmp_path / file) in told.stderr
    assert "Traceback" not in told.stderr


def test_skipping_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "MOST_SKIPPED", 3)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b"{}\n" * 3)
    assert len(data.load(path, Prompt, skip_invalid=True).skipped) == 3
    path.write_bytes(ROW + b"{}\n" * 4)
    with pytest.raises(ValueError, match=r"rows.jsonl:5: .*3 rows were skipped before it"):
        data.load(path, Prompt, skip_invalid=True)


def test_a_key_with_two_values_is_a_bad_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b'{"prompt": "p", "prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: line: .*the key 'prompt' stands twice"):
        data.load(path, Prompt)
    assert len(data.load(path, Prompt, skip_invalid=True).records) == 1


def test_the_limit_of_a_line_is_that_of_a_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trimtab.data.conversations.MOST_LINE", 5)
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "12345"}, {"prompt": "123456"}]')
    with pytest.raises(ValueError, match=r"rows.json:row 2: prompt: found 6 characters, expected at most 5"):
        data.load(path, Prompt)
    assert untrusted.MOST_LINE > 10**6


def test_a_parquet_file_whose_schema_and_statistics_disagree(write: Callable[..., str]) -> None:
    """One changed byte makes a column one without gaps; asked for that column's size, pyarrow would end the process."""
    path = Path(write({"prompt": "a"}, name="rows.parquet"))
    content, nullable = path.read_bytes(), b"\x25\x02\x18\x06prompt"
    assert content.count(nullable) == 1
    path.write_bytes(content.replace(nullable, b"\x24" + nullable[1:]))
    with pytest.raises(ValueError, match="not a readable parquet file"):
        data.load(path, Prompt)
