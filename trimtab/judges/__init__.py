"""Judges: two answers to one prompt -> the probability that the first is the better one.

A `Judge` is anything that can be called like that and has a name: a reward under the Bradley-Terry model, a rule,
somebody's Python function (`computed`), a language model behind an endpoint (`language`, `endpoint`, `replies`), or
people's saved labels (`labels`). `parse_judge` makes one from what `--judge` says; `asking` asks it.
"""

from trimtab.judges.asking import BothOrders, Judge, JudgedReward, Verdict, compared
from trimtab.judges.computed import FunctionJudge, RewardJudge, RuleJudge
from trimtab.judges.endpoint import Endpoint
from trimtab.judges.labels import LabelJudge
from trimtab.judges.language import Asked, LanguageJudge, asked_of
from trimtab.judges.parse import parse_judge

__all__ = [
    "Asked",
    "BothOrders",
    "Endpoint",
    "FunctionJudge",
    "Judge",
    "JudgedReward",
    "LabelJudge",
    "LanguageJudge",
    "RewardJudge",
    "RuleJudge",
    "Verdict",
    "asked_of",
    "compared",
    "parse_judge",
]
