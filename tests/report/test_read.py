"""What a run directory may lack, and what must be whole in it."""

import json
from pathlib import Path

import pytest

from trimtab.report import read_run, write_report
from trimtab.report.read import DEEPEST, labelled, measured, read_runs, runs_in

NEEDED = {"config.yaml": "command: dpo\nlr: 0.1\n", "environment.json": "{}", "metrics.jsonl": ""}


def write_run(directory: Path, **more: str) -> Path:
    directory.mkdir(parents=True)
    for name, text in {**NEEDED, **more}.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_three_files_are_a_run(tmp_path: Path):
    run = read_run(write_run(tmp_path / "mine"))
    assert (run.name, run.command, run.settings["lr"]) == ("mine", "dpo", 0.1)
    assert not any((run.evals, run.samples, run.rollouts, run.scores, run.data, run.frontier, run.multiple_choice))


def test_what_is_there_is_read(tmp_path: Path):
    files = {"scores.jsonl": '{"step": 0}\n', "rollouts.jsonl": '{"rollout": 1}\n', "data.json": '{"train": {}}'}
    files |= {"frontier.json": '{"points": []}', "multiple-choice.json": '{"data": "x"}'}
    run = read_run(write_run(tmp_path / "mine", **files))
    assert (len(run.scores), len(run.rollouts), run.data) == (1, 1, {"train": {}})
    assert (run.frontier, run.multiple_choice) == ({"points": []}, {"data": "x"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "just words\n"),
        ("config.yaml", ""),
        ("data.json", "[1]"),
        ("scores.jsonl", '{"step": 0}\n{"st'),
        ("frontier.json", "{"),
        ("multiple-choice.json", "null"),
    ],
)
def test_a_broken_file_is_one_error_that_names_it(tmp_path: Path, name: str, content: str):
    with pytest.raises(ValueError, match=name):
        read_run(write_run(tmp_path / "run", **{name: content}))


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ({"methods": 3}, "methods: expected a list of objects, each with the name of its method"),
        ({"methods": [{"method": 3}]}, "methods: expected"),
        ({"frontier": [{"kl": 1, "gold": 1}]}, "frontier: expected"),
        ({"texts": [{"prompt": "p", "answers": {"start": {"gold": 1}}}]}, "texts: expected"),
        ({"texts": [{"prompt": "p"}]}, "texts: expected"),
        ({"commands": 4}, "commands: expected a list of texts"),
        ({"notes": [4]}, "notes: expected a list of texts"),
        ({"notes": "words"}, "notes: expected a list of texts"),
        ({"reward_model": [0.5]}, "reward_model: expected an object"),
    ],
)
def test_a_summary_that_is_none_is_one_error_that_names_it(tmp_path: Path, summary: dict[str, object], told: str):
    run = write_run(tmp_path / "run", **{"summary.json": json.dumps(summary)})
    with pytest.raises(ValueError, match=rf"summary\.json: {told}"):
        write_report([run], tmp_path / "page.html")


def test_what_a_summary_lacks_is_left_out(tmp_path: Path):
    said = {"model": "mine", "methods": [{"method": "start", "kl": "x"}], "reward_model": None, "texts": []}
    run = write_run(tmp_path / "run", **{"summary.json": json.dumps(said)})
    assert "Steering mine" in write_report([run], tmp_path / "page.html").read_text()


def test_rows_without_a_step_and_numbers_that_are_none_are_left_out():
    rows = json.loads(
        '[{"loss": 1}, {"step": "one", "loss": 1}, {"step": true}, {"step": 2, "loss": NaN, "kl": 1e999}]'
    )
    assert measured([*rows, {"step": 3, "loss": 10**400, "accuracy": 0.5, "note": "x"}]) == [
        {"step": 2.0, "loss": None, "kl": None},
        {"step": 3.0, "loss": None, "accuracy": 0.5, "note": "x"},
    ]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path):
    paths = [write_run(tmp_path / folder / name) for folder, name in (("a", "dpo"), ("b", "dpo"), ("b", "sft"))]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "sft"]
    assert labelled([str(paths[2])]) == {"sft": paths[2]}


def test_links_in_a_circle_are_passed_by(tmp_path: Path):
    run = write_run(tmp_path / "all" / "run")
    (tmp_path / "all" / "config.yaml").write_text("command: quickstart\n")
    (tmp_path / "all" / "latest").symlink_to(".")
    (tmp_path / "all" / "again").symlink_to(tmp_path / "all")
    assert runs_in(tmp_path / "all") == [run]


def test_runs_that_are_too_deep_are_told(tmp_path: Path):
    folder = tmp_path
    for _ in range(DEEPEST + 1):
        folder = folder / "a"
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="directories deep"):
        runs_in(tmp_path)
    assert runs_in(tmp_path / "a" / "a") == [folder]


def test_null_in_a_summary_is_nothing(tmp_path: Path):
    write_run(tmp_path / "all" / "run")
    parts = ("methods", "frontier", "texts", "notes", "commands", "reward_model", "model")
    (tmp_path / "all" / "summary.json").write_text(json.dumps(dict.fromkeys(parts)))
    assert write_report([tmp_path / "all"], tmp_path / "report.html").exists()
