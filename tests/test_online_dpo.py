"""`trimtab online-dpo` and `trimtab raft` as a person meets them: they run, runs repeat, mistakes are told at once."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli import main

PROMPTS = [{"prompt": [{"role": "user", "content": f"Say {i}."}], "answer": str(i)} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
SMALL = ["--steps", "3", "--prompts-per-step", "4", "--max-new-tokens", "8", "--samples", "1", "--lr", "1e-3"]
FAST = ["--dtype", "float32", "--device", "cpu", *SMALL]

FUNCTIONS = """
def more_bytes(completion_ids):
    return [float(sum(ids)) for ids in completion_ids]

def some(completion_ids):
    return [None if sum(ids) % 3 == 0 else float(sum(ids)) for ids in completion_ids]

def judge(first_ids, second_ids):
    return [None if sum(a) % 4 == 0 else float(sum(a) > sum(b)) for a, b in zip(first_ids, second_ids)]

def undecided(first):
    return [0.5 for text in first]

asked = []

def never_at_first(completion_ids):
    asked.append(len(completion_ids))
    return [None if len(asked) == 1 else float(sum(ids)) for ids in completion_ids]

def never(completion_ids):
    return [None for ids in completion_ids]

def never_judged(first_ids):
    return [None for ids in first_ids]

calls = []

def late(completion_ids):
    calls.append(len(completion_ids))
    return [0.0 if len(calls) == 1 else float(sum(ids)) for ids in completion_ids]
