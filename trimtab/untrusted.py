"""Files that others wrote: read under limits, every fault one ValueError that names the place. All limits stand here.

A file may be a pipe or a device, hold one endless line, inflate to a thousand times its size, nest a thousand lists or
name a key twice. Python's readers wait, fill the memory, raise something of their own or keep the last key; these say
what is wrong with which file and line. What limits cannot hold back is listed in docs/hostile_input.md.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import stat
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MEGABYTE = 2**20
MOST_LINE = 16 * MEGABYTE
"""Bytes of a line of JSON Lines, characters of a csv cell or of any text field; a million tokens are 4 MB."""
MOST_WHOLE = 512 * MEGABYTE
"""Bytes of a file that is parsed in one piece (.json, .parquet.gz)."""
MOST_ROWS = 128 * MEGABYTE
"""Bytes of the parquet rows that are unpacked at a time."""
MOST_SETTINGS = 16 * MEGABYTE
"""Bytes of a config.yaml, an environment.json or a model's configuration file."""
MOST_TEMPLATE = MEGABYTE
"""Characters of a chat template, and of what it may write beyond `TEMPLATE_GROWTH` times a conversation's own."""
TEMPLATE_GROWTH = 16
TEMPLATE_SECONDS = 5.0
TEMPLATE_MEMORY = 1024 * MEGABYTE
"""What rendering one conversation may take."""
MOST_DEPTH = 100
"""Lists and objects inside each other: below it nothing that walks a value runs out of stack."""
MOST_RATIO = 100
"""Inflated bytes for each byte of a .gz file, beyond the first `FREE_INFLATED`; text has 3 to 10, a bomb 1,000."""
FREE_INFLATED = 64 * MEGABYTE
MOST_SKIPPED = 100_000
"""Rows that --skip-invalid skips, and blank lines of a file: more are no accident."""

TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Embeddings, overrides and isolates of Unicode's text direction: a text that leaves one open turns what follows."""

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


# ---- Bytes


def check_regular(path: Path) -> int:
    """The size of an ordinary file. ValueError for pipes, devices and sockets, where reading may never end."""
    status = os.stat(path)
    kind = KINDS.get(stat.S_IFMT(status.st_mode))
    if kind:
        raise ValueError(f"{path} is {kind}, expected an ordinary file: write what it gives into one first")
    return status.st_size


def open_regular(path: Path) -> IO[bytes]:
    """An ordinary file, to be read."""
    check_regular(path)
    return path.open("rb")


class Inflated(io.RawIOBase):
    """The bytes in a .gz file, up to what its size makes plausible; ValueError beyond."""

    def __init__(self, path: Path) -> None:
        size = check_regular(path)
        self.path, self.most, self.count = path, max(FREE_INFLATED, MOST_RATIO * size), 0
        self.inner = gzip.open(path, "rb")  # noqa: SIM115 - closed with this

    def close(self) -> None:
        self.inner.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.inner.readinto(buffer)
        self.count += count
        if self.count > self.most:
            raise ValueError(
                f"{self.path}: inflates to more than {in_megabytes(self.most)}, {MOST_RATIO} times its size, which no "
                "text does; if it is meant, unpack it (gunzip) and give the plain file"
            )
        return count


def open_inflated(path: Path) -> IO[bytes]:
    """The bytes in a .gz file, to be read."""
    return io.BufferedReader(Inflated(path), MEGABYTE)


