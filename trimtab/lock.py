"""One writer in a run directory: a lock that ends with its process, however that ends.

It is the kernel's (`flock`), on the file `.lock` in the directory, which says who had it last. The file stays behind
and means nothing by itself, so no lock is ever stale. Whoever only reads a run needs none. The lock is a process's and
not a run's: a process that asks again has it already, until `released` ends.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.progress import console
from trimtab.untrusted import printable

if sys.platform != "win32":  # where nothing is kept apart
    import fcntl

LOCK = ".lock"
MOST_BYTES = 200
"""What is read of the file: a line of ours is shorter."""
TRIES, SECONDS_BETWEEN = 5, 0.05
"""How often a lock is asked for, since somebody may have it for the moment in which they look (`check_unlocked`)."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems say that know no `flock`."""

_held: dict[Path, int] = {}
"""The directories that this process has locked, and the open files that hold the locks."""


def holds_anything(directory: Path) -> bool:
    """Whether a folder holds more than a lock and what was being written when a process died."""
    return any(path.name != LOCK and not path.name.endswith(".partial") for path in directory.iterdir())


def lock(directory: Path) -> None:
    """Keep all other processes from writing to a run directory, which exists.

    BlockingIOError that names the process that writes there; a line of warning on a file system without locks.
    """
    here = directory.resolve()
    if here in _held or sys.platform == "win32":
        return
    file = open_lock(here / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        possible = acquire(file, fcntl.LOCK_EX, directory)
    except OSError:
        os.close(file)
        raise
    _held[here] = file
    if not possible:
        console.print(f"[yellow]{directory}: this file system has no locks. Let no other process write there.[/yellow]")
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S%z')}".encode())


def check_unlocked(directory: Path) -> None:
    """BlockingIOError, as of `lock`, if another process writes to a run directory now. Nothing is touched."""
    if sys.platform == "win32" or directory.resolve() in _held or not (directory / LOCK).exists():
        return
    file = open_lock(directory / LOCK, os.O_RDONLY)
    try:
        acquire(file, fcntl.LOCK_SH, directory)
    finally:
        os.close(file)


def open_lock(path: Path, how: int) -> int:
    """The lock's file, opened: no link is followed, no pipe waited for, and programs that we start do not get it."""
    assert sys.platform != "win32"
    if path.is_symlink():
        raise OSError(f"{path} is a link. Remove it.")
    file = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is no file. Remove it.")
    return file


def acquire(file: int, kind: int, directory: Path) -> bool:
    """Lock an open file; False where there are no locks. BlockingIOError that names who has it."""
    assert sys.platform != "win32"
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not left:
                raise BlockingIOError(told(file, directory)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        time.sleep(SECONDS_BETWEEN)
    raise AssertionError("the last try returns or raises")


def told(file: int, directory: Path) -> str:
    """Who writes to a run directory, and what to do."""
    who = printable(os.pread(file, MOST_BYTES, 0).decode("utf-8", "replace")) or "another process"
    return (
        f"the run in {directory} is being written: {who}. Two at a time would mix their runs. Wait until that one has "
        "ended, or stop it (at Ctrl-C or SIGTERM it saves first), or give another --out."
    )


@contextmanager
def released() -> Iterator[None]:
    """What is locked meanwhile is unlocked at the end."""
    before = set(_held)
    try:
        yield
    finally:
        for directory in _held.keys() - before:
            os.close(_held.pop(directory))
