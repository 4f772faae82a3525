"""Which run belongs to which stage, and what is drawn there."""

import pytest

from tests.report.records import evaluation, record
from trimtab.cli import COMMANDS
from trimtab.report.stages import STAGES, fill, stages

IMITATE, PREFER, STEER = STAGES


@pytest.mark.parametrize(
    ("command", "stage"),
    [("sft", 0), ("reward", 1), *((name, 2) for name in ("rl", "dpo", "kto", "online-dpo", "raft"))],
)
def test_a_command_has_one_stage(command: str, stage: int):
    filled = stages([record("mine", command)], {})
    assert [one.names for one in filled] == [["mine"] if place == stage else [] for place in range(3)]


def test_every_command_that_trains_has_a_stage():
    training = {name for name, command in COMMANDS.items() if command.on_many} - {"evaluate drift"}
    staged = {name for stage in STAGES for name in stage.commands}
    aliases = {name for name, command in COMMANDS.items() if command.preset}
    assert training - aliases <= staged <= set(COMMANDS)


def test_a_run_of_another_command_is_nowhere():
    assert not any(one.names or one.figures for one in stages([record("x", "quickstart"), record("y", "")], {}))


def test_curves_are_those_of_the_stage_in_the_colours_of_the_runs():
    first = record("first", "dpo", evals=[{"step": 0, "accuracy": 0.5, "loss": 0.7}])
    second = record(
        "second", "rl", metrics=[{"step": 1, "reward": 2.0, "kl": 0.5}], evals=[evaluation(1, reward=3, kl=1)]
    )
    filled = fill(STEER, [first, record("other", "sft"), second])
    assert filled.names == ["first", "second"]
    assert [figure.title for figure in filled.figures] == ["Reward", "Accuracy", "KL"]
    reward, accuracy, _ = filled.figures
    assert [(one["name"], one["y"], one["line"]["color"]) for one in reward.traces] == [
        ("second", [2.0], "c3"),
        ("second, held out", [3.0], "c3"),
    ]
    assert [(one["name"], one["line"]["color"]) for one in accuracy.traces] == [("first, held out", "c1")]


def test_a_curve_says_whose_it_is_where_a_stage_has_several_runs():
    drawn = record("drawn", "rl", metrics=[{"step": 1, "reward": 2.0}])
    assert all("showlegend" not in figure.layout for figure in fill(STEER, [drawn]).figures)
    assert [figure.layout["showlegend"] for figure in fill(STEER, [drawn, record("other", "dpo")]).figures] == [True]


def test_a_stage_without_numbers_has_its_runs_and_no_curve():
    filled = fill(IMITATE, [record("mine", "sft", metrics=[{"step": 1, "loss": None}])])
    assert filled.names == ["mine"] and filled.figures == []


def test_best_of_n_is_known_from_the_summary():
    summary = {"methods": [{"method": "start"}, {"method": "best-of-16"}]}
    assert [one.names for one in stages([], summary)] == [[], [], ["Best-of-16"]]
