"""`trimtab evaluate win-rate` and `evaluate agreement` as they are called: files, models, servers that fail."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.judges.servers import completion, serving, shown
from trimtab.cli import main
from trimtab.recipes.evaluate_win_rate import named_sources

QUESTIONS = [f"question {n}" for n in range(12)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(tmp_path: Path, name: str, texts: list[str]) -> str:
    """AlpacaEval's form of a system's outputs."""
    rows = [{"instruction": q, "output": t, "generator": name} for q, t in zip(QUESTIONS, texts, strict=True)]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`long` is longer than `short` on ten of twelve questions, and says the same on one; `middle` lies between."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    long = ["x" * (8 + n) for n in range(10)] + ["same", "x"]
    short = ["y" * (4 + n % 3) for n in range(10)] + ["same", "yyy"]
    middle = ["z" * (8 + n % 4) for n in range(12)]
    return [answers(tmp_path, *named) for named in (("long", long), ("short", short), ("middle", middle))]


def told(capsys: pytest.CaptureFixture, *flags: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", "win-rate", *flags, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_two_files_under_a_rule_by_hand(systems: list[str], capsys: pytest.CaptureFixture) -> None:
    found = told(capsys, "--systems", *systems[:2], "--judge", "rule:length")
    (rate,) = found["win_rates"]
    assert (rate["first"], rate["second"]) == ("long", "short")
    assert (rate["wins"], rate["ties"], rate["losses"]) == (10, 1, 1)
    assert rate["win_rate"]["value"] == pytest.approx(10.5 / 12) and rate["win_rate"]["count"] == 12
    assert found["position_bias"] is None and found["ratings"] is None
    assert rate["length_controlled"]["rate"]["value"] < rate["win_rate"]["value"]


def test_three_systems_get_ratings_and_the_order_of_names_is_kept(
    systems: list[str], capsys: pytest.CaptureFixture
) -> None:
    found = told(capsys, "--systems", *(f"s{n}={path}" for n, path in enumerate(systems)), "--judge", "rule:length")
    assert [(rate["first"], rate["second"]) for rate in found["win_rates"]] == [
        ("s0", "s1"),
        ("s0", "s2"),
        ("s1", "s2"),
    ]
    # One answer of the middle system lost to the short one's: finite ratings, and bounds that do not all end.
    assert list(found["ratings"]) == ["s0", "s2", "s1"] and found["ratings"]["s1"]["low"] is None
    soft = told(capsys, "--systems", *systems, "--judge", "reward:length", "--limit", "6")
    assert list(soft["ratings"])[-1] == "short" and soft["win_rates"][0]["win_rate"]["count"] == 6


def test_verdicts_that_were_written_are_read_again(
    systems: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "verdicts.jsonl")
    first = told(capsys, "--systems", *systems, "--judge", "reward:length", "--out", out)
    again = told(capsys, "--verdicts", out)
    assert [again["judge"], len(again["win_rates"])] == [out, 3]
    for one, other in zip(first["win_rates"], again["win_rates"], strict=True):
        assert [one[name] for name in ("first", "wins", "ties")] == [other[name] for name in ("first", "wins", "ties")]
        assert one["win_rate"] == pytest.approx(other["win_rate"]) and one["lengths"] == other["lengths"]
    for name, rating in first["ratings"].items():
        assert rating == pytest.approx(again["ratings"][name])


def test_a_language_model_judges_and_its_failures_lose_nothing(
    systems: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.judges.endpoint.Patience.pause", lambda patience, seconds: None)
    broken = True

    def says(asked: str, number: int) -> tuple[int, bytes]:
        if broken and "question 3" in asked:
            return 500, b"cannot"
        return completion("?" if "question 5" in asked else f"Verdict: {'AB'[shown(asked)[0].startswith('y')]}")

    with serving(says) as server:
        flags = ["--systems", *systems[:2], "--judge", f"llm:{server.url}#judge"]
        partial = told(capsys, *flags, status=2)
        assert partial["asked"]["failed"] == 2 and partial["asked"]["unparsable"] == 2
        assert partial["win_rates"][0]["unjudged"] == 2 and partial["win_rates"][0]["win_rate"]["count"] == 10
        assert main(["evaluate", "win-rate", *flags]) == 2
        said = capsys.readouterr()
        assert "the figures are incomplete" in said.err and "500 Internal Server Error: cannot" in said.err
        assert "2 comparisons without a verdict are in no figure" in said.out
        broken, before = False, len(server.asked)
        whole = told(capsys, *flags)
        assert len(server.asked) - before == 2 and whole["asked"]["kept"] == 20
        assert whole["win_rates"][0]["unjudged"] == 1 and whole["position_bias"]["favours"] is None
        # The answer that both gave is a tie that nobody was asked about.
        assert whole["win_rates"][0]["ties"] == 1 and len({*server.asked}) == 22


def test_a_function_is_asked_in_both_orders(
    systems: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "biased_judges.py").write_text("def first(first):\n    return [1.0] * len(first)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = told(capsys, "--systems", *systems[:2], "--judge", "py:biased_judges:first")
    assert found["win_rates"][0]["win_rate"]["value"] == 0.5 and found["position_bias"]["favours"] == "first"


def test_a_policy_against_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = answers(tmp_path, "written", ["a short answer"] * 12)
    flags = ["--systems", "tiny", path, "--judge", "rule:length", "--max-new-tokens", "4", "--limit", "3"]
    found = told(capsys, *flags, "--dtype", "float32")
    (rate,) = found["win_rates"]
    assert (rate["first"], rate["second"], rate["losses"]) == ("tiny", "written", 3)
    assert rate["win_rate"]["high"] < 1 and rate["lengths"][1] == 14


def test_mt_bench(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions = [{"question_id": n, "category": "writing", "turns": [f"write {n}", "again"]} for n in (81, 82)]
    data = written(tmp_path / "question.jsonl", questions)

    def bench(name: str, length: int) -> str:
        choice = {"index": 0, "turns": ["a" * length, "b" * length]}
        rows = [{"question_id": n, "model_id": name, "choices": [choice]} for n in (81, 82)]
        return written(tmp_path / f"{name}.jsonl", rows)

    files = [bench("vicuna", 9), bench("alpaca", 5)]
    found = told(capsys, "--systems", *files, "--judge", "rule:length", "--data", data)
    (rate,) = found["win_rates"]
    # Two turns of two questions: four comparisons, two observations.
    assert rate["wins"] == 4 and rate["win_rate"]["count"] == 2
    assert main(["evaluate", "win-rate", "--systems", *files, "--judge", "rule:length"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_mt_bench_judgments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    games = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("error", "model_1"), ("model_2", "tie")]
    rows = [
        {"question_id": n, "model_1": "a", "model_2": "b", "g1_winner": one, "g2_winner": two, "turn": 1}
        for n, (one, two) in enumerate(games)
    ]
    found = told(capsys, "--verdicts", written(tmp_path / "gpt-4_pair.jsonl", rows))
    (rate,) = found["win_rates"]
    assert rate["win_rate"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0.25) / 4) and rate["unjudged"] == 1
    # In the second game the one shown first won both times, in the last a tie met the first's loss.
    assert found["position_bias"]["first_wins"]["value"] == pytest.approx((0.5 + 1 + 0.5 + 0.25) / 4)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "four"}]
    human = {"question_id": 1, "model_a": "a", "model_b": "b", "winner": "tie (inconsistent)", "judge": "x"}
    rows = [human, {**human, "winner": "model_b"}, {**human, "conversation_a": said, "conversation_b": said}]
    found = told(capsys, "--verdicts", written(tmp_path / "human.jsonl", rows))
    assert found["win_rates"][0]["win_rate"]["value"] == pytest.approx(1 / 3)
    assert found["win_rates"][0]["win_rate"]["count"] == 1 and found["position_bias"] is None


def test_alpaca_eval_annotations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = {"output_1": "old", "generator_1": "base", "output_2": "newer", "generator_2": "model"}
    preferences = [2.0, 1.0, 1.5, 0, None, 1.8, float("nan")]
    rows = [{"instruction": f"q{n}", "preference": value, **row} for n, value in enumerate(preferences)]
    found = told(capsys, "--verdicts", written(tmp_path / "annotations.jsonl", rows))
    (rate,) = found["win_rates"]
    assert (rate["first"], rate["second"], rate["unjudged"]) == ("model", "base", 2)
    assert rate["win_rate"]["value"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.8) / 5)
    assert rate["lengths"] == [5, 3] and rate["length_controlled"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "at least two --systems"),
        (["--systems", "a.jsonl", "b.jsonl"], "--judge is missing"),
        (["--verdicts", "v.jsonl", "--judge", "rule:length"], "--judge has no effect with --verdicts"),
        (["--verdicts", "v.jsonl"], "--verdicts v.jsonl: there is no such file"),
        (["--systems", "x=a.jsonl", "x=b.jsonl", "--judge", "rule:length"], "names 'x' twice"),
        (["--systems", "a.jsonl", "b.jsonl", "--judge", "rule:length"], "a.jsonl: there is no such file of answers"),
        (["--systems", "a.jsonl", "b.jsonl", "--judge", "llm:there#m"], "'there' is no address"),
    ],
)
def test_mistakes_are_named(flags: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "win-rate", *flags]) == 2
    assert expected in capsys.readouterr().err


def test_systems_are_called_by_their_last_part() -> None:
    given = ("runs/dpo/", "owner/Model2.5-0.5B", "a/answers.v2.jsonl.gz", "old=b/answers.json", "tiny")
    assert list(named_sources(given)) == ["dpo", "Model2.5-0.5B", "answers.v2", "old", "tiny"]


def test_more_mistakes(systems: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["evaluate", "win-rate", "--systems", *systems[:2], "--judge", "rule:length"]
    assert main([*flags, "--temperature", "0.5"]) == 2
    assert "flags of sampling have no effect" in capsys.readouterr().err
    strange = written(tmp_path / "strange.jsonl", [{"prompt": "another", "completion": "x"}])
    assert main([*flags[:3], systems[0], strange, *flags[-2:]]) == 2
    assert "the systems share no prompt" in capsys.readouterr().err
    rows = [{"instruction": "q", "output_1": "a", "generator_1": "m", "output_2": "b", "generator_2": "n"}]
    assert (
        main(["evaluate", "win-rate", "--verdicts", written(tmp_path / "v.jsonl", [rows[0] | {"preference": 3}])]) == 2
    )
    assert "v.jsonl:1: preference: found 3, expected a number from 1 to 2" in capsys.readouterr().err
    assert main(["evaluate", "win-rate", "--verdicts", written(tmp_path / "w.jsonl", rows)]) == 2
    assert "w.jsonl:1: columns: found instruction" in capsys.readouterr().err


def test_agreement_for_people_and_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"prompt": f"p{n}", "chosen": "ab"[n % 2], "rejected": "ba"[n % 2], "annotator": name}
        for n in range(12)
        for name in ("x", "y", "z")
    ]
    rows[0] |= {"chosen": "b", "rejected": "a"}
    source = written(tmp_path / "votes.jsonl", rows)
    assert main(["evaluate", "agreement", "--data", source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["raw"]["value"] == pytest.approx(34 / 36) and found["annotators"]["x"]["value"] == pytest.approx(
        11 / 12
    )
    assert found["transitivity"]["triads"] == 0
    assert main(["evaluate", "agreement", "--data", source]) == 0
    said = capsys.readouterr().out
    assert "Krippendorff's alpha" in said and "nothing can be said" in said
