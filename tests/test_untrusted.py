"""Limits hold, and each fault of a file is one error that names the place; nothing hangs, nothing fills the memory."""

import gzip
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from trimtab import untrusted
from trimtab.untrusted import bounded, is_deep, lines_of, open_inflated, parse_json, read_json_lines, read_yaml_mapping


def test_depth_is_counted_in_levels():
    def nested(levels: int) -> list:
        return [nested(levels - 1)] if levels > 1 else []

    assert not is_deep(nested(untrusted.MOST_DEPTH))
    assert is_deep(nested(untrusted.MOST_DEPTH + 1))
    assert not is_deep({"a": 1, "b": [2] * 1000})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
        ('{"a": 1' + "0" * 5000 + "}", "integer string conversion"),
        ('{"a": "\x00"}', "Invalid control character"),
    ],
)
def test_json_that_is_refused(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_a_key_that_says_the_same_twice_is_harmless():
    assert parse_json('{"a": 1, "b": [2], "a": 1}') == {"a": 1, "b": [2]}


YAML = {
    "a bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "holds a reference"),
    "a key twice": ("loss: sigmoid\nsteps: 3\nloss: ipo\n", "it says loss twice"),
    "a date that is none": ("a: 2020-13-45\n", "month must be in"),
    "too deep": ("a: " + "[" * 10**6, "more than 1,000 brackets"),
    "too deep in lines": ("- " * 2000 + "a", "not readable as YAML"),
    "an object": ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "a NUL": ("a: \x00\n", "not readable as YAML"),
    "a list": ("- a\n", "found list"),
    "nothing": ("", "found NoneType"),
    "a number of many digits": (f"a: {'9' * 5000}\n", "not readable as YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(tmp_path: Path, name: str):
    content, words = YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        read_yaml_mapping(path)
    assert str(caught.value).startswith(str(path))


def test_a_line_beyond_the_limit_is_refused_before_it_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(untrusted, "MOST_LINE", 10)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"0123456789\n")
    with path.open("rb") as stream, pytest.raises(ValueError, match=r"rows.jsonl:1: line: longer than"):
        list(lines_of(path, stream))
    path.write_bytes(b"012345678\n\n{}\n")
    with path.open("rb") as stream:
        assert list(lines_of(path, stream)) == [(1, b"012345678\n"), (3, b"{}\n")]


def test_blank_lines_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(untrusted, "MOST_SKIPPED", 5)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" * 5 + b"{}\n")
    assert read_json_lines(path) == [{}]
    path.write_bytes(b"\n" * 6)
    with pytest.raises(ValueError, match="more than 5 blank lines"):
        read_json_lines(path)


def test_a_gz_bomb_is_refused_and_honest_text_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(untrusted, "FREE_INFLATED", 2**20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**22)))
    with open_inflated(path) as stream, pytest.raises(ValueError, match="inflates to more than 1 MB"):
        stream.read()
    text = "".join(f"row {number} of some text\n" for number in range(100_000)).encode()
    path.write_bytes(gzip.compress(text))
    with open_inflated(path) as stream:
        assert stream.read() == text


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path):
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is a pipe, expected an ordinary file"):
        read_yaml_mapping(pipe)
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(os.devnull)
    with pytest.raises(ValueError, match="is a device"):
        read_json_lines(link)


def test_time_is_bounded():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 seconds"), bounded(0.1, 2**30):
        while True:
            pass
    assert time.monotonic() - began < 5


def test_memory_is_bounded_and_given_back():
    with pytest.raises(MemoryError), bounded(5, 2**28):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


def test_time_stays_bounded_where_an_exception_is_lost() -> None:
    """As in a finalizer, out of which Python lets none."""
    with pytest.raises(TimeoutError), bounded(0.05, 2**30):
        with suppress(TimeoutError):
            while True:
                pass
        ended = time.monotonic() + 20
        while time.monotonic() < ended:
            pass
