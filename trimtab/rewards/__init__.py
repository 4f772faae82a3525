"""Rewards: prompts and their answers -> one score an answer.

A `Reward` is anything that can be called like that and has a name: a reward model (`models`), the implicit reward of a
policy (`implicit`), a rule (`rules`), somebody's Python function (`functions`), a weighted sum or an ensemble of them
(`mixtures`). `parse_rewards` makes one from what `--reward` says; the same one serves best-of-n, training and
evaluation.
"""

from trimtab.rewards.functions import FunctionReward
from trimtab.rewards.implicit import ImplicitReward
from trimtab.rewards.mixtures import ENSEMBLES, Mixture, ensemble, mixture
from trimtab.rewards.models import ModelReward
from trimtab.rewards.parse import parse_reward, parse_rewards
from trimtab.rewards.rules import RULES, RuleReward
from trimtab.rewards.scores import Reward, checked, every_score

__all__ = [
    "ENSEMBLES",
    "RULES",
    "FunctionReward",
    "ImplicitReward",
    "Mixture",
    "ModelReward",
    "Reward",
    "RuleReward",
    "checked",
    "ensemble",
    "every_score",
    "mixture",
    "parse_reward",
    "parse_rewards",
]
