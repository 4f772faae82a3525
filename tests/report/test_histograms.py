"""Histograms of rewards: bins, thirds and where the answers come from, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.report.records import record
from trimtab.report.histograms import (
    Compared,
    Scored,
    answers_of,
    before_and_after,
    bin_edges,
    histogram_figures,
    of_methods,
    shares,
    thirds,
)


def test_bins_reach_from_the_least_to_the_greatest():
    assert bin_edges([3.0, -1.0, 1.0], bins=4) == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert bin_edges([2.0, 2.0], bins=2) == [1.25, 1.75, 2.25]
    assert shares([2.0, 2.0], bin_edges([2.0, 2.0], bins=2)) == [0.0, 1.0]


def test_shares_by_hand():
    # 0 and 0.5 in the first bin, 1 on the edge in the second, 3 and the last edge in the last.
    assert shares([0.0, 0.5, 1.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0]) == [0.4, 0.2, 0.0, 0.4]


@pytest.mark.parametrize(
    ("lengths", "ends"), [([1, 2, 3, 4, 5, 6], (2, 4)), ([7, 7, 7], (7, 7)), ([3, 1, 2, 9], (2, 3)), ([5], (5, 5))]
)
def test_thirds_by_hand(lengths: list[float], ends: tuple[float, float]):
    (_, first), (again, second), (last, _) = thirds(lengths)
    assert (first, second) == ends == (again, last)


def compared(**answers: Sequence[tuple[float, float]]) -> Compared:
    found = {name: [Scored(*one) for one in some] for name, some in answers.items()}
    return Compared("reward", "tokens", found, dict.fromkeys(found, "c1"))


def test_each_third_has_its_own_answers():
    before = [(0.0, length) for length in range(1, 10)]
    after = [(1.0 if length > 6 else 0.0, length) for length in range(1, 10)]
    everything, short, middle, long = histogram_figures(compared(before=before, after=after))
    assert [figure.note for figure in (short, middle, long)] == [
        "short answers, up to 3 tokens",
        "middle answers, more than 3, up to 6 tokens",
        "long answers, more than 6 tokens",
    ]
    heights = {trace["name"]: trace["y"] for trace in long.traces}
    assert heights["before (3)"][1] == 1.0 and heights["after (3)"][-2] == 1.0, "the reward rose among long answers"
    assert [trace["y"] for trace in short.traces] == [[0.0, 1.0] + [0.0] * 16] * 2, "and nowhere else"
    assert everything.traces[1]["y"][1] == pytest.approx(6 / 9)
    assert sum(everything.traces[1]["y"]) == pytest.approx(1)


def test_an_outline_steps_at_the_edges_and_ends_at_zero():
    figure = histogram_figures(compared(a=[(float(i), 1.0) for i in range(17)]))[0]
    [trace] = figure.traces
    assert trace["x"] == [i - 0.5 for i in range(18)] and (trace["y"][0], trace["y"][-1]) == (0, 0)
    assert trace["line"]["shape"] == "hvh"


def test_answers_of_one_length_have_no_thirds():
    figures = histogram_figures(compared(before=[(0.0, 8.0)] * 6, after=[(1.0, 8.0)] * 6))
    assert [figure.note for figure in figures] == ["all answers"]


def test_a_third_without_answers_is_left_out():
    lengths = [1.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    figures = histogram_figures(compared(before=[(0.0, one) for one in lengths], after=[(1.0, 9.0)] * 6))
    notes = [figure.note for figure in figures]
    assert notes == ["all answers", "short answers, up to 8 tokens", "middle answers, more than 8, up to 9 tokens"]


def test_few_answers_are_no_histogram():
    assert histogram_figures(None) == []
    assert histogram_figures(compared(before=[(0.0, 1.0)] * 5, after=[(0.0, 1.0)] * 50)) == []


def scores(step: int, *prompts: list[float | None]) -> dict[str, Any]:
    lengths = [[10 * (i + 1) for i, _ in enumerate(prompt)] for prompt in prompts]
    return {"step": step, "measure": "win_rate", "scores": list(prompts), "lengths": lengths}


def test_the_first_and_the_last_evaluation_are_compared():
    rows = [scores(0, [1.0, None], [2.0, 3.0]), scores(5, [9.0]), scores(10, [4.0, 5.0])]
    found = before_and_after(record(scores=rows))
    assert found is not None and (found.measure, found.unit) == ("win rate", "tokens")
    assert found.answers == {
        "before, step 0": [(1.0, 10), (2.0, 10), (3.0, 20)],
        "after, step 10": [(4.0, 10), (5.0, 20)],
    }


def test_samples_with_rewards_serve_where_no_scores_are():
    said = [("short", 0, 1.0), ("longer", 0, None), ("text", 4, 2.0), ("more text", 4, 3.0)]
    samples = [{"step": step, "prompt": "?", "response": text, "reward": reward} for text, step, reward in said]
    found = before_and_after(record(samples=samples))
    assert found is not None and found.unit == "characters"
    assert found.answers == {"before, step 0": [(1.0, 5)], "after, step 4": [(2.0, 4), (3.0, 9)]}


@pytest.mark.parametrize("rows", [[], [scores(0, [1.0])], [scores(0, [None]), scores(1, [1.0])]])
def test_one_evaluation_is_no_comparison(rows: list[dict[str, Any]]):
    assert before_and_after(record(scores=rows)) is None


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"scores": 3, "lengths": 4},
        {"scores": ["x"], "lengths": [[1]]},
        {"scores": [["a", True]], "lengths": [[1, 2]]},
    ],
)
def test_what_is_no_number_is_no_answer(row: dict[str, Any]):
    assert answers_of(row) == []


def test_methods_of_a_summary_are_compared_by_their_texts():
    answers = {"start": {"text": "ab", "gold": 0.1}, "dpo": {"text": "abcd", "gold": 0.5}, "rloo": {"text": "x"}}
    found = of_methods({"texts": [{"prompt": "?", "answers": answers}]})
    assert found is not None and found.measure == "gold reward"
    assert found.answers == {"Start model": [(0.1, 2)], "DPO": [(0.5, 4)]}
    assert of_methods({"texts": [{"prompt": "?", "answers": {"dpo": answers["dpo"]}}]}) is None
    assert of_methods({}) is None
