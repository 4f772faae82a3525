"""What `--judge` says: a text -> a judge. One grammar wherever a judge is accepted."""

from __future__ import annotations

import difflib
from typing import Any

from trimtab.judges.asking import BothOrders, Judge
from trimtab.judges.computed import FunctionJudge, RewardJudge, RuleJudge
from trimtab.judges.endpoint import endpoint_at
from trimtab.judges.labels import load_labels
from trimtab.judges.language import LanguageJudge
from trimtab.rewards import RULES, RuleReward, parse_reward
from trimtab.rewards.functions import named_function

KINDS = ("reward", "rule", "py", "llm", "labels")


def parse_judge(text: str, **options: Any) -> Judge:
    """The judge that a text names; `options` are those of `parse_rewards`.

    reward:R                       the Bradley-Terry model on anything that --reward takes, such as a run directory
    rule:NAME                      the strict comparison of a built-in rule (`RULES`)
    py:package.module:function     a Python function (`FunctionJudge`)
    llm:URL#MODEL                  a language model behind an endpoint, asked in both orders (`LanguageJudge`)
    labels:FILE                    people's saved labels (`LabelJudge`)

    ValueError or FileNotFoundError, before a model is loaded, for a name that means nothing.
    """
    kind, colon, name = text.partition(":")
    if not colon or kind not in KINDS:
        raise ValueError(f"unknown judge {text!r}. A judge is {allowed()}")
    if kind == "py":
        return FunctionJudge(text, named_function(text, kind="judge"))
    if kind == "reward":
        return RewardJudge(text, parse_reward(name, **options))
    if kind == "llm":
        return BothOrders(language_judge(text, name))
    if kind == "labels":
        if not name:
            raise ValueError(f"judge {text!r} names no file; expected labels:FILE")
        return load_labels(text, name)
    if name not in RULES:
        close = difflib.get_close_matches(name, RULES, n=1)
        hint = f" Did you mean rule:{close[0]}?" if close else ""
        raise ValueError(f"unknown judge {text!r}.{hint} The rules are {', '.join(RULES)}")
    return RuleJudge(text, RuleReward(name, RULES[name]))


def language_judge(text: str, name: str) -> LanguageJudge:
    """The judge of URL#MODEL, for one order."""
    url, _, model = name.partition("#")
    endpoint = endpoint_at(url, model)
    if not model:
        raise ValueError(f"judge {text!r} names no model; expected llm:URL#MODEL, such as llm:{url}#my-model")
    return LanguageJudge(text, endpoint)


def allowed() -> str:
    """Everything that may stand after --judge."""
    return f"reward:R (any --reward), rule:{'|'.join(RULES)}, py:package.module:function, llm:URL#MODEL, or labels:FILE"
