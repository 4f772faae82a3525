"""Reward against KL: which points and lines are drawn, and what a frontier.json must be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.records import evaluation, record
from trimtab.evals.frontier import Bought, Point, frontier, read_frontier
from trimtab.evals.intervals import Estimate, to_json
from trimtab.report.frontiers import Mark, drawn, frontier_figures

NAN = float("nan")


def test_every_evaluation_of_every_run_is_a_point_with_its_interval():
    one = record("one", evals=[evaluation(0, reward=1, kl=0), evaluation(5, reward=2, kl=3)])
    other = record("other", evals=[evaluation(0, reward=0, kl=1)])
    [figure] = frontier_figures([one, other])
    assert figure.title == "Held-out reward against KL"
    by_name = {trace["name"]: trace for trace in figure.traces}
    assert (by_name["one"]["x"], by_name["one"]["y"], by_name["one"]["text"]) == ([0, 3], [1, 2], ["one@0", "one@5"])
    assert by_name["one"]["error_x"]["array"] == by_name["one"]["error_y"]["arrayminus"] == [0.5, 0.5]
    assert [by_name[name]["line"]["color"] for name in ("one", "other")] == ["c1", "c2"]
    assert figure.layout["shapes"] == figure.layout["annotations"] == []


def test_the_budget_is_a_line_at_its_kl():
    run = record("mine", settings={"kl_budget": 12}, evals=[evaluation(0, reward=1, kl=0)])
    [figure] = frontier_figures([run])
    [line], [label] = figure.layout["shapes"], figure.layout["annotations"]
    assert (line["x0"], line["x1"], line["yref"]) == (12.0, 12.0, "paper")
    assert label["text"] == "KL budget of mine"
    [figure] = frontier_figures([record(settings={"kl_budget": None}, evals=run.evals)])
    assert figure.layout["shapes"] == []


def test_other_marks_have_a_place():
    found = frontier("reward", [Point("a", "a@1", 1, Estimate(1, 1, 1, 1), Estimate(2, 2, 2, 1))])
    figure = drawn(found, "", [Mark(4.0, "foreseen peak of the gold reward")], {})
    assert [shape["x0"] for shape in figure.layout["shapes"]] == [4.0]


def test_what_was_measured_differently_shares_no_figure():
    rewarded, judged = ({"step": 1, name: 0.5, "kl": 1.0} for name in ("reward", "win_rate"))
    figures = frontier_figures([record("a", evals=[rewarded]), record("b", evals=[judged])])
    assert [figure.layout["yaxis"]["title"] for figure in figures] == [
        "held-out reward",
        "win rate against the start model",
    ]


def test_without_reward_or_kl_there_is_no_figure():
    rows = [{"step": 0, "reward": 1.0}, {"step": 1, "kl": 1.0}, {"step": 2, "accuracy": 0.5, "kl": None}]
    assert frontier_figures([record(evals=rows), record("dpo", "dpo")]) == []


def measured() -> dict[str, Any]:
    points = [
        Point("mine", "mine@end", None, Estimate(2.0, NAN, NAN, 0), Estimate(1.0, 0.5, 1.5, 8)),
        Point("elsewhere", "elsewhere@3", 3, Estimate(1.0, 0.5, 1.5, 8), Estimate(0.5, 0.0, 1.0, 8)),
    ]
    return to_json(
        frontier("gold", points, [Bought(1, 0.0, Estimate(0.0, -1, 1, 8)), Bought(4, 0.6, Estimate(2, 1, 3, 8))])
    )


def test_a_frontier_survives_its_json():
    found = read_frontier(measured())
    assert [point.name for point in found.points] == ["elsewhere@3", "mine@end"]
    assert found.points[1].step is None and found.points[1].kl.value == 2.0
    assert found.points[1].kl.low != found.points[1].kl.low, "an unknown bound is NaN again"
    assert found.best_of_n[1] == Bought(4, 0.6, Estimate(2, 1, 3, 8)) and found.best == ("elsewhere@3", "mine@end")


def test_a_measured_frontier_comes_first_with_best_of_n():
    run = record("mine", frontier=measured(), evals=[evaluation(0, reward=1, kl=0)])
    first, second = frontier_figures([run])
    assert (first.title, second.title) == ("Gold against KL", "Held-out reward against KL")
    colors = {trace["name"]: trace["line"]["color"] for trace in first.traces}
    assert colors == {"mine": "c1", "elsewhere": "c0", "best of n (KL at most)": "c0"}
    [curve] = [trace for trace in first.traces if trace["name"].startswith("best of n")]
    assert (curve["x"], curve["y"]) == ([0.0, 0.6], [0.0, 2.0])


@pytest.mark.parametrize(
    "broken",
    [
        {"points": []},
        {"points": 3, "best_of_n": [], "measure": "", "best": []},
        {**measured(), "points": [{"run": "a"}]},
        {**measured(), "best_of_n": [{"n": 2, "kl": NAN, "reward": {"value": 1, "low": 1, "high": 1, "count": 1}}]},
        {**measured(), "best_of_n": [{"n": 2, "kl": 10**400, "reward": {}}]},
    ],
)
def test_another_json_is_refused_with_the_name_of_the_run(broken: dict[str, Any]):
    with pytest.raises(ValueError, match=r"frontier\.json of mine: not what `trimtab evaluate frontier --json` prints"):
        frontier_figures([record("mine", frontier=broken)])
