"""A run that was killed and resumed is the run that was not: the same figures, texts and weights, to the last bit."""

import json
import os
import re
import shlex
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.killing import assert_same, ended, killed_and_resumed, lines, rows, run, start, when
from trimtab.cli import main
from trimtab.recipes.training import without_names

STEPS = 10
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(9)]
FEEDBACK = [{"prompt": f"Say {i}.", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(9)]
OFFLINE = ["--batch-size", "4", "--micro-batch-rows", "4", "--schedule", "linear"]

PROMPTS = [{"prompt": f"Say {i}."} for i in range(7)]
ONLINE = ["--reward", "length", "--max-new-tokens", "6", "--prompts-per-step", "2", "--schedule", "linear"]

PRICED = ["--kl-coef", "0.1", "--kl-target", "2", "--kl-horizon", "100"]
CRITIC = ["--critic-warmup", "4", "--critic-lr", "1e-3"]

METHODS = {
    "sft": (PAIRS, [*OFFLINE, "--weight-decay", "0.1"]),
    "reward": (PAIRS, [*OFFLINE, "--lora-rank", "2", "--keep-best", "accuracy"]),
    "dpo": (PAIRS, [*OFFLINE, "--reference", "moving", "--reference-args", "alpha=0.5", "every=3"]),
    "kto": (FEEDBACK, [*OFFLINE, "--lora-rank", "2"]),
    "rloo": (PROMPTS, [*ONLINE, "--lora-rank", "2", "--kl-budget", "1e6"]),
    "ppo": (
        PROMPTS,
        # six updates on a rollout, so that checkpoints fall between them
        [*ONLINE, "--epochs-per-rollout", "3", "--minibatches", "2", "--score-shape", "normalized", *PRICED, *CRITIC],
    ),
    "grpo": (PROMPTS, [*ONLINE, "--epochs-per-rollout", "2", "--minibatches", "2", "--group-size", "3"]),
    "online-dpo": (PROMPTS, [*ONLINE[2:], "--judge", "rule:length"]),
    "raft": (PROMPTS, [*ONLINE, "--group-size", "3", "--lora-rank", "2"]),
}


@dataclass
class Bench:
    """A folder for runs, and the unbroken run of each command, made once."""

    folder: Path
    known: dict[str, Path] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self, method: str, *flags: str) -> list[str]:
        """The command of a method on rows of its kind, everything that a resumed run could lose switched on."""
        data, own = METHODS[method]
        path = self.folder / f"{method}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        fast = ["--dtype", "float32", "--device", "cpu", "--steps", str(STEPS), "--lr", "0.01", "--samples", "1"]
        often = ["--eval-data", str(path), "--eval-every", "2", "--save-every", "3"]
        return [method, "--model", "tiny", "--data", str(path), *fast, *often, *own, *flags]

    def unbroken(self, method: str, *flags: str) -> Path:
        """What the command leaves behind if nothing happens."""
        name = " ".join([method, *flags])
        if name not in self.known:
            out = self.known[name] = self.folder / name
            run([*self.command(method, *flags), "--out", str(out)], self.log)
            steps = [row["step"] for row in rows(out / "metrics.jsonl")]
            assert steps == list(range(1, len(steps) + 1)) and len(steps) > STEPS / 2
        return self.known[name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_last_bit(
    method: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out, log = bench.command(method), tmp_path / "killed", tmp_path / "log"
    process = start([*arguments, "--out", str(out)], log)
    assert when((out / "checkpoints" / "step-00000003").exists, process)
    os.kill(process.pid, signal.SIGSTOP)
    assert f"process {process.pid} on" in told(capsys, [*arguments, "--out", str(out), "--resume"], 2)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    run([*arguments, "--out", str(out), "--resume"], log)
    assert_same(bench.unbroken(method), out)
    assert "going on after step" in log.read_text()


def test_three_kills_at_any_moment(bench: Bench, tmp_path: Path) -> None:
    out, log = tmp_path / "killed", tmp_path / "log"
    killed_and_resumed(bench.command("dpo"), out, log, steps=STEPS, kills=3, seed="any")
    assert_same(bench.unbroken("dpo"), out)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_kills(method: str, bench: Bench, tmp_path: Path) -> None:
    for seed in range(2):
        out = tmp_path / f"killed {seed}"
        moments = killed_and_resumed(
            bench.command(method), out, tmp_path / "log", steps=STEPS, kills=4, seed=f"{method} {seed}"
        )
        print(method, "was killed", ", ".join(moments))
        assert_same(bench.unbroken(method), out)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    sent: signal.Signals, status: int, bench: Bench, tmp_path: Path
) -> None:
    out, log, whole = tmp_path / "a run", tmp_path / "log", tmp_path / "whole"
    process = start([*bench.command("sft"), "--out", str(out), "--save-every", "0"], log)
    assert when(lambda: lines(out / "metrics.jsonl") >= 2, process)
    os.kill(process.pid, sent)
    assert ended(process) == status
    steps, told = lines(out / "metrics.jsonl"), log.read_text()
    assert 2 <= steps < STEPS and f"stopped after step {steps} of {STEPS}, as asked" in told
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    (typed,) = re.findall(r"^  trimtab (.*)$", told, re.MULTILINE)
    run(shlex.split(typed), log)
    shutil.copytree(bench.unbroken("sft"), whole, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(out / "checkpoints")
    assert_same(whole, out)


# ---- What --resume and its relatives say


@pytest.fixture
def finished(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """A command, and the run that it made."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(bench.folder / "cache"))
    out = tmp_path / "run"
    shutil.copytree(bench.unbroken("sft"), out)
    return [*bench.command("sft"), "--out", str(out)], out


def unfinish(out: Path) -> None:
    """Make a run one that was killed after its last checkpoint."""
    environment = json.loads((out / "environment.json").read_text())
    del environment["finished"]
    (out / "environment.json").write_text(json.dumps(environment))
    shutil.rmtree(out / "model")


def told(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int) -> str:
    capsys.readouterr()
    assert main(arguments) == status
    return capsys.readouterr().err


def test_what_becomes_of_a_run_that_exists(
    finished: tuple[list[str], Path], bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = finished
    before = (out / "metrics.jsonl").read_bytes()
    assert "--resume" in (said := told(capsys, arguments, 2)) and "--overwrite" in said
    assert "give one of them" in told(capsys, [*arguments, "--resume", "--overwrite"], 2)
    assert "is finished (step 10)" in told(capsys, [*arguments, "--resume"], 0)
    assert (out / "metrics.jsonl").read_bytes() == before
    unfinish(out)
    changed = told(capsys, [*arguments, "--resume", "--lr", "0.02", "--batch-size", "3"], 2)
    assert "--lr 0.01 -> 0.02" in changed and "--batch-size 4 -> 3" in changed
    assert "--steps 10 -> 20" in told(capsys, [*arguments, "--resume", "--steps", "20"], 2)
    with (bench.folder / "sft.jsonl").open("a") as file:
        file.write(json.dumps(PAIRS[0]) + "\n")
    assert "the data or the start model are not those" in told(capsys, [*arguments, "--resume"], 2)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "no run in" in told(capsys, [*arguments, "--out", str(tmp_path / "new"), "--resume-from", "step-3"], 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    assert "no run (no config.yaml)" in told(capsys, [*arguments, "--out", str(tmp_path / "other"), "--resume"], 2)


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    finished: tuple[list[str], Path], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = finished
    unfinish(out)
    damaged = out / "checkpoints" / "step-00000010" / "state" / "tensors.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    kept = (out / "metrics.jsonl").read_bytes()
    said = told(capsys, [*arguments, "--resume"], 2)
    assert f"{damaged} is damaged" in said and "--resume-from step-00000009" in said
    assert (out / "metrics.jsonl").read_bytes() == kept and damaged.exists()
    (typed,) = re.findall(r"^  trimtab (.*)$", said, re.MULTILINE)
    assert main(shlex.split(typed)) == 0
    assert_same(bench.unbroken("sft"), out)


def test_more_steps_where_the_learning_rate_so_far_does_not_depend_on_them(bench: Bench, tmp_path: Path) -> None:
    flags = ["--schedule", "constant", "--warmup", "0"]
    out, log, arguments = tmp_path / "longer", tmp_path / "log", bench.command("sft", *flags)
    run([*arguments, "--out", str(out), "--steps", "6"], log)
    run([*arguments, "--out", str(out), "--resume"], log)
    assert_same(bench.unbroken("sft", *flags), out)


def test_checkpoints_that_stay(finished: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, out = finished
    states = {path.name: (path / "state").exists() for path in sorted((out / "checkpoints").iterdir())}
    names = [f"step-{step:08d}" for step in (3, 6, 9, 10)]
    assert states == dict(zip(names, [False, False, True, True], strict=True))
    few = tmp_path / "few"
    assert main([*arguments, "--out", str(few), "--keep-last", "1", "--keep-best", "loss"]) == 0
    assert {path.name for path in (few / "checkpoints").iterdir()} == {"best", names[-1]}
    evaluated = {row["step"]: row["loss"] for row in rows(few / "evals.jsonl") if row["step"]}
    manifest = json.loads((few / "checkpoints" / "best" / "manifest.json").read_text())
    assert manifest["step"] == min(evaluated, key=lambda step: evaluated[step])


def test_facts_about_the_same_rows_do_not_make_them_others() -> None:
    """A run that began before `data check` was written down goes on; one whose rows have changed does not."""
    told = {"train": {"source": "a.jsonl", "rows": 3, "tokens_sha256": "x"}}
    known = {"train": {**told["train"], "source": "b.jsonl", "facts": {"records": 3}}}
    assert without_names(told) == without_names(known)
    assert without_names(told) != without_names({"train": {**told["train"], "tokens_sha256": "y"}})
