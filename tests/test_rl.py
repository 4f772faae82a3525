"""`trimtab rl` and its names as a person meets them: every algorithm runs, runs repeat, mistakes are told at once."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from trimtab.algorithms import ALGORITHMS
from trimtab.cli import main
from trimtab.recipes.online import prompt_means

PROMPTS = [{"prompt": [{"role": "user", "content": f"Say {i}."}], "answer": str(i)} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
SMALL = ["--steps", "3", "--prompts-per-step", "4", "--max-new-tokens", "4", "--samples", "1", "--lr", "1e-3"]
FAST = ["--dtype", "float32", "--device", "cpu", *SMALL]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache folder for all tests of this file."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def run_rl(command: str, prompts: str, out: Path, *flags: str) -> Path:
    given = [*command.split(), "--model", "tiny", "--data", prompts, "--out", str(out), *FAST]
    given += [] if "--reward" in flags else ["--reward", "length"]
    assert main([*given, *flags]) == 0
    return out


FIGURES = {"loss", "reward", "kl", "kl_per_token", "entropy", "length", "unfinished", "ratio", "logprob_gap"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs(name: str, prompts: str, tmp_path: Path) -> None:
    row = ALGORITHMS[name]
    flags = ["--minibatches", str(min(row.minibatches, 2))]
    out = run_rl(f"rl --algorithm {name}", prompts, tmp_path / "run", *flags)
    metrics, rollouts = rows_of(out, "metrics"), rows_of(out, "rollouts")
    assert len(metrics) == 3 and metrics[0].keys() >= FIGURES
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4) and metrics[0]["logprob_gap"] < 1e-4
    assert metrics[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert all(value is not None for figures in metrics for value in figures.values())
    updates = row.epochs * min(row.minibatches, 2)
    assert [rollout["rollout"] for rollout in rollouts] == list(range(1, -(-3 // updates) + 1))
    assert len(rollouts[0]["answers"]) == 4 and set(rollouts[0]["seconds"]) == {"sample", "score", "refer", "credit"}
    assert (rollouts[0]["explained_variance"] is not None) == row.critic == (out / "critic").exists()
    answers = [answer["text"] for rollout in rollouts for answer in rollout["answers"]]
    assert [len(text) for text in answers] == [
        answer["reward"] for rollout in rollouts for answer in rollout["answers"]
    ]
    assert (out / "model" / "model.safetensors").exists() and "<html" in (out / "report.html").read_text()[:200]


REPEATED = {
    "several rewards": ["--reward", "length", "exact-match", "--reward-weights", "-0.1", "2", "--lora-rank", "4"],
    "control": ["--kl-target", "1", "--kl-horizon", "50", "--temperature", "0.8", "--unfinished-score", "-1"],
    "parts": ["--loss", "cispo", "--advantage", "grpo", "--advantage-args", "correction=0", "--kl", "exact"],
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_run_repeats_to_the_last_bit(name: str, prompts: str, tmp_path: Path) -> None:
    first = run_rl("rloo", prompts, tmp_path / "first", *REPEATED[name], "--eval-data", prompts, "--save-every", "2")
    again = tmp_path / "again"
    assert main(["rl", "--config", str(first), "--out", str(again)]) == 0
    for file in ("evals.jsonl", "scores.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (first / file).read_bytes() == (again / file).read_bytes(), file
    losses = [[row["loss"] for row in rows_of(run, "metrics")] for run in (first, again)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    assert [row["step"] for row in rows_of(first, "evals")] == [0, 3]
    assert (first / "checkpoints" / "step-00000002" / "model.safetensors").exists()
    assert not (first / "checkpoints" / "best").exists()


def test_what_held_out_answers_scored_is_written_down(prompts: str, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.jsonl", PROMPTS[:3])
    out = run_rl("rloo", prompts, tmp_path / "run", "--eval-data", held_out, "--eval-every", "1")
    evals, scores = rows_of(out, "evals"), rows_of(out, "scores")
    assert [row["step"] for row in scores] == [row["step"] for row in evals] == [0, 1, 2, 3]
    for figures, row in zip(evals, scores, strict=True):
        assert row["measure"] == "reward" and [len(one) for one in row["scores"]] == [2, 2, 2]
        assert fmean(map(fmean, row["scores"])) == pytest.approx(figures["reward"])
        assert fmean(map(fmean, row["lengths"])) == pytest.approx(figures["length"])
        for name in ("kl", "length", "distinct"):
            assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
    facts = json.loads((out / "data.json").read_text())["eval"]["facts"]
    assert (facts["kind"], facts["records"], facts["shared_rows"]["count"]) == ("Prompt", 3, 3)
    page = (out / "report.html").read_text()
    assert "3 of 3 held-out rows are in the training data as well" in page and "held-out reward" in page


def test_several_rewards_leave_their_parts(prompts: str, tmp_path: Path) -> None:
    flags = ["--reward", "length", "exact-match", "--reward-weights", "0.5", "2"]
    for rollout in rows_of(run_rl("rloo", prompts, tmp_path / "run", *flags), "rollouts"):
        for answer in rollout["answers"]:
            assert answer["parts"].keys() == {"length", "exact-match"}
            assert answer["reward"] == pytest.approx(
                0.5 * answer["parts"]["length"] + 2 * answer["parts"]["exact-match"]
            )


def test_a_reward_model_is_reward_and_critic(prompts: str, tmp_path: Path) -> None:
    pairs, reward = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "reward"
    trained = ["--data", pairs, "--out", str(reward), "--dtype", "float32", "--device", "cpu", "--steps", "2"]
    assert main(["reward", "--model", "tiny", *trained]) == 0
    flags = ["--reward", str(reward), "--lora-rank", "2", "--critic-lr", "1e-3", "--critic-warmup", "1"]
    out = run_rl("ppo", prompts, tmp_path / "ppo", *flags, "--epochs-per-rollout", "1")
    first, second, third = rows_of(out, "metrics")
    # The reference is the start model, so a policy that has not moved has no KL from it.
    assert abs(first["kl"]) < 1e-4 and abs(second["kl"]) < 1e-4 and abs(third["kl"]) > 1e-4
    assert first["value_loss"] > 0 and "value_clip_fraction" in first
    reused = ["--reward", "length", "--critic", str(out / "critic")]
    run_rl("ppo", prompts, tmp_path / "next", *reused, "--model", str(out))


def test_a_spent_kl_budget_ends_the_run_with_its_model(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--kl-budget", "0.5", "--lr", "0.01", "--steps", "40", "--eval-data", prompts, "--eval-every", "1"]
    out = run_rl("reinforce", prompts, tmp_path / "run", *flags)
    steps, evals = len(rows_of(out, "metrics")), rows_of(out, "evals")
    told = " ".join(capsys.readouterr().err.split())
    assert 1 <= steps < 40 and f"ended after {steps} of 40 steps" in told
    assert "the --kl-budget 0.5 is spent" in told
    assert rows_of(out, "rollouts")[-1]["kl"] >= 0.5 > max(row["kl"] for row in rows_of(out, "rollouts")[:-1])
    assert [row["step"] for row in evals] == list(range(steps + 1))
    assert (out / "model" / "model.safetensors").exists() and (out / "checkpoints" / "best").exists()


def test_the_best_policy_on_held_out_prompts_is_kept(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scripted_rewards.py").write_text(SCRIPTED)
    monkeypatch.syspath_prepend(tmp_path)
    held_out = write(tmp_path / "held_out.jsonl", PROMPTS[:3])
    flags = ["--reward", "py:scripted_rewards:held_out_best_at_2", "--eval-data", held_out, "--eval-every", "1"]
    out = run_rl("rloo", prompts, tmp_path / "run", *flags, "--save-every", "1")
    assert [row["reward"] for row in rows_of(out, "evals")] == [9.0, 1.0, 3.0, 2.0]
    saved = {path.name: (path / "model.safetensors").read_bytes() for path in (out / "checkpoints").iterdir()}
    assert saved["best"] == saved["step-00000002"] != saved["step-00000001"]
    assert (out / "model" / "model.safetensors").read_bytes() == saved["step-00000003"] != saved["best"]


def test_a_target_moves_the_price(prompts: str, tmp_path: Path) -> None:
    out = run_rl("rloo", prompts, tmp_path / "run", "--kl-target", "5", "--kl-horizon", "100", "--kl-coef", "0.5")
    prices = [row["kl_coefficient"] for row in rows_of(out, "rollouts")]
    # 16 answers of no KL at all: 0.2 * 16 / 100 less.
    assert prices[:2] == pytest.approx([0.5, 0.5 * (1 - 0.2 * 0.16)])


def test_demonstrations_are_imitated_beside(prompts: str, tmp_path: Path) -> None:
    shown = write(tmp_path / "shown.jsonl", [{"prompt": f"Say {i}.", "completion": "yes"} for i in range(4)])
    flags = ["--ptx-data", shown, "--ptx-coef", "5", "--steps", "8", "--lr", "3e-3"]
    for command, more in {"rloo": [], "ppo": ["--critic-warmup", "2", "--micro-batch-rows", "3"]}.items():
        out = run_rl(command, prompts, tmp_path / command, *flags, *more)
        losses = [row["demonstration_loss"] for row in rows_of(out, "metrics")]
        known = [loss for loss in losses if loss is not None]
        assert len(known) == 8 - (2 if more else 0) and known[-1] < known[0] - 0.5


@pytest.mark.parametrize("command", ["ppo", "rloo"])
def test_memory_and_layout_change_no_loss(command: str, prompts: str, tmp_path: Path) -> None:
    choices = {
        "plain": [],
        "again": ["--gradient-checkpointing", "on"],
        "apart": ["--no-share-prompts", "--micro-batch-rows", "3", "--batch-rows", "5"],
    }
    runs = {name: run_rl(command, prompts, tmp_path / name, *flags) for name, flags in choices.items()}
    losses = {name: [row["loss"] for row in rows_of(run, "metrics")] for name, run in runs.items()}
    for name in ("again", "apart"):
        assert losses[name] == pytest.approx(losses["plain"], abs=1e-4), name
    assert json.loads((runs["again"] / "environment.json").read_text())["gradient_checkpointing"] == "on, as asked"


SCRIPTED = """
evaluations = iter([9.0, 1.0, 3.0, 2.0])

