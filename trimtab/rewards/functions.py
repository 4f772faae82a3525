"""Somebody's Python function as a reward, with the signature of TRL's reward functions."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.records import Answer, Prompt
from trimtab.rewards.scores import checked, described

RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a function may raise and have its prompt and answer named; anything else passes as it is."""


@dataclass(frozen=True)
class FunctionReward:
    """A Python function with the signature of TRL's reward functions; an `async` one is run to its end.

    It is called with `prompts` and `completions` and with every further column of the prompts (and `answer`) as lists,
    as far as its parameters ask for them; with `**kwargs` it gets all. Plain text is passed as strings, a conversation
    as a list of role/content messages. `completion_ids` are the tokens drawn, the closing one included; they are there
    for answers that were sampled, not for those read from a file. Beyond TRL, `finished` says which answers ended
    rather than being cut, and `raw_completions` are the texts with special tokens, where they are known.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        asked = asked_for(f"reward {self.name}", self.function, arguments_of(prompts, answers))
        try:
            values = result(self.function, asked)
        except RAISED as error:
            place = failing(self.function, asked, len(answers))
            about = f"{len(answers)} answers together" if place is None else described(prompts[place], answers[place])
            raise ValueError(f"reward {self.name} raised {type(error).__name__} for {about}: {error}") from error
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"reward {self.name} returned {values!r}; it must return a list of one number an answer")
        return checked(self.name, prompts, answers, values)


def failing(function: Callable[..., Any], asked: Mapping[str, Sequence[Any]], count: int) -> int | None:
    """The place of the first answer at which a function raises when it is asked about it alone, if there is one."""
    for place in range(count):
        try:
            result(function, {name: [column[place]] for name, column in asked.items()})
        except RAISED:
            return place
    return None


def result(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a function returns, an async one included."""
    values = function(**arguments)
    return asyncio.run(awaited(values)) if inspect.isawaitable(values) else values


async def awaited(values: Awaitable[Any]) -> Any:
    """What an awaitable comes to, in a form that `asyncio.run` takes."""
    return await values


def arguments_of(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Everything that a function can ask for, one list entry an answer."""
    arguments: dict[str, list[Any]] = {
        **columns_of(prompts),
        "prompts": [as_trl(prompt) for prompt in prompts],
        "completions": [
            answer.text if prompt.is_text else [{"role": "assistant", "content": answer.text}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
        "finished": [answer.finished for answer in answers],
    }
    if all(answer.ids for answer in answers):
        arguments["completion_ids"] = [list(answer.ids) for answer in answers]
    if all(answer.raw is not None for answer in answers):
        arguments["raw_completions"] = [answer.raw for answer in answers]
    return arguments


def as_trl(prompt: Prompt) -> str | list[dict[str, str]]:
    """A prompt as TRL's functions expect it."""
    if prompt.is_text:
        return prompt.text
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every further column as a list over the prompts; None where a prompt lacks it."""
    rows = [{"answer": prompt.answer, **prompt.columns} for prompt in prompts]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def asked_for(who: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function has parameters for. ValueError, saying `who`, if it needs another."""
    parameters = inspect.signature(function).parameters.values()
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.POSITIONAL_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in arguments
    ]
    if missing:
        raise ValueError(f"{who} needs {', '.join(missing)}; the data has {', '.join(sorted(arguments))}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    return {parameter.name: arguments[parameter.name] for parameter in parameters if parameter.name in arguments}


def load_function(text: str) -> FunctionReward:
    """The reward that `py:package.module:function` names."""
    return FunctionReward(text, named_function(text, kind="reward"))


def named_function(text: str, *, kind: str) -> Callable[..., Any]:
    """The function that `py:package.module:function` names. ValueError, saying what `kind` of thing it was to be."""
    module_name, _, function_name = text.removeprefix("py:").partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{kind} {text!r} is not of the form py:package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if not module_exists(module_name):
        raise ValueError(f"{kind} {text!r}: there is no module {module_name}, neither here nor on Python's path.")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"{kind} {text!r}: module {module_name} has no function {function_name}")
    return function


def module_exists(name: str) -> bool:
    """Whether Python would find this module; only the packages around it are imported."""
    parent = name.rpartition(".")[0]
    return (not parent or module_exists(parent)) and importlib.util.find_spec(name) is not None
