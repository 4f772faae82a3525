"""Weighted sums and ensembles, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.records import Answer, Prompt
from trimtab.rewards import RuleReward, ensemble, mixture
from trimtab.rewards.mixtures import mean, uwo, weighted_sum, worst

PROMPT = Prompt.from_text("?", source="rows.jsonl:2")
LETTERS = RuleReward("letters", lambda prompt, answer: len(answer.text))
VOWELS = RuleReward("vowels", lambda prompt, answer: sum(letter in "aeiou" for letter in answer.text))
PICKY = RuleReward("picky", lambda prompt, answer: None if answer.text == "odd" else 1.0)
SCORES = st.lists(st.floats(-100, 100), min_size=2, max_size=6)


def texts(*answers: str) -> list[Answer]:
    return [Answer(text) for text in answers]


def test_combinations_of_three_scores_by_hand() -> None:
    # mean 3; deviations -2, -1, 3; variance (4 + 1 + 9) / 3
    scores = [1.0, 2.0, 6.0]
    assert mean(scores) == 3
    assert worst(scores) == 1
    assert uwo(scores) == pytest.approx(3 - 0.5 * 14 / 3)
    assert uwo(scores, lam=0.1) == pytest.approx(3 - 0.1 * 14 / 3)
    assert weighted_sum(scores, weights=[1, 0.5, -2]) == 1 + 1 - 12


@given(SCORES)
def test_uwo_is_the_mean_without_lambda_and_falls_with_it(scores: list[float]) -> None:
    assert uwo(scores, lam=0) == mean(scores)
    assert uwo(scores, lam=2) <= uwo(scores, lam=1) <= mean(scores)


@given(SCORES, st.floats(-100, 100))
def test_a_constant_added_to_all_members_is_added_to_the_ensemble(scores: list[float], constant: float) -> None:
    moved = [score + constant for score in scores]
    for rule in (mean, worst, uwo):
        assert rule(moved) == pytest.approx(rule(scores) + constant, abs=1e-8)
        assert rule([constant] * 3) == pytest.approx(constant)


def test_mixture_weighs_and_shows_its_parts() -> None:
    reward = mixture([LETTERS, VOWELS], [1.0, -0.5])
    answers = texts("banana", "x")
    assert reward([PROMPT] * 2, answers) == [6 - 1.5, 1.0]
    parts = reward.parts([PROMPT] * 2, answers)
    assert parts == {"letters": [6.0, 1.0], "vowels": [3.0, 0.0]}
    assert reward.combine(parts) == reward([PROMPT] * 2, answers)
    assert reward.name == "1*letters + -0.5*vowels"


def test_none_of_any_part_leaves_the_answer_out() -> None:
    answers = texts("fine", "odd")
    for reward in (mixture([LETTERS, PICKY], [1, 2]), ensemble("min", [LETTERS, PICKY])):
        first, second = reward([PROMPT] * 2, answers)
        assert first is not None and second is None
        assert reward.parts([PROMPT] * 2, answers) == {"letters": [4.0, 3.0], "picky": [1.0, None]}


def test_ensembles_by_hand() -> None:
    answers = texts("banana")  # 6 letters, 3 vowels: mean 4.5, variance 2.25
    found = {kind: ensemble(kind, [LETTERS, VOWELS])([PROMPT], answers)[0] for kind in ("mean", "min", "uwo")}
    assert found == {"mean": 4.5, "min": 3.0, "uwo": 4.5 - 0.5 * 2.25}
    assert ensemble("uwo", [LETTERS, VOWELS], lam=0.1)([PROMPT], answers) == [pytest.approx(4.5 - 0.225)]


def test_no_answers_have_no_scores() -> None:
    assert mixture([LETTERS, VOWELS], [1, 1])([], []) == []


def test_a_part_of_another_length_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        mixture([LETTERS, VOWELS], [1, 1]).combine({"letters": [1.0, 2.0], "vowels": [1.0]})


def test_a_sum_that_is_not_finite_is_named() -> None:
    huge = RuleReward("huge", lambda prompt, answer: 1e308)
    with pytest.raises(ValueError, match=r"(?s)returned inf.*the answer 'a'.*rows\.jsonl:2"):
        mixture([huge, LETTERS], [10.0, 1.0])([PROMPT], texts("a"))


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "1 numbers for 2"), ([1, 0], "0 for vowels"), ([math.nan, 1], "nan for letters")]
)
def test_weights_that_mean_nothing(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture([LETTERS, VOWELS], weights)


def test_a_reward_given_twice() -> None:
    with pytest.raises(ValueError, match="letters is given 2 times"):
        mixture([LETTERS, LETTERS], [1, 1])
    with pytest.raises(ValueError, match="letters is given 2 times"):
        ensemble("mean", [LETTERS, LETTERS])


def test_ensembles_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match=r"no ensemble 'median'.*mean, min, uwo"):
        ensemble("median", [LETTERS, VOWELS])
    with pytest.raises(ValueError, match="at least two"):
        ensemble("mean", [LETTERS])
    with pytest.raises(ValueError, match="ensemble:min has no lambda"):
        ensemble("min", [LETTERS, VOWELS], lam=0.5)
    with pytest.raises(ValueError, match="at least 0, given -1"):
        ensemble("uwo", [LETTERS, VOWELS], lam=-1)
