"""Whatever the files of a run hold, if they can be read, the report is made or one ValueError says why."""

import json
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.report import read_run
from trimtab.report.alarms import alarms
from trimtab.report.data_facts import data_table
from trimtab.report.figures import run_figures
from trimtab.report.frontiers import frontier_figures
from trimtab.report.histograms import before_and_after, histogram_figures
from trimtab.report.outcome import outcome
from trimtab.report.stages import stages

SCALAR = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=6)
VALUE = st.recursive(
    SCALAR, lambda i: st.lists(i, max_size=3) | st.dictionaries(st.text(max_size=5), i, max_size=3), max_leaves=4
)
NUMBER = st.integers(-5, 5) | st.sampled_from([0.5, float("nan"), float("inf"), 10**400])
STEPS = {"step": st.integers(0, 4)}


def rows(*names: str) -> st.SearchStrategy[str]:
    """Rows in which most of what the report reads is a number."""
    optional = dict.fromkeys(names, NUMBER | NUMBER | VALUE)
    row = st.fixed_dictionaries(STEPS, optional=optional) | st.dictionaries(st.sampled_from(names), VALUE, max_size=3)
    return st.lists(row, max_size=8).map(lambda found: "".join(json.dumps(one) + "\n" for one in found))


def objects(*names: str) -> st.SearchStrategy[str]:
    """Objects in objects under the names that the report asks for."""
    inside = st.dictionaries(st.sampled_from(names), VALUE, max_size=3)
    return st.dictionaries(st.sampled_from(names), VALUE | inside, max_size=3).map(json.dumps)


FIGURES = ("reward", "reward_low", "reward_high", "kl", "loss", "accuracy", "length", "distinct", "entropy", "skipped")
LISTS = st.lists(st.lists(NUMBER | st.none(), max_size=3) | VALUE, max_size=4)
SCORES = st.fixed_dictionaries(STEPS, optional={"measure": st.just("reward"), "scores": LISTS, "lengths": LISTS})
FILES = {
    "config.yaml": st.dictionaries(
        st.sampled_from(["command", "kl_budget", "x"]), st.sampled_from(["rl", "dpo", 3, None])
    ).map(yaml.safe_dump),
    "environment.json": st.just("{}"),
    "metrics.jsonl": rows(*FIGURES),
    "evals.jsonl": rows(*FIGURES, "chosen_logprob", "rejected_logprob", "win_rate", "kl_low", "kl_high"),
    "samples.jsonl": rows("reward", "prompt", "response"),
    "rollouts.jsonl": rows("kl", "health"),
    "scores.jsonl": st.lists(SCORES, max_size=4).map(lambda found: "".join(json.dumps(one) + "\n" for one in found)),
    "data.json": objects("train", "eval", "facts", "shared_rows", "lengths", "kind"),
    "frontier.json": st.just("{}") | objects("points", "best_of_n", "measure", "best"),
    "multiple-choice.json": objects("before", "after", "change", "difference", "accuracy", "data"),
}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.fixed_dictionaries(FILES))
def test_any_run(tmp_path: Path, files: dict[str, str]):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    run = read_run(tmp_path)
    said = alarms(run)
    try:
        said += outcome(run)
    except ValueError as error:
        assert "multiple-choice.json" in str(error)
    assert all(isinstance(sentence, str) for sentence in said)
    table = data_table(run)
    assert table is None or all(len(cells) == len(table.parts) for _, cells in table.rows)
    figures = [*run_figures(run), *histogram_figures(before_and_after(run))]
    figures += [figure for filled in stages([run], {}) for figure in filled.figures]
    try:
        figures += frontier_figures([run])
    except ValueError as error:
        assert "frontier.json" in str(error)
    drawn = json.dumps([figure.traces for figure in figures])
    assert "NaN" not in drawn and "Infinity" not in drawn
