"""What a run achieved and cost, word by word where a word could mislead."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.records import evaluation, record
from trimtab.report.outcome import improved, outcome, paired_gain, prompt_means


def scores(step: int, *prompts: list[float | None], measure: str = "reward") -> dict[str, Any]:
    return {"step": step, "measure": measure, "scores": list(prompts), "lengths": [[1] * len(one) for one in prompts]}


BEFORE, AFTER = evaluation(0, reward=1, kl=0), evaluation(9, reward=2, kl=4)


def test_prompt_means_by_hand():
    row = {"scores": [[1.0, 2.0], [None, 4.0], [None], [], "x", [True]]}
    assert prompt_means(row) == [1.5, 4.0, None, None, None, None]


def test_the_gain_is_paired_by_prompt():
    # Prompts differ by far more than their gains: paired, the interval is narrow.
    rows = [scores(0, [0.0], [10.0], [20.0], [None]), scores(9, [0.75], [11.0], [21.25], [5.0])]
    gain = paired_gain(rows, "reward")
    assert gain is not None and gain.value == 1.0 and 0.6 < gain.low < 1.0 < gain.high < 1.4
    assert paired_gain(rows, "win_rate") is None
    assert paired_gain(rows[:1], "reward") is None
    assert paired_gain([scores(0, [1.0], [None]), scores(9, [2.0], [2.0])], "reward") is None, "one prompt, no interval"
    alike = [scores(0, [0.0], [1.0], [0.0]), scores(9, [0.0], [1.0], [0.0])]
    assert paired_gain(alike, "reward") is None, "three prompts that did not change do not prove that none does"


def test_a_clear_gain_and_its_price():
    evals = [
        evaluation(0, reward=1, kl=0) | {"length": 50, "distinct": 0.8},
        evaluation(9, reward=2, kl=4) | {"length": 60, "distinct": 0.6},
    ]
    metrics = [{"step": step, "entropy": 3.0 - 0.1 * step} for step in range(1, 11)]
    run = record("rloo", evals=evals, metrics=metrics, scores=[scores(0, [1.0], [2.0]), scores(9, [1.9], [3.1])])
    assert outcome(run) == [
        "rloo raised the held-out reward by 1.00 (95% interval +0.86 to +1.14).",
        "The price of rloo: 4.00 nats of KL per answer from its reference (95% interval 3.50 to 4.50), "
        "answers 20% longer, answers 25% less diverse, entropy from 2.90 to 2.00 nats per token.",
    ]


def test_a_gain_whose_interval_holds_zero_is_not_clear():
    [said] = improved(record(evals=[BEFORE, AFTER], scores=[scores(0, [0.0], [1.0]), scores(9, [1.0], [0.5])]))
    assert said.startswith("run: no clear change of the held-out reward (+0.25, 95% interval") and "holds zero" in said


def test_without_scores_of_answers_the_means_are_told():
    assert improved(record("old", evals=[BEFORE, AFTER])) == [
        "Held-out reward of old went from 1.00 to 2.00 (95% interval 1.50 to 2.50)."
    ]


def test_the_mean_score_of_a_reward_model_says_nothing():
    rows = [{"step": 0, "reward": 0.1, "kl": 0.0}, {"step": 9, "reward": 3.0, "kl": 0.0}]
    assert outcome(record("rm", "reward", evals=rows)) == []


@pytest.mark.parametrize(
    ("name", "low", "high", "said"),
    [
        ("accuracy", 0.51, 0.7, "better than a coin"),
        ("accuracy", 0.5, 0.7, "not clearly better than a coin"),
        ("accuracy", 0.3, 0.49, "worse than a coin"),
        ("win_rate", 0.55, 0.7, "better than the start model"),
    ],
)
def test_shares_are_held_against_one_half(name: str, low: float, high: float, said: str):
    row = {"step": 9, name: 0.6, f"{name}_low": low, f"{name}_high": high}
    [sentence] = improved(record("dpo", "dpo", evals=[{"step": 0, name: 0.1}, row]))
    assert sentence.startswith(f"Held-out {name.replace('_', ' ')} of dpo is 0.60 (95% interval")
    assert sentence.endswith(f"), {said}.")


def test_a_share_without_an_interval_is_held_against_nothing():
    assert improved(record("dpo", "dpo", evals=[{"step": 0, "accuracy": 0.6}])) == ["Held-out accuracy of dpo is 0.60."]


def test_the_loss_speaks_where_nothing_else_does():
    rows = [{"step": 0, "loss": 2.5}, {"step": 9, "loss": 1.25}]
    assert outcome(record("sft", "sft", evals=rows)) == [
        "Held-out loss of sft fell from 2.50 to 1.25, without an interval."
    ]
    assert outcome(record("sft", "sft", evals=rows[:1])) == outcome(record("sft", "sft")) == []
    assert "loss" not in improved(record("dpo", "dpo", evals=[{**row, "accuracy": 0.5} for row in rows]))[0]


@pytest.mark.parametrize("kl", [None, 4.0])
def test_what_was_not_measured_has_no_price(kl: float | None):
    told = outcome(record(evals=[{"step": 9, "accuracy": 0.6, "kl": kl}]))
    assert len(told) == 1, "a KL beside an accuracy is an estimate of KTO's, no distance that was bought with"


def test_capability_kept_or_lost():
    def told(value: float, low: float, high: float) -> dict[str, Any]:
        return {
            "data": "some/folder/mmlu.jsonl",
            "before": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
            "after": {"accuracy": {"value": 0.5 + value, "low": 0.3, "high": 0.6}},
            "change": {"difference": {"value": value, "low": low, "high": high}},
        }

    assert outcome(record("dpo", "dpo", multiple_choice=told(-0.1, -0.15, -0.05))) == [
        "dpo lowered the accuracy on mmlu.jsonl by 0.10 (95% interval −0.15 to −0.05), from 0.50 to 0.40."
    ]
    [kept] = outcome(record("dpo", "dpo", multiple_choice=told(-0.01, -0.05, 0.03)))
    assert kept.startswith("dpo: no clear change of the accuracy on mmlu.jsonl (−0.01,")


@pytest.mark.parametrize(
    "told", [{}, {"after": {"accuracy": 3}, "before": None, "change": None}, {"change": {"difference": "x"}}]
)
def test_a_multiple_choice_without_before_says_nothing(told: dict[str, Any]):
    assert outcome(record(multiple_choice=told)) == []


@pytest.mark.parametrize("told", [{"before": 3}, {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.6}}])
def test_a_multiple_choice_that_cannot_be_read_is_named(told: dict[str, Any]):
    with pytest.raises(ValueError, match=r"multiple-choice\.json of .*: not what"):
        outcome(record(multiple_choice=told))