def lines_of(name: str | Path, stream: IO[bytes], *, keep_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, line ends kept, blank ones left out unless they mean something (in csv cells).

    ValueError for a line beyond `MOST_LINE`, and for more blank ones than `MOST_SKIPPED`.
    """
    number = blank = 0
    while raw := stream.readline(MOST_LINE + 1):
        number += 1
        if len(raw) > MOST_LINE:
            raise ValueError(f"{name}:{number}: line: longer than {in_megabytes(MOST_LINE)}, the most that is read")
        blank += raw.isspace()
        if keep_blank or not raw.isspace():
            yield number, raw
        if blank > MOST_SKIPPED:
            raise ValueError(f"{name}:{number}: line: more than {MOST_SKIPPED:,} blank lines")


def read_whole(name: str | Path, stream: IO[bytes], most: int = MOST_WHOLE) -> bytes:
    """All that is left of a stream. ValueError beyond `most` bytes."""
    content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name}: larger than {in_megabytes(most)}, the most that is read of such a file in one piece")
    return content


def in_megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / MEGABYTE:,.0f} MB"


# ---- Text


def decoded(place: str, raw: bytes) -> str:
    """Bytes as UTF-8, a byte order mark left out."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None


def read_text(path: Path, most: int = MOST_SETTINGS) -> str:
    """The text of a file that is read in one piece."""
    with open_regular(path) as stream:
        return decoded(str(path), read_whole(path, stream, most))


def home_expanded(name: str) -> Path:
    """A path whose `~` is somebody's home; as it stands where there is no such person, whom `expanduser` fails on."""
    return Path(os.path.expanduser(name))


def printable(text: str) -> str:
    """A text that does nothing to a terminal: control characters other than line ends and tabs are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def without_controls(text: str) -> str:
    """A text of somebody's that does nothing to a terminal and still reads as it should: for whole answers.

    Control characters (C0, C1) other than line ends and tabs are written out, and so are lone surrogates, which cannot
    be printed, and what turns the direction of the text around it. Joiners and wide spaces stay, unlike in `printable`.
    """
    return "".join(ascii(c)[1:-1] if is_control(c) else c for c in text)


def is_control(character: str) -> bool:
    """Whether a character does something instead of being shown."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in TURNING


# ---- JSON and YAML


def parse_json(text: str) -> Any:
    """A JSON value. ValueError for no JSON, an object with two values for a key, more than `MOST_DEPTH` levels."""
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MOST_DEPTH and is_deep(value):
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twin = next((name for name, value in pairs if entries[name] != value), None)
        if twin is not None:
            raise ValueError(f"the key {twin[:60]!r} stands twice in one object, with different values; keep one")
    return entries


def is_deep(value: Any) -> bool:
    """Whether lists and mappings stand inside each other more than `MOST_DEPTH` times."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        inside = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inside if isinstance(child, dict | list)]
    return bool(level)


def json_object(place: str, text: str) -> dict[str, Any]:
    """A text that must hold one JSON object."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds {type(value).__name__}, but it must be a JSON object.")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a file holds."""
    return json_object(str(path), read_text(path))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line."""
    with open_regular(path) as stream:
        places = ((f"{path}:{number}", raw) for number, raw in lines_of(path, stream))
        return [json_object(place, decoded(place, raw)) for place, raw in places]


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file.

    ValueError for anything else, for a key twice, and for references (`*name`), with which a few lines can stand for
    more values than memory holds.
    """
    import yaml

    text = read_text(path)
    try:
        root = _yaml_tree(text)
        value = yaml.SafeLoader("").construct_document(root) if root else None
    # Dates and numbers beyond what Python takes are plain ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not readable as YAML: {told}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected `flag: value` lines, found {type(value).__name__}.")
    return value


def _yaml_tree(text: str) -> Any:
    """The nodes of a YAML document, each of which stands in it once."""
    import yaml

    if text.count("[") + text.count("{") > 10 * MOST_DEPTH:  # its time grows with the square of what is open
        raise ValueError(f"it has more than {10 * MOST_DEPTH:,} brackets")
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("it holds a reference (*name); write the value out")
    root = yaml.compose(text, yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        keys = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
        if twins := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"it says {', '.join(twins)} twice; keep one")
    return root


# ---- Code that others wrote


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """A block that ends in TimeoutError after `seconds`, in MemoryError with `memory` bytes more than at its start.

    Time is bounded in the main thread of Unix systems, between two steps of Python; memory on Linux.
    """
    with _timed(seconds), _address_space(memory):
        yield


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    ended = False

    def stop(*_: object) -> None:
        if not ended:
            raise TimeoutError(f"it took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: an exception that is raised in a finalizer is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _address_space(memory: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
