"""The hook to lm-evaluation-harness: what it is asked, how its results are read, what is said where it is absent."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
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


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_message_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "harness", "--model", "tiny", "--tasks", "easy"]) == 2
    assert "pip install 'trimtab[eval]'" in capsys.readouterr().err
