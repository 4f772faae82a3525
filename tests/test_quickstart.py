"""The whole chain on the tiny model, as `make demo MODEL=tiny` runs it, and the arithmetic of its labels."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trimtab.batches import Tokens
from trimtab.cli import main
from trimtab.recipes.quickstart import Quickstart, labelled_pairs, notes, online_rewards, with_sizes
from trimtab.records import Answer, Prompt
from trimtab.rewards import every_score, parse_reward
from trimtab.sampling import Samples

METHODS = ["start", "best-of-16", "dpo", "rloo"]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "quickstart"
    sizes = ["--prompts", "12", "--held-out-prompts", "4"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        assert main(["quickstart", "--model", "tiny", "--out", str(out), *sizes]) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_every_method_has_its_figures_with_intervals(summary: tuple[Path, dict]) -> None:
    _, told = summary
    assert [row["method"] for row in told["methods"]] == METHODS
    for row in told["methods"]:
        for name in ("gold", "proxy", "kl", "length", "gold_gain"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    start, best, dpo, rloo = told["methods"]
    assert start["kl"]["value"] == 0 and start["gold_gain"]["value"] == 0
    assert best["kl"]["value"] == pytest.approx(math.log(16) - 15 / 16)
    assert best["proxy"]["value"] > start["proxy"]["value"]
    assert dpo["kl"]["value"] > 0 and rloo["kl"]["value"] > 0


def test_the_page_the_texts_and_the_frontier_are_there(summary: tuple[Path, dict]) -> None:
    out, told = summary
    page = (out / "report.html").read_text()
    assert told["texts"][0]["prompt"] and set(told["texts"][0]["answers"]) == set(METHODS)
    assert "best of 16" in page.lower().replace("-", " ") and len(told["commands"]) >= 5
    points = [point for point in told["frontier"] if point["method"] == "best-of-n"]
    assert [point["n"] for point in points] == [1, 2, 4, 8, 16]
    assert points[0]["gold"] == pytest.approx(told["methods"][0]["gold"]["value"])
    oracle = [point for point in told["frontier"] if point["method"] == "best-of-n by gold"]
    assert [point["n"] for point in oracle] == [1, 2, 4, 8, 16] and oracle[0]["gold"] == pytest.approx(
        points[0]["gold"]
    )
    assert all(best["gold"] >= by_proxy["gold"] for best, by_proxy in zip(oracle, points, strict=True))
    for name in ("dpo", "rloo"):
        path = [point for point in told["frontier"] if point["method"] == name]
        assert [point["step"] is None for point in path] == [False, True] and path[1]["kl"] > path[0]["kl"] > 0
    assert "RLOO, step by step" in page and "quickstart/rloo" in page


def test_rl_is_rewarded_with_gold_itself_and_the_page_says_so(summary: tuple[Path, dict]) -> None:
    out, told = summary
    rollouts = [json.loads(line) for line in (out / "rloo" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6 and len(rollouts[0]["answers"]) == 4
    asked = {json.loads(line)["prompt"][0]["content"] for line in (out / "prompts.jsonl").read_text().splitlines()}
    assert len(asked) == 12 and {rollout["prompt"] for rollout in rollouts} <= asked
    gold = parse_reward("sentiment")
    for rollout in rollouts:
        texts = [Answer(answer["text"]) for answer in rollout["answers"]]
        again = every_score(gold, [Prompt.from_text(rollout["prompt"])] * len(texts), texts)
        assert [answer["reward"] for answer in rollout["answers"]] == pytest.approx(again)
    assert any("trimtab rl --algorithm rloo" in command for command in told["commands"])
    assert "RLOO trained on the gold reward itself" in (out / "report.html").read_text()


def test_rl_may_have_the_reward_model_instead(tmp_path: Path) -> None:
    assert online_rewards(tmp_path, Quickstart()) == ("sentiment",)
    assert online_rewards(tmp_path, Quickstart(rl_reward="proxy")) == (str(tmp_path / "reward"),)
    assert "the reward model; DPO" in notes(Quickstart(rl_reward="proxy"))[0]
    assert notes(Quickstart(methods=("dpo",))) == []


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["rlo"], "--methods rlo: give some of best-of-n, dpo, reinforce"),
        (["dpo", "dpo"], "each once"),
        (["dapo"], "--minibatches 16"),
    ],
)
def test_methods_that_cannot_run_are_refused_at_once(methods: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        with_sizes(Quickstart(methods=tuple(methods)))


@pytest.mark.parametrize(
    ("methods", "flags", "told"),
    [
        (("best-of-n", "dpo"), {"rl_reward": "proxy"}, "--rl-reward proxy has no effect: there is no online RL"),
        (("dpo",), {"rl_rollouts": 3}, "--rl-rollouts 3 has no effect"),
        (("rloo",), {"beta": 0.3}, "--beta 0.3 has no effect: there is no dpo"),
    ],
)
def test_flags_of_methods_that_are_not_given_are_refused(methods: tuple[str, ...], flags: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        with_sizes(Quickstart(methods=methods, **flags))
    assert with_sizes(with_sizes(Quickstart(methods=methods))).methods == methods  # as a stored config is repeated


def test_what_cannot_be_resumed_is_not_advised(
    summary: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", "--model", "tiny", "--out", str(summary[0])]) == 2
    (tmp_path / "note.txt").write_text("mine")
    assert main(["quickstart", "--model", "tiny", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("--overwrite") == 2 and "--resume" not in told


def test_other_algorithms_take_their_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    sizes = ["--prompts", "9", "--held-out-prompts", "2", "--n", "2", "--max-new-tokens", "6", "--rl-rollouts", "2"]
    out = tmp_path / "run"
    assert main(["quickstart", "--model", "tiny", "--out", str(out), *sizes, "--methods", "ppo", "grpo"]) == 0
    told = json.loads((out / "summary.json").read_text())
    assert [row["method"] for row in told["methods"]] == ["start", "ppo", "grpo"]
    steps = [len((out / name / "metrics.jsonl").read_text().splitlines()) for name in ("ppo", "grpo")]
    assert steps == [2 * 4, 2] and not (out / "dpo").exists()


def test_what_quickstart_leaves_works_as_input(summary: tuple[Path, dict], tmp_path: Path) -> None:
    out, _ = summary
    scored = str(tmp_path / "scored.jsonl")
    assert (
        main(["score", "--reward", str(out / "reward"), "--data", str(out / "pairs-heldout.jsonl"), "--out", scored])
        == 0
    )
    train, held_out = ((out / f"pairs-{part}.jsonl").read_text().splitlines() for part in ("train", "heldout"))
    prompts = [{json.dumps(json.loads(line)["prompt"]) for line in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]


def samples_of(texts: list[str], n: int) -> Samples:
    count = len(texts)
    empty = torch.zeros(count, 1, dtype=torch.bool)
    tokens = Tokens(torch.zeros(count, 1, dtype=torch.long), empty, empty)
    prompts = tuple(Prompt.from_user(f"p{i}") for i in range(count // n))
    nothing = torch.zeros(count, 1)
    return Samples(prompts, n, tokens, nothing, nothing, texts, torch.ones(count, dtype=torch.bool))


def test_the_coin_follows_bradley_terry() -> None:
    class Gold:
        name = "gold"

        def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
            return [{"good": 0.3, "bad": 0.1}[answer.text.split()[0]] for answer in answers]

    config = with_sizes(Quickstart(coin=5.0))
    parts = labelled_pairs(samples_of(["good a", "bad b"] * 4000, 2), Gold(), config)
    pairs = [*parts["train"], *parts["heldout"]]
    share = Counter(pair.chosen.split()[0] for pair in pairs)["good"] / len(pairs)
    assert len(pairs) == 4000
    assert share == pytest.approx(1 / (1 + math.exp(-5 * 0.2)), abs=0.025)  # three standard errors


def test_training_takes_every_pair_of_a_prompt_and_held_out_pairs_share_no_answer() -> None:
    class Gold:
        name = "gold"

        def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
            return [0.0] * len(answers)

    texts = ["a", "b", "c", "d", "same", "same", "x", "y", "e", "f", "g", "odd"]
    parts = labelled_pairs(samples_of(texts, 4), Gold(), with_sizes(Quickstart()))
    found = {
        part: [f"{p.prompt.text} {min(p.chosen, p.rejected)} {max(p.chosen, p.rejected)}" for p in pairs]
        for part, pairs in parts.items()
    }
    assert found["heldout"] == ["p0 a b", "p0 c d"]
    assert found["train"] == [
        *("p1 same x", "p1 same y", "p1 same x", "p1 same y", "p1 x y"),
        *("p2 e f", "p2 e g", "p2 e odd", "p2 f g", "p2 f odd", "p2 g odd"),
    ]
