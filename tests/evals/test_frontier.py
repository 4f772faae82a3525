"""The frontier: which points are beaten, what runs wrote down, best-of-n, and all checkpoints measured."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.frontier import Point, bought, frontier, logged_points, models_of
from trimtab.evals.intervals import Estimate


def point(name: str, kl: float, reward: float) -> Point:
    return Point("run", name, None, Estimate(kl, kl, kl, 1), Estimate(reward, reward, reward, 1))


def test_the_frontier_is_what_nothing_cheaper_beats() -> None:
    points = [
        point("c", 3, 2),
        point("a", 0, 0),
        point("b", 2, 3),
        point("d", 5, 4),
        point("e", 2, 1),
        point("f", 4, 3),
    ]
    found = frontier("reward", points)
    assert found.best == ("a", "b", "d")
    assert [one.name for one in found.points] == ["a", "b", "e", "c", "f", "d"]


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    scores = [[0.0, 1.0, 5.0, 2.0], [3.0, 3.0, -1.0, 0.5]]
    found = bought(scores)
    assert [one.n for one in found] == [1, 2, 4]
    for one in found:
        literal = [[max(subset) for subset in combinations(row, one.n)] for row in scores]
        means = [sum(row) / len(row) for row in literal]
        assert one.reward.value == pytest.approx(sum(means) / 2)
        assert one.kl == pytest.approx(math.log(one.n) - (one.n - 1) / one.n)


def test_evaluations_of_a_run_are_points() -> None:
    evals = [
        {"step": 0, "reward": 1.0, "reward_low": 0.5, "reward_high": 1.5, "kl": 0.0},
        {"step": 5, "win_rate": 0.6, "kl": 2.0},
        {"step": 9, "accuracy": 0.7},
        {"step": 10, "reward": None, "kl": 3.0},
    ]
    found = logged_points("run", evals)
    assert {measure: [(one.name, one.kl.value) for one in some] for measure, some in found.items()} == {
        "reward": [("run@0", 0.0)],
        "win_rate": [("run@5", 2.0)],
    }
    assert (found["reward"][0].reward.low, found["reward"][0].reward.high) == (0.5, 1.5)
    assert math.isnan(found["win_rate"][0].reward.low)


def rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_two_runs_read_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "prompts.jsonl", ["Say a.", "Say b.", "Say c."])
    same = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "4"]
    runs = []
    for seed in ("0", "1"):
        out = tmp_path / f"rloo-{seed}"
        flags = ["--model", "tiny", "--reward", "length", "--data", data, "--eval-data", data, "--steps", "2"]
        flags += ["--prompts-per-step", "2", "--lr", "0.01", "--save-every", "1", "--eval-every", "1", "--samples", "0"]
        assert main(["rloo", *flags, *same, "--out", str(out), "--seed", seed]) == 0
        runs.append(str(out))
    # The last checkpoint and the final model are the same weights, and one point.
    assert [step for step, _ in models_of(Path(runs[0]))] == [1, 2]
    (Path(runs[1]) / "checkpoints" / "step-00000002").rename(tmp_path / "elsewhere")
    assert [step for step, _ in models_of(Path(runs[1]))] == [1, None]
    capsys.readouterr()
    assert main(["evaluate", "frontier", *runs, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["measure"] == "reward" and len(read["points"]) == 6 and read["best_of_n"] == []
    assert main(["evaluate", "frontier", *runs, "--reward", "length", "--data", data, "-n", "4", *same, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in found["points"]} == {"rloo-0@1", "rloo-0@2", "rloo-1@1", "rloo-1@end"}
    assert [one["n"] for one in found["best_of_n"]] == [1, 2, 4]
    by_name = {one["name"]: one for one in found["points"]}
    assert by_name["rloo-0@2"]["kl"]["value"] > 0 and by_name["rloo-1@end"]["kl"]["value"] > 0
    assert main(["evaluate", "frontier", *runs]) == 0
    assert "on the frontier" in capsys.readouterr().out


def test_what_cannot_be_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "frontier", str(tmp_path), "--reward", "length"]) == 2
    assert "give --reward and --data both" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="neither checkpoints nor a model"):
        models_of(tmp_path)
    for name, start in (("one", "tiny"), ("two", "other")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"model: {start}\n")
    data = rows(tmp_path / "prompts.jsonl", ["a"])
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["evaluate", "frontier", *both, "--reward", "length", "--data", data]) == 2
    assert "no common zero" in capsys.readouterr().err
