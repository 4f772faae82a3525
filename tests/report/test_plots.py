"""Plots of evaluations: what is drawn, and that a page needs nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.calibration import calibration
from trimtab.evals.frontier import Bought, Point, frontier
from trimtab.evals.intervals import Estimate
from trimtab.report.plots import frontier_plot, reliability_plot


def test_reliability_is_accuracy_against_confidence() -> None:
    found = calibration([2.0, 2.0, -0.1, 0.1], bins=2)
    measured, diagonal = reliability_plot("R", found)["data"]
    assert measured["x"] == [one.confidence for one in found.bins]
    assert measured["y"] == [0.5, 1.0] and measured["text"] == ["2 pairs", "2 pairs"]
    assert measured["error_y"]["arrayminus"][1] == pytest.approx(1 - found.bins[1].accuracy.low)
    assert diagonal["x"] == diagonal["y"]


def test_runs_are_joined_in_the_order_of_their_steps() -> None:
    nan = float("nan")
    points = [
        Point("a", "a@end", None, Estimate(1.0, nan, nan, 0), Estimate(3.0, 2.0, 5.0, 1)),
        Point("a", "a@5", 5, Estimate(2.0, 1.5, 2.5, 1), Estimate(2.0, 1.0, 3.0, 1)),
        Point("b", "b@5", 5, Estimate(0.5, 0.5, 0.5, 1), Estimate(1.0, 1.0, 1.0, 1)),
    ]
    plot = frontier_plot(frontier("reward", points, [Bought(2, 0.19, Estimate(1.5, 1.0, 2.0, 3))]))
    by_name = {trace["name"]: trace for trace in plot["data"]}
    assert by_name["a"]["text"] == ["a@5", "a@end"] and by_name["a"]["x"] == [2.0, 1.0]
    assert by_name["a"]["error_y"]["array"] == [1.0, 2.0] and by_name["a"]["error_x"]["array"] == [0.5, 0.0]
    assert by_name["best of n (KL at most)"]["x"] == [0.19]


def test_the_page_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "pairs.jsonl", tmp_path / "page.html"
    rows = [{"prompt": "?", "chosen": "a" * i, "rejected": "b" * (i % 3 + 1)} for i in range(1, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["evaluate", "reward", "--reward", "length", "--data", str(data)]
    assert main([*flags, "--plot", str(page)]) == 0
    written = page.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in written and not re.search(r"<(script|link)[^>]+(src|href)=.http", written)
    assert main([*flags, "--plot", str(tmp_path / "page.txt")]) == 2
    assert "ends with .html" in capsys.readouterr().err
    assert main([*flags, "--plot", str(page), "--benchmark", "rewardbench"]) == 2
