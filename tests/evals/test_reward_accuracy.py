"""Reward accuracy on pairs counted by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from trimtab.evals.reward_accuracy import reward_accuracy
from trimtab.records import Preference, Prompt
from trimtab.rewards import RuleReward

LENGTH = RuleReward("length", lambda prompt, answer: len(answer.text))
LETTERS = RuleReward("letters", lambda prompt, answer: answer.text.count("a"))


def pair(chosen: str, rejected: str, *, confidence: float = 1.0, subset: str | None = None) -> Preference:
    columns = {} if subset is None else {"subset": subset}
    return Preference(Prompt.from_text("?", columns=columns), chosen, rejected, confidence=confidence)


PAIRS = [
    pair("aa", "bbbb", subset="easy"),  # letters right by 2, longer wrong
    pair("aaa", "a", subset="easy"),  # letters right by 2, longer right
    pair("bb", "aab", subset="hard"),  # letters wrong by 2, longer wrong
    pair("bbb", "cc", subset="hard"),  # letters tie, longer right
    pair("x", "a", confidence=0.5, subset="hard"),  # no better answer
]


def test_counts_by_hand() -> None:
    result = reward_accuracy(LETTERS, PAIRS)
    assert (result.accuracy.value, result.accuracy.count) == (0.5, 4)
    assert (result.ties, result.excluded) == (1, 1)
    assert (result.longer.value, result.longer.count) == (0.5, 4)
    assert result.margin.value == pytest.approx((2 + 2 - 2 + 0) / 4)
    assert {name: (share.value, share.count) for name, share in result.subsets.items()} == {
        "easy": (1.0, 2),
        "hard": (0.0, 2),
    }


def test_length_reward_has_the_accuracy_of_longer_wins() -> None:
    result = reward_accuracy(LENGTH, PAIRS)
    assert result.accuracy == result.longer


def test_low_confidence_exchanges_the_answers() -> None:
    assert reward_accuracy(LETTERS, [pair("b", "a", confidence=0.2)]).accuracy.value == 1
    assert reward_accuracy(LETTERS, [pair("b", "a", confidence=0.8)]).accuracy.value == 0


def test_exchanging_every_pair_gives_the_complement_without_the_ties() -> None:
    exchanged = [pair(p.rejected, p.chosen) for p in PAIRS if p.confidence != 0.5]
    there, back = reward_accuracy(LETTERS, PAIRS), reward_accuracy(LETTERS, exchanged)
    count = there.accuracy.count
    assert there.accuracy.value + back.accuracy.value == 1 - there.ties / count
    assert there.margin.value == -back.margin.value


ENDED = RuleReward("ended", lambda prompt, answer: answer.finished)


@pytest.mark.parametrize("confidence", [1.0, 0.2])
def test_the_reward_sees_which_answers_were_cut_also_where_they_are_exchanged(confidence: float) -> None:
    cut = replace(pair("a", "b", confidence=confidence), rejected_finished=False)
    assert reward_accuracy(ENDED, [cut]).margin.value == (1 if confidence > 0.5 else -1)


def test_subset_by_another_column_or_none() -> None:
    assert reward_accuracy(LETTERS, PAIRS, by="language").subsets == {}
    assert reward_accuracy(LETTERS, [pair("a", "b")]).subsets == {}


def test_goes_to_json() -> None:
    written = json.loads(json.dumps(reward_accuracy(LETTERS, PAIRS).to_dict(), allow_nan=False))
    assert written["accuracy"]["value"] == 0.5 and written["subsets"]["easy"]["count"] == 2


def test_nothing_but_ties_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 1 pairs"):
        reward_accuracy(LETTERS, PAIRS[-1:])


def test_accuracy_by_length_and_margin_by_hand() -> None:
    result = reward_accuracy(LETTERS, PAIRS)
    # Lengths 2:4, 3:1, 2:3 and 3:2.
    assert {name: (share.value, share.count) for name, share in result.by_length.items()} == {
        "at most half as long": (1.0, 1),
        "shorter": (0.0, 1),
        "longer": (0.0, 1),
        "more than twice as long": (1.0, 1),
    }
    # |margins| 0, 2, 2, 2: the tie is the smallest quarter, the equal ones stay together.
    assert {name: (share.value, share.count) for name, share in result.by_margin.items()} == {
        "smallest quarter": (0.0, 1),
        "second quarter": (2 / 3, 3),
    }


def test_a_noisy_reward_is_right_more_often_where_its_margin_is_large() -> None:
    generator = random.Random(0)
    noisy = RuleReward("noisy", lambda prompt, answer: len(answer.text) + generator.gauss(0, 2))
    pairs = [pair("aa", "a", subset=str(i)) for i in range(2000)]
    by_margin = list(reward_accuracy(noisy, pairs).by_margin.values())
    assert by_margin[0].high < by_margin[-1].low
