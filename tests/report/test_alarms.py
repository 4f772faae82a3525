"""Which alarms fire: each where its sign is, and none on a healthy run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.records import record
from trimtab.health import ADVICE, SIGNS
from trimtab.report.alarms import alarms, looked_at


def logprobs(step: int, chosen: float, rejected: float) -> dict[str, float]:
    return {"step": step, "chosen_logprob": chosen, "rejected_logprob": rejected}


def test_every_sign_has_words():
    assert SIGNS.keys() == ADVICE.keys()


def test_a_healthy_run_is_silent():
    healthy = record(
        settings={"kl_budget": 10},
        metrics=[{"step": 1, "loss": 1.0}],
        evals=[logprobs(0, -50, -60), logprobs(9, -40, -90)],
        rollouts=[{"rollout": 1, "kl": 7.9, "health": {}}],
        data={"eval": {"facts": {"records": 3, "shared_rows": {"count": 0, "examples": []}}}},
    )
    assert alarms(healthy) == []
    assert looked_at([healthy, healthy]) == "2 steps, 4 evaluations, 2 rollouts"


def test_signs_are_told_with_how_often_they_were_seen():
    rows = [{"health": {}}, {"health": {"cut": 1}}, {"health": {"cut": 2, "kl_runs_away": 1}}]
    assert alarms(record("rloo", rollouts=rows)) == [
        "rloo: most answers were cut at the length limit, in 2 of 3 rollouts.",
        "rloo: KL jumped to several times what it was, in 1 of 3 rollouts.",
    ]


def test_sunk_log_probabilities_are_told_once_with_their_step():
    rows = [logprobs(0, -50, -60), logprobs(5, -60, -80), logprobs(10, -70, -90)]
    assert alarms(record("dpo", "dpo", evals=rows)) == [
        "dpo: by step 5, chosen and rejected answers both became less likely (from −50.0 to −60.0 and from −60.0 to "
        "−80.0 nats an answer): probability went to answers that nobody compared."
    ]


def test_skipped_steps_are_counted():
    rows = [{"step": 1}, {"step": 2, "skipped": 1}, {"step": 3, "skipped": 2}]
    assert alarms(record("sft", "sft", metrics=rows)) == [
        "sft: steps skipped because their loss or gradient was not finite: 2."
    ]


@pytest.mark.parametrize(("kl", "said"), [(7.9, None), (8.0, "is nearly spent"), (10.0, "is spent"), (None, None)])
def test_the_budget(kl: float | None, said: str | None):
    told = alarms(record(settings={"kl_budget": 10}, rollouts=[{"kl": kl}, {"kl": 1.0}]))
    assert told == ([] if said is None else [f"run: KL reached {kl:.1f} nats an answer, and the budget of 10 {said}."])


def test_held_out_rows_that_were_trained_on():
    data = {"eval": {"facts": {"records": 1200, "shared_rows": {"count": 3, "examples": []}}}}
    [told] = alarms(record("dpo", "dpo", data=data))
    assert told == "dpo: 3 of 1,200 held-out rows are in the training data as well."


@pytest.mark.parametrize(
    "parts",
    [
        {"rollouts": [{"health": "cut"}, {"health": {"cut": "often", "<b>": 3, "empty": True}}]},
        {"rollouts": [{"kl": "x"}], "settings": {"kl_budget": "much"}},
        {
            "metrics": [{"step": 1, "skipped": "x"}],
            "evals": [{"step": 0, "chosen_logprob": None, "rejected_logprob": 1}],
        },
        {"data": {"eval": [1]}},
        {"data": {"eval": {"facts": {"shared_rows": 3}}}},
    ],
)
def test_what_nobody_wrote_so_is_no_alarm(parts: dict[str, Any]):
    assert alarms(record(**parts)) == []