def held_out_best_at_2(completions):
    if len(completions) == 6:  # two answers to each of three held-out prompts
        return [next(evaluations)] * 6
    return [float(len(text[0]["content"])) for text in completions]
"""

FUNCTIONS = """
def some(prompts, completions, answer):
    return [None if i % 3 == 0 else float(len(text[0]["content"])) for i, text in enumerate(completions)]

def none(completions):
    return [None for text in completions]

asked = []

def never_at_first(completions):
    asked.append(len(completions))
    return [None if len(asked) == 1 else float(i) for i in range(len(completions))]

def broken(completions):
    return [float("nan") for text in completions]
"""


def test_functions_may_leave_answers_out_but_not_all(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards_for_rl.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    out = run_rl("grpo", prompts, tmp_path / "some", "--reward", "py:rewards_for_rl:some")
    assert [answer["reward"] is None for answer in rows_of(out, "rollouts")[0]["answers"]] == [True, False, False, True]
    given = ["rloo", "--model", "tiny", "--data", prompts, *FAST]
    for name, expected in {
        "none": "none gave None for every answer of 3 rollouts",
        "broken": "nan.*the answer .* to the prompt",
    }.items():
        assert main([*given, "--out", str(tmp_path / name), "--reward", f"py:rewards_for_rl:{name}"]) == 2
        assert re.search(expected, capsys.readouterr().err, re.DOTALL)


def test_a_rollout_without_any_score_is_passed_over_and_said_once(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    out = run_rl("ppo", prompts, tmp_path / "run", "--reward", "py:late_rewards:never_at_first", "--steps", "2")
    told, rollouts = " ".join(capsys.readouterr().err.split()), rows_of(out, "rollouts")
    assert told.count("rollout 1: none of 16 answers has a score. Such rollouts are passed over") == 1
    assert rollouts[0]["reward"] is rollouts[0]["reward_std"] is rollouts[0]["kl"] is None
    assert [row["health"].get("unscored") for row in rollouts] == [1, 1] and rollouts[1]["reward"] == 7.5
    assert [row["step"] for row in rows_of(out, "metrics")] == [1, 2]


def test_held_out_prompts_without_a_score_have_no_figure(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held_out_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--reward", "py:held_out_rewards:never_at_first", "--eval-data", prompts, "--eval-every", "3"]
    first, last = rows_of(run_rl("rloo", prompts, tmp_path / "run", *flags), "evals")
    assert "none of 16 held-out answers has a score" in " ".join(capsys.readouterr().err.split())
    assert first["reward"] is None and first["kl"] == pytest.approx(0, abs=1e-5) and last["reward"] == 7.5


def test_an_unhealthy_rollout_is_told_in_words(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_rl("rloo", prompts, tmp_path / "run", "--reward", "exact-match", "--max-new-tokens", "1")
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("were cut at the length limit. Raise --max-new-tokens") == 1
    assert "all answers have the same reward" in told
    assert rows_of(out, "rollouts")[-1]["health"]["cut"] == 3


MISTAKES = {
    "unknown algorithm": (["rl", "--algorithm", "rlo"], r"unknown algorithm 'rlo'.*rloo"),
    "a name and another": (["rloo", "--algorithm", "ppo"], r"leave --algorithm out"),
    "one answer a prompt": (["grpo", "--group-size", "1"], r"--group-size 1 must be 2"),
    "one answer a step": (["reinforce", "--group-size", "1", "--prompts-per-step", "1"], r"--prompts-per-step above 1"),
    "no answers": (["reinforce", "--group-size", "0"], r"--group-size 0"),
    "answers used twice without a ratio": (["rloo", "--epochs-per-rollout", "2"], r"reinforce has no ratio.*ppo_clip"),
    "more minibatches than prompts": (["grpo", "--minibatches", "5"], r"--minibatches 5.*--prompts-per-step 4"),
    "another loss, its argument missing": (["grpo", "--loss", "gsp"], r"unknown loss 'gsp'.*gspo"),
    "argument of another loss": (["rloo", "--loss-args", "epsilon=0.1"], r"epsilon"),
    "unknown advantage": (["rloo", "--advantage", "rlo"], r"unknown advantage.*rloo"),
    "argument out of range": (["ppo", "--advantage-args", "lam=2"], r"lam must be in \[0, 1\]"),
    "gae without a critic": (["rloo", "--advantage", "gae"], r"--advantage gae.*no critic"),
    "a critic that nothing reads": (["ppo", "--advantage", "rloo"], r"--advantage rloo.*only gae"),
    "unknown shape": (["rloo", "--score-shape", "norm"], r"unknown score shape"),
    "no score": (["rloo", "--unfinished-score", "nan"], r"--unfinished-score nan"),
    "critic flags without a critic": (["rloo", "--critic-lr", "1e-4"], r"rloo has no critic"),
    "nothing but warm-up": (["ppo", "--critic-warmup", "3"], r"--critic-warmup 3 of --steps 3"),
    "sampling from a part": (["rloo", "--top-k", "5"], r"--top-k 5.*own distribution"),
    "nucleus": (["rloo", "--top-p", "0.9"], r"--top-p 0.9"),
    "nothing to explore": (["rloo", "--temperature", "0"], r"--temperature 0"),
    "estimator of the other place": (["rloo", "--kl", "k3_weighted"], r"--kl k3_weighted.*k1, k2, k3, exact"),
    "KL without a price": (["rl", "--algorithm", "dr_grpo", "--kl", "k1"], r"--kl-coef"),
    "negative price": (["rloo", "--kl-coef", "-1"], r"--kl-coef -1"),
    "horizon without a target": (["rloo", "--kl-horizon", "50"], r"--kl-horizon 50.*--kl-target"),
    "horizon shorter than a rollout": (["rloo", "--kl-target", "1", "--kl-horizon", "3"], r"horizon above 3.2"),
    "target in the loss": (["grpo", "--kl-target", "1"], r"--kl-in reward"),
    "target without a price": (["rloo", "--kl-target", "1", "--kl-coef", "0"], r"--kl-coef, above 0"),
    "target of nothing": (["rloo", "--kl-target", "0"], r"target.*above 0"),
    "budget of nothing": (["rloo", "--kl-budget", "0"], r"KL budget is 0"),
    "demonstrations without weight": (["rloo", "--ptx-data", "{prompts}"], r"--ptx-coef"),
    "weight without demonstrations": (["rloo", "--ptx-coef", "1"], r"--ptx-data"),
    "prompts are not cut": (["rloo", "--overlong", "truncate-response"], r"--overlong truncate-response.*never cut"),
    "too few prompts": (["rloo", "--prompts-per-step", "9"], r"--prompts-per-step 9.*8 prompts"),
    "prompts too long": (["rloo", "--max-length", "20"], r"8 of 8 prompts are longer than 16.*--overlong drop"),
    "none left": (["rloo", "--max-length", "20", "--overlong", "drop"], r"0 prompts that can be used"),
    "unknown reward": (["rloo", "--reward", "lenght"], r"lenght.*length"),
    "unknown critic": (["ppo", "--critic", "./nowhere"], r"nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(
    name: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, expected = MISTAKES[name]
    words = [word.format(prompts=prompts) for word in given]
    out = tmp_path / "out"
    defaults = ["--model", "tiny", "--data", prompts, "--out", str(out), *FAST]
    reward = [] if "--reward" in words else ["--reward", "length"]
    assert main([words[0], *defaults, *reward, *words[1:]]) == 2
    told = capsys.readouterr().err
    assert re.search(expected, told, re.DOTALL), told
    assert "Traceback" not in told and not out.exists()


def test_inputs_inside_the_run_that_is_replaced_are_refused(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_rl("ppo", prompts, tmp_path / "run")
    flags = ["--critic", str(out / "critic"), "--overwrite", "--reward", "length"]
    assert main(["ppo", "--model", "tiny", "--data", prompts, "--out", str(out), *FAST, *flags]) == 2
    assert "--critic" in capsys.readouterr().err and (out / "critic").exists()


def test_prompts_without_a_score_have_no_mean() -> None:
    assert prompt_means([1.0, 3.0, None, 2.0, None, None], 2) == [2.0, 2.0]
