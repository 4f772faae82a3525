"""One writer in a run directory, held against real processes: told plainly, gone with its process, in nobody's way."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.lock import LOCK, check_unlocked, lock, released

HOLD = """
import sys; from pathlib import Path; from trimtab.lock import lock
lock(Path(sys.argv[1])); print("has it", flush=True); sys.stdin.read()
"""
PATIENCE = 60


@contextmanager
def another_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked a directory, killed at the end."""
    arguments = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_writes_and_what_to_do(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        for ask in (lock, check_unlocked):
            with pytest.raises(BlockingIOError) as error:
                ask(tmp_path)
            for said in (str(tmp_path), f"process {process.pid} on {platform.node()}, since 20", "give another --out"):
                assert said in str(error.value)


def test_nothing_is_left_of_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.kill()
        process.wait(PATIENCE)
        who = (tmp_path / LOCK).read_text()
        assert str(process.pid) in who
        check_unlocked(tmp_path)
        assert (tmp_path / LOCK).read_text() == who
        with released():
            lock(tmp_path)
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_lasts_as_long_as_it_is_held(tmp_path: Path) -> None:
    def is_free_for_others() -> bool:
        script = "import sys; from pathlib import Path; from trimtab.lock import lock; lock(Path(sys.argv[1]))"
        process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
        return process.returncode == 0

    with released():
        lock(tmp_path)
        with released():  # a command inside a command, in the same directory
            lock(tmp_path)
            check_unlocked(tmp_path)
        assert not is_free_for_others()
    assert is_free_for_others()


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_looks_does_not_keep_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has the lock for the moment in which they look."""
    looks = iter([BlockingIOError(), BlockingIOError()])

    def flock(file: int, how: int) -> None:
        if error := next(looks, None):
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    with released():
        lock(tmp_path)
    assert next(looks, None) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_line_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with released():
        lock(tmp_path)
    assert "has no locks" in capsys.readouterr().err


def test_another_error_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        lock(tmp_path)


def test_a_link_is_not_written_through_and_a_pipe_not_waited_for(tmp_path: Path) -> None:
    target = tmp_path / "letter.txt"
    target.write_text("mine")
    linked, piped = tmp_path / "linked", tmp_path / "piped"
    linked.mkdir()
    (linked / LOCK).symlink_to(target)
    for ask in (lock, check_unlocked):
        with pytest.raises(OSError, match=LOCK):
            ask(linked)
    assert target.read_text() == "mine"
    piped.mkdir()
    os.mkfifo(piped / LOCK)
    for ask in (check_unlocked, lock):
        with pytest.raises(OSError, match="no file"):
            ask(piped)


def test_a_command_is_refused_before_anything_is_loaded_and_readers_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "run", tmp_path / "page.html"
    out.mkdir()
    (out / "config.yaml").write_text("command: sft\nsteps: 3\n")
    (out / "environment.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = ["--model", "there is none", "--data", "there is none", "--out", str(out)]
    with another_process(out) as process:
        for more in ([], ["--resume"], ["--overwrite"]):
            assert main(["sft", *flags, *more]) == 2
            assert f"process {process.pid} on" in capsys.readouterr().err
        assert main(["report", str(out), "--out", str(page)]) == 0
        assert page.exists()
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK}


@pytest.mark.parametrize("target", ["loop", "nowhere"])
def test_a_run_directory_that_is_a_link_to_nothing_is_told(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to(target)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["dpo", "--model", "tiny", "--data", "pairs.jsonl", "--out", "loop", "--steps", "1"]) == 2
    assert "--out loop is a link that leads nowhere" in capsys.readouterr().err
