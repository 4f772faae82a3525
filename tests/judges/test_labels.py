"""People's saved labels as a judge."""

import json
from pathlib import Path

import pytest

from trimtab.judges import parse_judge
from trimtab.records import Answer, Comparison, Prompt

ROWS = [
    {"prompt": "colour?", "chosen": "red", "rejected": "blue", "annotator": "a"},
    {"prompt": "colour?", "chosen": "blue", "rejected": "red", "annotator": "b", "weight": 3},
    {"prompt": "colour?", "chosen": "red", "rejected": "green", "confidence": 0.8},
    {"prompt": "other?", "output_1": "x", "output_2": "y", "label": 0},
    {"prompt": "other?", "output_1": "x", "output_2": "z", "label": 2},
]


def asked(prompt: str, first: str, second: str) -> Comparison:
    return Comparison(Prompt.from_text(prompt), Answer(first), Answer(second))


def test_labels_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    judge = parse_judge(f"labels:{path}")
    comparisons = [
        asked("colour?", "red", "blue"),
        asked("colour?", "blue", "red"),
        asked("colour?", "red", "green"),
        asked("other?", "y", "x"),
        asked("other?", "x", "z"),
        asked("other?", "red", "blue"),
        asked("colour?", "red", "pink"),
    ]
    assert judge(comparisons) == pytest.approx([0.25, 0.75, 0.8, 0.5, 0.0, None, None])
    assert judge.name == f"labels:{path}"
