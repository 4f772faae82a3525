"""Somebody's functions as rewards."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import pytest

from trimtab.records import Answer, Prompt
from trimtab.rewards import FunctionReward, functions, parse_reward

TEXT = Prompt.from_text("A review: ", columns={"target": 3}, source="rows.jsonl:2")
CHAT = Prompt.from_user("Say something.", answer="yes", columns={"target": 4})


def texts(*answers: str) -> list[Answer]:
    return [Answer(text) for text in answers]


def function_module(monkeypatch: pytest.MonkeyPatch, **named: Any) -> None:
    module = ModuleType("somebodys_rewards")
    module.__spec__ = None
    for name, function in named.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "somebodys_rewards", module)
    monkeypatch.setattr(functions, "module_exists", lambda name: name == "somebodys_rewards")


def test_function_gets_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def asks(prompts: list[Any], completions: list[Any], target: list[int], weight: float = 2.0) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [weight * value for value in target]

    function_module(monkeypatch, asks=asks, takes_all=lambda **columns: seen.update(columns) or [0, 0])
    assert parse_reward("py:somebodys_rewards:asks")([TEXT, CHAT], texts("a", "b")) == [6.0, 8.0]
    assert seen["prompts"] == ["A review: ", [{"role": "user", "content": "Say something."}]]
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]
    parse_reward("py:somebodys_rewards:takes_all")([TEXT, CHAT], texts("a", "b"))
    assert seen["answer"] == [None, "yes"] and seen["target"] == [3, 4]


def test_function_that_needs_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    function_module(monkeypatch, solution=lambda completions, solution: [0.0])
    with pytest.raises(ValueError, match="needs solution; the data has answer, completions, finished, prompts, target"):
        parse_reward("py:somebodys_rewards:solution")([TEXT], texts("a"))


def test_function_gets_the_tokens_drawn_and_whether_answers_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    function_module(
        monkeypatch,
        ids=lambda prompts, completions, completion_ids, **columns: (
            seen.update(columns) or list(map(len, completion_ids))
        ),
    )
    answers = [Answer("a", ids=(5, 6, 2), raw="a</s>"), Answer("b", finished=False, ids=(7,), raw="b")]
    assert parse_reward("py:somebodys_rewards:ids")([TEXT, CHAT], answers) == [3.0, 1.0]
    assert seen["finished"] == [True, False] and seen["raw_completions"] == ["a</s>", "b"]


def test_tokens_that_nobody_knows_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    function_module(
        monkeypatch, ids=lambda completion_ids: [0.0, 0.0], all=lambda **given: seen.extend(given) or [1, 2]
    )
    answers = [Answer("a", ids=(5, 2)), Answer("read from a file")]
    with pytest.raises(ValueError, match="needs completion_ids; the data has"):
        parse_reward("py:somebodys_rewards:ids")([TEXT, CHAT], answers)
    assert parse_reward("py:somebodys_rewards:all")([TEXT, CHAT], answers) == [1.0, 2.0]
    assert "completions" in seen and not {"completion_ids", "raw_completions"} & set(seen)


def test_none_leaves_an_answer_out() -> None:
    reward = FunctionReward("f", lambda completions: [None if text == "b" else 1 for text in completions])
    assert reward([TEXT] * 3, texts("a", "b", "c")) == [1.0, None, 1.0]


def test_async_functions_are_run_to_their_end() -> None:
    async def slow(completions: list[str]) -> list[float]:
        async def one(text: str) -> float:
            await asyncio.sleep(0)
            return float(len(text))

        return list(await asyncio.gather(*map(one, completions)))

    assert FunctionReward("slow", slow)([TEXT] * 2, texts("ab", "c")) == [2.0, 1.0]


def test_an_async_function_that_raises_is_named_like_any_other() -> None:
    async def breaks(completions: list[str]) -> list[float]:
        return [1 / len(text) for text in completions]

    with pytest.raises(ValueError, match=r"(?s)breaks raised ZeroDivisionError for the answer ''.*rows\.jsonl:2"):
        FunctionReward("breaks", breaks)([CHAT, TEXT], texts("words", ""))


def test_the_first_answer_at_which_a_function_raises_is_named() -> None:
    def strict(completions: list[str]) -> list[int]:
        return [int(text) for text in completions]

    with pytest.raises(
        ValueError, match=r"(?s)strict raised ValueError for the answer 'two'.*rows\.jsonl:2.*invalid literal"
    ):
        FunctionReward("strict", strict)([TEXT] * 4, texts("1", "two", "3", "four"))


def test_a_row_without_a_column_is_not_blamed_for_another_one() -> None:
    def hard(target: list[int | None], completions: list[str]) -> list[float]:
        return [0.0 if goal is None else len(text) / goal for goal, text in zip(target, completions, strict=True)]

    bare, zero = Prompt.from_text("no column"), Prompt.from_text("zero", columns={"target": 0})
    with pytest.raises(ValueError, match="for the answer 'b' to the prompt 'zero'"):
        FunctionReward("hard", hard)([bare, zero], texts("a", "b"))


def test_a_function_that_fails_only_on_many_says_so() -> None:
    def only_one(completions: list[str]) -> list[int]:
        assert len(completions) == 1, "one at a time"
        return [0]

    with pytest.raises(ValueError, match=r"(?s)AssertionError for 2 answers together: one at a time"):
        FunctionReward("only_one", only_one)([TEXT] * 2, texts("a", "b"))


@pytest.mark.parametrize("returned", [None, 1.0, "12"])
def test_what_is_no_list_is_named(returned: Any) -> None:
    with pytest.raises(ValueError, match="must return a list of one number an answer"):
        FunctionReward("odd", lambda completions: returned)([TEXT] * 2, texts("a", "b"))
