"""The hook to lm-evaluation-harness: what it is asked, how its results are read, what is said where it is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.cli import main
from trimtab.evals.harness import figures_of

RESULTS = {
    "results": {
        "easy": {"alias": "easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25},
        "group": {"alias": "group", "acc,none": 0.4, "acc_stderr,none": "N/A"},
    },
    "n-samples": {"easy": {"original": 30, "effective": 20}},
}


def test_results_become_estimates() -> None:
    found = figures_of(RESULTS)
    easy = found["easy"]["acc"]
    assert (easy.value, easy.count) == (0.5, 20)
    assert (easy.low, easy.high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-4)
    assert set(found["easy"]) == {"acc", "exact_match,strict"}
    assert found["group"]["acc"].to_dict() == {"value": 0.4, "low": None, "high": None, "count": 0}


def test_the_command_asks_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return RESULTS

    stand_in = ModuleType("lm_eval")
    stand_in.__spec__ = ModuleSpec("lm_eval", None)
    stand_in.simple_evaluate = simple_evaluate  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    assert main(["evaluate", "harness", "--model", "tiny", "--tasks", "easy", "hard", "--limit", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["easy"]["acc"]["value"] == 0.5
    assert asked["model"] == "hf" and asked["tasks"] == ["easy", "hard"] and asked["limit"] == 5
    assert asked["model_args"].startswith("pretrained=") and "tiny" in asked["model_args"]
    assert main(["evaluate", "harness", "--model", "tiny", "--tasks", "easy"]) == 0
    assert "acc" in capsys.readouterr().out
    assert main(["evaluate", "harness", "--model", "tiny", "--tasks", "easy", "--own-tasks", "nowhere"]) == 2
    assert "--own-tasks nowhere: there is no such folder" in capsys.readouterr().err


TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness (extra `eval`) is not installed")
def test_the_real_harness_counts_as_we_do(tmp_path: Path) -> None:
    """On a task from a folder, whose questions `evaluate multiple-choice` reads as well."""
    path, tasks = tmp_path / "questions.jsonl", tmp_path / "tasks"
    words = ["yes", "no", "it may be", "never", "a", "seven"]
    rows = [{"prompt": f"Is it {i}? ", "choices": words[i % 3 : i % 3 + 4], "answer": i % 4} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    (tasks / "ours.yaml").write_text(TASK.format(data=path))

    def said(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "trimtab", "evaluate", *words, "--model", "tiny", "--device", "cpu", "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr[-3000:]
        return json.loads(told.stdout[told.stdout.index("{") :])

    theirs = said("harness", "--tasks", "ours", "--own-tasks", str(tasks))["tasks"]["ours"]["acc"]
    ours = said("multiple-choice", "--data", str(path), "--dtype", "float32")["after"]["accuracy"]
    assert theirs["count"] == ours["count"] == 24
    assert theirs["value"] == pytest.approx(ours["value"])


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_message_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "harness", "--model", "tiny", "--tasks", "easy"]) == 2
    assert "pip install '.[eval]'" in capsys.readouterr().err
