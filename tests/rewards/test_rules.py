"""Rules, and what counts as a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.records import Answer, Prompt
from trimtab.rewards import RULES, RuleReward, checked, every_score, parse_reward

TEXT = Prompt.from_text("A review: ", columns={"target": 3}, source="rows.jsonl:2")
CHAT = Prompt.from_user("Say something.", answer="yes", columns={"target": 4})


def texts(*answers: str) -> list[Answer]:
    return [Answer(text) for text in answers]


def test_rules_hand_values() -> None:
    assert parse_reward("length")([TEXT, CHAT], texts("four", "")) == [4.0, 0.0]
    # VADER: "good" has valence 1.9, and the compound score is s / sqrt(s^2 + 15).
    assert parse_reward("sentiment")([TEXT], texts("good"))[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)
    good, plain, bad = every_score(
        parse_reward("sentiment"), [TEXT] * 3, texts("I love it!", "It is a chair.", "I hate it.")
    )
    assert good > plain == 0 > bad
    assert all(parse_reward(name).name == name for name in RULES)


def test_exact_match_by_hand() -> None:
    prompts = [Prompt.from_user("6 * 7?", answer=" Forty-Two ")] * 5
    answers = texts("forty-two", "\nFORTY-TWO\n", "forty two", "it is forty-two", "")
    assert parse_reward("exact-match")(prompts, answers) == [1.0, 1.0, 0.0, 0.0, 0.0]
    german = Prompt.from_user("?", answer="Straße")
    assert parse_reward("exact-match")([german], texts("STRASSE")) == [1.0]


def test_exact_match_without_a_known_answer_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"(?s)exact-match.*'some words'.*rows\.jsonl:2.*column `answer`"):
        parse_reward("exact-match")([CHAT, TEXT], texts("yes", "some words"))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "1.0", [1.0], torch.tensor([1.0, 2.0]), np.ones(1), float("-inf"), object()]
)
def test_what_is_no_finite_number_is_named_with_prompt_and_answer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)mine returned .*'some answer'.*'A review: '.*rows\.jsonl:2"):
        checked("mine", [TEXT], texts("some answer"), [value])


def test_number_of_values_is_checked() -> None:
    with pytest.raises(ValueError, match="1 values for 2 answers"):
        checked("mine", [TEXT, TEXT], texts("a", "b"), [1.0])


def test_numbers_of_arrays_are_numbers() -> None:
    assert checked("mine", [TEXT] * 3, texts(*"abc"), torch.tensor([1.0, 2.0, 3.0])) == [1.0, 2.0, 3.0]


def test_rule_reward_is_a_reward_for_any_rule() -> None:
    reward = RuleReward("exclamations", lambda prompt, answer: answer.text.count("!"))
    assert reward([TEXT] * 2, texts("wow!!", "no")) == [2.0, 0.0]


def test_none_leaves_an_answer_out_and_is_an_error_where_none_can_be() -> None:
    reward = RuleReward("picky", lambda prompt, answer: None if answer.text == "b" else len(answer.text))
    assert reward([TEXT] * 3, texts("aaa", "b", "cc")) == [3.0, None, 2.0]
    assert every_score(reward, [TEXT] * 2, texts("aaa", "cc")) == [3.0, 2.0]
    with pytest.raises(ValueError, match=r"(?s)picky gave None for the answer 'b'.*rows\.jsonl:2"):
        every_score(reward, [CHAT, TEXT, CHAT], texts("aaa", "b", "cc"))


def test_rules_see_whether_an_answer_ended() -> None:
    reward = RuleReward("ended", lambda prompt, answer: answer.finished)
    assert reward([TEXT] * 2, [Answer("a"), Answer("a", finished=False)]) == [1.0, 0.0]


def test_a_protocol_is_all_that_a_reward_is() -> None:
    class Constant:
        name = "constant"

        def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
            return [2.5] * len(answers)

    assert every_score(Constant(), [TEXT], texts("a")) == [2.5]
