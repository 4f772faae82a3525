"""Progress that people read: lines where there is no terminal, and one voice at a time."""

import os
import subprocess
import sys

import pytest

from trimtab.progress import progress_bar


def test_a_line_every_tenth_of_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", 40) as advance:
        for _ in range(40):
            advance(note="loss 1")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10 and told[0].startswith("work 4/40 loss 1") and told[-1].startswith("work 40/40")


def test_what_belongs_to_a_step_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", 2) as step:
        for _ in range(2):
            with progress_bar("score", 3) as advance:
                advance(3, note="inner")
            step()
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["train", "train"]
    with pytest.raises(KeyError), progress_bar("broken", 1):
        raise KeyError
    with progress_bar("score", 3) as advance:
        advance(3)
    assert capsys.readouterr().err.startswith("score 3/3")


def test_work_goes_on_when_nobody_reads_any_more() -> None:
    code = "from trimtab.progress import console; import sys\n"
    code += "for _ in range(3): console.print('here')\n"
    code += "sys.stderr.write('and others'); sys.stderr.flush(); print('done')"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as nobody:
        done = subprocess.run(
            [sys.executable, "-c", code], stderr=nobody, stdout=subprocess.PIPE, text=True, check=True
        )
    assert done.stdout == "done\n"
