"""Each sign of trouble is seen where it is, and nowhere on a healthy rollout."""

from dataclasses import replace

import pytest
import torch

from trimtab.batches import Mean, Rollouts
from trimtab.health import ADVICE, Health, signs, sinking
from trimtab.recipes.training import Items, held_out
from trimtab.tokens import Row, pad

ROWS = [[1, 2, 3, 4, 5, 9], [2, 2, 3, 1, 9], [4, 9], [5, 5, 9], [1, 2, 1, 2, 1, 9], [6, 9], [7, 8, 6, 5, 4], [3, 2, 9]]
TEXTS = [" ".join(map(str, row)) for row in ROWS]


def rollouts(rows: list[list[int]] = ROWS, *, kl: float = 0.5, group_size: int = 2) -> Rollouts:
    """Answers after a prompt of one token; every answer is `kl` nats from the reference, and every score another."""
    tokens = pad([Row([0, *row], [False, *(True for _ in row)]) for row in rows], 0)
    lengths = tokens.response_mask.sum(-1, keepdim=True)
    nothing = torch.zeros(tokens.ids.shape)
    return Rollouts(
        tokens=tokens,
        sampled_logprobs=nothing,
        logprobs=nothing,
        ref_logprobs=torch.where(tokens.response_mask, -kl / lengths, 0),
        kl=nothing,
        scores=torch.arange(len(rows)).float(),
        baseline=torch.zeros(len(rows)),
        valid=torch.ones(len(rows), dtype=torch.bool),
        finished=torch.tensor([row[-1] == 9 for row in rows]),
        group_size=group_size,
    )


def test_a_healthy_rollout_gives_no_sign() -> None:
    health = Health()
    for kl in (0.0, 0.5, 1.5, 1.9, 3.0, 2.0, -0.5, 1.0):
        assert health.look(rollouts(kl=kl), TEXTS) == []
    assert health.seen == {}


def without_spread() -> Rollouts:
    given = rollouts()
    return replace(given, scores=torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 5]))


def flat_but_for_what_has_no_score() -> Rollouts:
    """Groups of three whose scored answers are alike; the third has no score, and 0 in its place."""
    given = replace(rollouts(ROWS[:6], group_size=3), scores=torch.tensor([1.0, 1, 0, 2, 2, 0]))
    return replace(given, valid=torch.tensor([True, True, False] * 2))


SIGNS = {
    "cut": (rollouts([row[:-1] for row in ROWS[:5]] + ROWS[5:]), TEXTS, "6 of 8 answers were cut"),
    "no_spread": (without_spread(), TEXTS, "in 3 of 4 groups all answers have the same reward"),
    "empty": (rollouts(), ["", " ", "\n", ""] * 2, "all 8 answers are empty"),
    "identical": (rollouts(), ["same"] * 8, "all 8 answers are the same text"),
    "unscored": (
        replace(rollouts(), valid=torch.zeros(8, dtype=torch.bool)),
        TEXTS,
        "none of 8 answers has a score",
    ),
    "one_token": (rollouts([[5, 5, 5, 5, 9]] * 5 + ROWS[:3]), TEXTS, "5 of 8 answers repeat one token"),
}


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_told_once_counted_always_and_comes_alone(name: str) -> None:
    given, texts, told = SIGNS[name]
    health = Health()
    [warning] = health.look(given, texts)
    assert told in warning and ADVICE[name] in warning
    assert health.look(given, texts) == [] and health.seen == {name: 2}


def test_every_sign_has_its_advice_and_names_a_knob() -> None:
    assert set(ADVICE) == {*SIGNS, "kl_runs_away"}
    assert all("--" in text or "reward" in text for text in ADVICE.values())


def test_answers_without_a_score_do_not_count_as_spread() -> None:
    given = flat_but_for_what_has_no_score()
    assert "in 2 of 2 groups" in signs(given, TEXTS[:6])["no_spread"]
    one_each = replace(given, valid=torch.tensor([True, False, False] * 2))
    assert "no_spread" not in signs(one_each, TEXTS[:6])


def test_half_of_the_answers_is_not_most_of_them() -> None:
    half = rollouts([row[:-1] for row in ROWS[:3]] + ROWS[3:])
    assert int((~half.finished).sum()) == 4 and signs(half, TEXTS) == {}


def test_short_answers_may_be_one_token() -> None:
    assert signs(rollouts([[5, 5, 9]] * 8), TEXTS) == {}


def test_a_jump_of_kl_is_a_sign_and_a_climb_is_none() -> None:
    climbing = Health()
    for step in range(40):
        assert climbing.look(rollouts(kl=0.3 * step), TEXTS) == []
    jumping = Health()
    for kl in (0.8, 1.0, 1.3):
        assert jumping.look(rollouts(kl=kl), TEXTS) == []
    [warning] = jumping.look(rollouts(kl=9.0), TEXTS)
    assert "KL jumped from about 1.1 to 9.0 nats" in warning and jumping.seen == {"kl_runs_away": 1}


def test_chosen_and_rejected_answers_that_both_sink_are_told() -> None:
    first = {"loss": 0.7, "chosen_logprob": -40.0, "rejected_logprob": -50.0}
    assert sinking(first, first) is None
    assert sinking(first, {"chosen_logprob": -39.0, "rejected_logprob": -90.0}) is None
    assert sinking(first, {"chosen_logprob": -41.5, "rejected_logprob": -90.0}) is None, "within 5 %"
    told = sinking(first, {"chosen_logprob": -60.0, "rejected_logprob": -90.0})
    assert told and "-40.0 to -60.0" in told and "-50.0 to -90.0" in told and "--lr" in told
    assert sinking({"loss": 1.0}, {"loss": 0.5}) is None


def test_an_evaluation_tells_once_that_both_sink(capsys: pytest.CaptureFixture[str]) -> None:
    courses = iter([(-40.0, -50.0), (-50.0, -90.0), (-60.0, -99.0)])

    class Scripted:
        def evaluate(self, batches: list) -> tuple[Mean, dict[str, Mean]]:
            chosen, rejected = (Mean.of(torch.tensor(value)) for value in next(courses))
            return Mean.of(torch.tensor(0.5)), {"chosen_logprob": chosen, "rejected_logprob": rejected}

    evaluate = held_out(Scripted(), Items([], lambda items, pad_id: None, 0), 4)  # pyright: ignore[reportArgumentType]
    assert evaluate is not None
    told = [(evaluate(step), " ".join(capsys.readouterr().err.split()))[1] for step in range(3)]
    assert ["both became less likely" in text for text in told] == [False, True, False]
