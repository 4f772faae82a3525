"""Judges: what they say about two answers, what they refuse, and what `--judge` means."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trimtab.judges import FunctionJudge, JudgedReward, RewardJudge, RuleJudge, compared, parse_judge
from trimtab.records import Answer, Comparison, Prompt
from trimtab.rewards import RuleReward

WORTH: dict[str, float | None] = {"two": 2.0, "one": 1.0, "also one": 1.0, "huge": 1e6, "none": None}
REWARD = RuleReward("worth", lambda prompt, answer: WORTH[answer.text])
PROMPT = Prompt.from_text("How much?", source="rows.jsonl:3")


def comparison(first: str, second: str) -> Comparison:
    return Comparison(PROMPT, Answer(first), Answer(second))


@dataclass
class Told:
    """A judge that says what it was told to, and remembers what it was asked."""

    answers: Sequence[float | None]
    asked: list[Comparison] = field(default_factory=list)
    name: str = "told"

    def __call__(self, comparisons: Sequence[Comparison]) -> Sequence[float | None]:
        self.asked += comparisons
        return self.answers[: len(comparisons)]


def test_bradley_terry_by_hand() -> None:
    asked = [comparison("two", "one"), comparison("one", "two"), comparison("one", "also one")]
    said = RewardJudge("worth", REWARD)(asked)
    assert said == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.5], abs=1e-15)
    assert said[2] == 0.5 and sum(p for p in said if p is not None) == pytest.approx(1.5, abs=1e-15)
    scaled = RewardJudge("worth", REWARD, scale=2.0)(asked)
    assert scaled[0] == pytest.approx(0.880797077977882)


def test_far_scores_do_not_overflow_and_missing_ones_say_nothing() -> None:
    asked = [comparison("huge", "one"), comparison("one", "huge"), comparison("none", "one"), comparison("one", "none")]
    assert RewardJudge("worth", REWARD)(asked) == [1.0, 0.0, None, None]
    assert RuleJudge("worth", REWARD)(asked) == [1.0, 0.0, None, None]


def test_a_rule_is_the_limit_of_a_large_scale() -> None:
    asked = [comparison("two", "one"), comparison("one", "two"), comparison("one", "also one")]
    strict = RuleJudge("worth", REWARD)(asked)
    assert strict == [1.0, 0.0, 0.5]
    assert RewardJudge("worth", REWARD, scale=1e3)(asked) == strict


def test_a_function_gets_what_it_asks_for() -> None:
    seen: dict[str, Any] = {}

    async def judge(prompts: list, first: list, second: list, mood: list, **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, first=first, second=second, mood=mood, **columns)
        return [0.25, None]

    text = Prompt.from_text("a", columns={"mood": "good"})
    chat = Prompt.from_user("b", answer="42")
    asked = [
        Comparison(text, Answer("x", ids=(5, 6)), Answer("y", finished=False)),
        Comparison(chat, Answer("z"), Answer("w")),
    ]
    assert FunctionJudge("py:j:judge", judge)(asked) == [0.25, None]
    assert seen["prompts"] == ["a", [{"role": "user", "content": "b"}]]
    assert seen["first"] == ["x", [{"role": "assistant", "content": "z"}]]
    assert seen["second"] == ["y", [{"role": "assistant", "content": "w"}]]
    assert seen["mood"] == ["good", None] and seen["answer"] == [None, "42"]
    assert seen["second_finished"] == [False, True] and seen["first_ids"] == [[5, 6], []]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([0.5, 0.5], "2 values for 1 comparisons"),
        ([1.2], r"1\.2, which is no number from 0 to 1, for the answers 'two' and 'one'.*rows\.jsonl:3"),
        ([-0.1], r"-0\.1"),
        ([math.nan], "nan"),
        (["first"], "'first'"),
        (0.7, r"0\.7; it must return a list"),
    ],
)
def test_what_is_no_probability_is_refused_by_name(returned: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"judge py:j:odd returned {expected}"):
        FunctionJudge("py:j:odd", lambda first: returned)([comparison("two", "one")])


def test_a_function_that_fails_or_asks_too_much_is_named() -> None:
    def broken(first: list) -> list[float]:
        return [1 / 0]

    with pytest.raises(ValueError, match="judge py:j:broken raised ZeroDivisionError"):
        FunctionJudge("py:j:broken", broken)([comparison("two", "one")])
    with pytest.raises(ValueError, match=r"judge py:j:picky needs mood; the data has .*first"):
        FunctionJudge("py:j:picky", lambda mood: mood)([comparison("two", "one")])


def test_the_same_answer_twice_is_a_tie_that_nobody_is_asked_about() -> None:
    judge = Told([0.9, None])
    same = Comparison(PROMPT, Answer("x", ids=(1, 2)), Answer("x", ids=(1, 2)))
    other_tokens = Comparison(PROMPT, Answer("x", ids=(1, 2)), Answer("x", ids=(3,)))
    asked = [same, comparison("two", "one"), other_tokens, comparison("one", "one")]
    assert compared(judge, asked) == [0.5, 0.9, None, 0.5]
    assert judge.asked == [asked[1], asked[2]]
    assert compared(judge, [same]) == [0.5] and len(judge.asked) == 2


def test_a_judge_as_a_reward_splits_one_between_two() -> None:
    prompts = [PROMPT] * 8
    answers = [Answer(text) for text in ("a", "b", "c", "d", "e", "e", "f", "g")]
    judged = JudgedReward(Told([0.75, None, 0.0]))
    assert judged(prompts, answers) == [0.75, 0.25, None, None, 0.5, 0.5, 0.0, 1.0]
    assert judged.name == "told"


def test_what_judge_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text("def shorter(first, second):\n    return [0.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = [comparison("two", "seven")]
    assert parse_judge("rule:length")(asked) == [0.0]
    assert parse_judge("reward:length")(asked) == pytest.approx([1 / (1 + math.exp(2))])
    assert parse_judge("reward:ensemble:min(length,sentiment)")(asked) == [0.5]
    assert parse_judge("py:my_judges:shorter")(asked) == [0.0]
    assert parse_judge("rule:length").name == "rule:length"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("length", r"unknown judge 'length'. A judge is reward:R.*rule:length\|sentiment.*py:package"),
        ("llm:gpt", "'gpt' is no address"),
        ("llm:http://127.0.0.1:9/v1", "names no model; expected llm:URL#MODEL"),
        ("llm:ftp://127.0.0.1/v1#m", "is no address"),
        ("llm:https://key@127.0.0.1/v1#m", "must hold no key.*TRIMTAB_API_KEY"),
        ("llm:https://127.0.0.1/v1?key=secret#m", "must hold no key.*TRIMTAB_API_KEY"),
        ("labels:", "names no file; expected labels:FILE"),
        ("labels:x.jsonl", "'x.jsonl' does not exist"),
        ("", "unknown judge ''"),
        ("rule:lenght", r"unknown judge 'rule:lenght'. Did you mean rule:length\?"),
        ("rule:", "The rules are length"),
        ("reward:lenght", "unknown reward 'lenght'. Did you mean length"),
        ("reward:", "no reward was given"),
        ("py:nowhere_at_all:f", "judge 'py:nowhere_at_all:f': there is no module"),
        ("py:f", "judge 'py:f' is not of the form"),
        ("py:math:nothing", "module math has no function nothing"),
    ],
)
def test_what_means_nothing_is_refused(text: str, expected: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.compile(expected, re.DOTALL)):
        parse_judge(text)