"""


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache folder for all tests of this file, and a module of rewards and judges."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path / "fresh_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def train(command: str, prompts: str, out: Path, *flags: str) -> Path:
    assert main([command, "--model", "tiny", "--data", prompts, "--out", str(out), *FAST, *flags]) == 0
    return out


BYTES = ["--reward", "py:fresh_functions:more_bytes"]
JUDGED = ["--judge", "py:fresh_functions:judge"]
FRESH = {"loss", "kl", "entropy", "length", "unfinished", "kept", "grad_norm", "draw_seconds"}
PREFERENCES = FRESH | {"accuracy", "margin", "chosen_logprob", "rejected_logprob"}


def test_online_dpo_with_a_reward(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--eval-data", prompts, "--eval-every", "1"]
    out = train("online-dpo", prompts, tmp_path / "run", *BYTES, "--group-size", "4", *flags)
    metrics, evals, rollouts = (rows_of(out, name) for name in ("metrics", "evals", "rollouts"))
    assert len(metrics) == len(rollouts) == 3 and metrics[0].keys() >= PREFERENCES | {"reward"}
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics[0]["kept"] == 1
    assert [row["step"] for row in evals] == [0, 1, 2, 3] and evals[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert evals[0]["reward_low"] <= evals[0]["reward"] <= evals[0]["reward_high"]
    for rollout in rollouts:
        scores = [answer["reward"] for answer in rollout["answers"]]
        learned = [answer["reward"] for answer in rollout["answers"] if answer["learned_from"]]
        assert sorted(learned) == [min(scores), max(scores)] and len(scores) == 4
        assert rollout["kept"] == 4 and set(rollout["seconds"]) == {"sample", "score", "refer"}
    assert "learned from 12 of 12 prompts drawn" in " ".join(capsys.readouterr().err.split())
    assert (out / "model" / "model.safetensors").exists() and (out / "checkpoints" / "best").exists()
    assert "<html" in (out / "report.html").read_text()[:200]


def test_online_dpo_with_a_judge(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train("online-dpo", prompts, tmp_path / "run", *JUDGED, "--eval-data", prompts, "--lr", "1e-2")
    metrics, evals, rollouts = (rows_of(out, name) for name in ("metrics", "evals", "rollouts"))
    assert metrics[0].keys() >= PREFERENCES and "reward" not in metrics[0]
    assert evals[0]["win_rate"] == evals[0]["win_rate_low"] == 0.5, "the start's answers are its own"
    last = evals[-1]
    assert 0 <= last["win_rate_low"] <= last["win_rate"] <= last["win_rate_high"] <= 1 and last["win_rate"] != 0.5
    unscored = sum(rollout["missed"].get("unscored", 0) for rollout in rollouts)
    told = " ".join(capsys.readouterr().err.split())
    assert unscored > 0 and f"learned from {12 - unscored} of 12 prompts drawn; {unscored} had too few" in told
    for row, rollout in zip(metrics, (some for some in rollouts if some["kept"]), strict=True):
        assert row["kept"] == rollout["kept"] / 4 < 1 or not rollout["missed"]
        first, second = (answer["reward"] for answer in rollout["answers"])
        assert first is second is None or first + second == 1


def test_raft(prompts: str, tmp_path: Path) -> None:
    out = train("raft", prompts, tmp_path / "run", *BYTES, "--eval-data", prompts)
    metrics, rollouts = rows_of(out, "metrics"), rows_of(out, "rollouts")
    assert len(metrics) == 3 and metrics[0].keys() >= FRESH | {"reward"} and "margin" not in metrics[0]
    for rollout in rollouts:
        scores = [answer["reward"] for answer in rollout["answers"]]
        assert len(scores) == 8
        assert [a["learned_from"] for a in rollout["answers"]] == [
            place == scores.index(max(scores)) for place in range(8)
        ]
    evals = rows_of(out, "evals")
    assert evals[0].keys() >= {"reward", "reward_low", "kl", "length"}


def test_raft_above_a_threshold(prompts: str, tmp_path: Path) -> None:
    flags = ["--keep", "above", "--threshold", "700", "--group-size", "4"]
    out = train("raft", prompts, tmp_path / "run", "--reward", "py:fresh_functions:some", *flags)
    for rollout in rows_of(out, "rollouts"):
        for answer in rollout["answers"]:
            assert answer["learned_from"] == (answer["reward"] is not None and answer["reward"] > 700)


REPEATED = {
    "a reward": ("online-dpo", [*BYTES, "--group-size", "3", "--lora-rank", "4", "--temperature", "0.8"]),
    "weights and a sum of losses": (
        "online-dpo",
        [
            "--reward",
            BYTES[1],
            "length",
            "--reward-weights",
            "1",
            "-2",
            "--loss",
            "dpo+0.1*aot",
            "--loss-args",
            "dpo.beta=0.3",
        ],
    ),
    "a judge": ("online-dpo", [*JUDGED, "--loss", "ipo", "--loss-args", "tau=0.5"]),
    "raft": ("raft", [*BYTES, "--unfinished-score", "100", "--max-new-tokens", "24"]),
    "raft above": ("raft", [*BYTES, "--keep", "above", "--threshold", "500"]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_run_repeats_to_the_last_bit(name: str, prompts: str, tmp_path: Path) -> None:
    command, flags = REPEATED[name]
    first = train(command, prompts, tmp_path / "first", *flags, "--eval-data", prompts, "--save-every", "2")
    again = tmp_path / "again"
    assert main([command, "--config", str(first), "--out", str(again)]) == 0
    for file in ("evals.jsonl", "scores.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (first / file).read_bytes() == (again / file).read_bytes(), file
    losses = [[row["loss"] for row in rows_of(run, "metrics")] for run in (first, again)]
    learned = [row["kept"] > 0 for row in rows_of(first, "rollouts")]
    assert losses[0] == losses[1] and len(losses[0]) == sum(learned) and len(learned) == 3
    assert (first / "checkpoints" / "step-00000002" / "model.safetensors").exists()


def test_memory_and_layout_change_no_loss(prompts: str, tmp_path: Path) -> None:
    choices = {
        "plain": [],
        "apart": ["--no-share-prompts", "--micro-batch-rows", "3", "--batch-rows", "5"],
        "again": ["--gradient-checkpointing", "on"],
    }
    runs = {
        name: train("online-dpo", prompts, tmp_path / name, *BYTES, "--loss", "dpo+aot", *flags)
        for name, flags in choices.items()
    }
    losses = {name: [row["loss"] for row in rows_of(run, "metrics")] for name, run in runs.items()}
    for name in ("apart", "again"):
        assert losses[name] == pytest.approx(losses["plain"], abs=1e-4), name


def test_a_run_of_a_reward_model_is_found_again_from_anywhere(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, reward = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "reward"
    trained = ["--data", pairs, "--out", str(reward), "--dtype", "float32", "--device", "cpu", "--steps", "2"]
    assert main(["reward", "--model", "tiny", *trained]) == 0
    monkeypatch.chdir(tmp_path)
    first = train("online-dpo", prompts, tmp_path / "first", "--judge", "reward:reward", "--steps", "1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["online-dpo", "--config", str(first), "--out", str(tmp_path / "again")]) == 0
    assert rows_of(first, "metrics")[0]["loss"] == rows_of(tmp_path / "again", "metrics")[0]["loss"]


def test_rollouts_of_ties_are_no_steps(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """exact-match is 0 for every answer of a random model; a judge that never decides leaves nothing either."""
    given = ["--model", "tiny", "--data", prompts, *FAST]
    for flags in (["--reward", "exact-match"], ["--judge", "py:fresh_functions:undecided"]):
        out = tmp_path / flags[0]
        assert main(["online-dpo", *given, "--out", str(out), *flags]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "left nothing to learn from in any rollout: of all prompts, 12 tied" in told
        assert "in 4 of 4 groups all answers have the same reward" in told
        assert len(rows_of(out, "rollouts")) == 3 and not (out / "metrics.jsonl").exists()
        assert not (out / "model").exists()
    out = train("online-dpo", prompts, tmp_path / "late", "--reward", "py:fresh_functions:late")
    told = " ".join(capsys.readouterr().err.split())
    assert "ended after 2 of 3 steps" in told
    assert "learned from 8 of 12 prompts drawn; 4 had answers that nothing told apart" in told
    assert [row["step"] for row in rows_of(out, "metrics")] == [1, 2] and len(rows_of(out, "rollouts")) == 3


@pytest.mark.parametrize("command", ["online-dpo", "raft"])
def test_rollouts_without_any_score_are_passed_over(
    command: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"late_for_{command[:4]}.py").write_text(FUNCTIONS)
    late = ["--reward", f"py:late_for_{command[:4]}:never_at_first", "--group-size", "2"]
    rollouts = rows_of(out := train(command, prompts, tmp_path / "late", *late), "rollouts")
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("rollout 1: none of 8 answers has a score. Such rollouts are passed over") == 1
    assert "ended after 2 of 3 steps" in told and "4 had too few answers with a score" in told
    assert rollouts[0]["reward"] is rollouts[0]["kl"] is None and rollouts[0]["missed"] == {"unscored": 4}
    assert [row["health"].get("unscored") for row in rollouts] == [1, 1, 1]
    assert [row["step"] for row in rows_of(out, "metrics")] == [1, 2]
    judged = [["--judge", "py:fresh_functions:never_judged"]] * (command == "online-dpo")
    for flags in [["--reward", "py:fresh_functions:never"], *judged]:
        run = tmp_path / flags[0]
        given = ["--model", "tiny", "--data", prompts, "--out", str(run), *FAST, *flags]
        assert main([command, *given]) == 2
        assert "gave None for every answer of 3 rollouts" in " ".join(capsys.readouterr().err.split())
        assert len(rows_of(run, "rollouts")) == 3 and not (run / "model").exists()


MISTAKES = {
    "nobody says which is better": (["online-dpo"], r"--reward and --judge: give one"),
    "two say it": (["online-dpo", *BYTES, "--judge", "rule:length"], r"--reward and --judge: give one"),
    "unknown judge": (
        ["online-dpo", "--judge", "gpt:big"],
        r"unknown judge 'gpt:big'.*reward:R.*rule:.*py:.*llm:.*labels:",
    ),
    "unknown rule": (["online-dpo", "--judge", "rule:lenght"], r"rule:lenght.*rule:length"),
    "unknown reward of a judge": (["online-dpo", "--judge", "reward:lenght"], r"unknown reward 'lenght'"),
    "no such run": (["online-dpo", "--judge", "reward:./nowhere"], r"no folder \./nowhere"),
    "unknown reward": (["online-dpo", "--reward", "lenght"], r"lenght.*length"),
    "a judge of three": (["online-dpo", "--judge", "rule:length", "--group-size", "3"], r"--group-size 3: a judge"),
    "a judge has no weights": (
        ["online-dpo", "--judge", "rule:length", "--reward-weights", "1"],
        r"--reward-weights has no effect",
    ),
    "a judge has no scores": (
        ["online-dpo", "--judge", "rule:length", "--unfinished-score", "0"],
        r"--unfinished-score",
    ),
    "no pair": (["online-dpo", *BYTES, "--group-size", "1"], r"--group-size 1: a pair"),
    "no prompts": (["online-dpo", *BYTES, "--prompts-per-step", "0"], r"--prompts-per-step 0"),
    "too few prompts": (["online-dpo", *BYTES, "--prompts-per-step", "9"], r"--prompts-per-step 9.*8 prompts"),
    "unknown loss": (["online-dpo", *BYTES, "--loss", "dop"], r"unknown loss 'dop'.*dpo"),
    "unknown argument": (["online-dpo", *BYTES, "--loss-args", "bata=1"], r"bata.*beta"),
    "sampling from a part": (["online-dpo", *BYTES, "--top-k", "5"], r"--top-k 5"),
    "nothing to explore": (["raft", *BYTES, "--temperature", "0"], r"--temperature 0"),
    "prompts are not cut": (["raft", *BYTES, "--overlong", "truncate-response"], r"never cut"),
    "prompts too long": (["raft", *BYTES, "--max-length", "20"], r"8 of 8 prompts are longer than 12"),
    "evaluation without data": (["online-dpo", *BYTES, "--eval-every", "2"], r"--eval-data"),
    "no best of one": (["raft", *BYTES, "--group-size", "1"], r"--group-size 1: the best"),
    "threshold of nothing": (["raft", *BYTES, "--threshold", "1"], r"--threshold 1 has no effect"),
    "above what": (["raft", *BYTES, "--keep", "above"], r"--threshold"),
    "above nan": (["raft", *BYTES, "--keep", "above", "--threshold", "nan"], r"--threshold"),
    "no score": (["raft", *BYTES, "--unfinished-score", "inf"], r"--unfinished-score inf"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(
    name: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    given, expected = MISTAKES[name]
    if name not in ("too few prompts", "prompts too long"):  # these need a tokenizer
        monkeypatch.setattr("trimtab.models.load_policy", loaded)
    out = tmp_path / "out"
    defaults = ["--model", "tiny", "--data", prompts, "--out", str(out), *FAST]
    assert main([given[0], *defaults, *given[1:]]) == 2
    told = capsys.readouterr().err
    assert re.search(expected, told, re.DOTALL), told
    assert "Traceback" not in told and not out.exists()


def test_inputs_inside_the_run_that_is_replaced_are_refused(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train("online-dpo", prompts, tmp_path / "run", *BYTES, "--steps", "1")
    flags = ["--judge", f"reward:{out / 'model'}", "--overwrite"]
    assert main(["online-dpo", "--model", "tiny", "--data", prompts, "--out", str(out), *FAST, *flags]) == 2
    assert "--judge" in capsys.readouterr().err and (out / "model").exists()
