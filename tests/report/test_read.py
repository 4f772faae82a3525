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


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ({"methods": 7}, "methods must be a list"),
        ({"methods": [{"gold": 1.0}]}, "entry 1 of methods"),
        ({"frontier": [{"method": "dpo"}, {"method": ["dpo"]}]}, "entry 2 of frontier"),
        ({"texts": [{"prompt": "Hi", "answers": {"dpo": {"gold": 1}}}]}, "entry 1 of texts"),
        ({"texts": [{"prompt": 3, "answers": {}}]}, "texts of the summary, row 1: its prompt"),
        ({"notes": "words"}, "notes must be a list"),
        ({"commands": True}, "commands must be a list"),
        ({"reward_model": [0.5]}, "reward_model must be an object"),
    ],
)
def test_a_summary_of_another_kind_is_one_error(tmp_path: Path, summary: dict[str, object], told: str):
    write_run(tmp_path / "all" / "run")
    (tmp_path / "all" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=told):
        write_report([tmp_path / "all"], tmp_path / "report.html")


def test_null_in_a_summary_is_nothing(tmp_path: Path):
    write_run(tmp_path / "all" / "run")
    parts = ("methods", "frontier", "texts", "notes", "commands", "reward_model", "model")
    (tmp_path / "all" / "summary.json").write_text(json.dumps(dict.fromkeys(parts)))
    assert write_report([tmp_path / "all"], tmp_path / "report.html").exists()
