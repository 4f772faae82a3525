"""What `--reward` says: a text -> a reward.

First everything that was given is understood, then models are loaded: a mistake in the last name costs no loading.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab.rewards.functions import load_function
from trimtab.rewards.implicit import implicit_source, load_implicit
from trimtab.rewards.mixtures import ENSEMBLES, check_distinct, check_ensemble, check_weights, ensemble, mixture
from trimtab.rewards.models import ModelReward
from trimtab.rewards.rules import RULES, RuleReward
from trimtab.rewards.scores import Reward
from trimtab.tokens import Overlong
from trimtab.untrusted import home_expanded

ENSEMBLE = re.compile(r"ensemble:(?P<kind>\w+)(:lambda=(?P<lam>[^()]*))?\((?P<members>.*)\)", re.DOTALL)


def parse_reward(text: str, **options: Any) -> Reward:
    """The reward that one text names; `options` are those of `parse_rewards`.

    length | sentiment | exact-match         a built-in rule (`RULES`)
    py:package.module:function               a Python function with TRL's signature
    implicit:RUN[,reference=M][,beta=B]      the implicit reward of a run's policy against its start model
    implicit:RUN,reference=none              the same without a reference: the answer's log-probability
    ensemble:mean|min|uwo(R1,R2,...)         the mean, the worst, or mean minus lambda times variance of rewards
    ensemble:uwo:lambda=L(R1,R2,...)         the same with another lambda than 0.5
    anything else                            a reward model: run directory, folder or hub id
    """
    return parse_rewards([text], **options)


def parse_rewards(
    texts: Sequence[str],
    weights: Sequence[float] = (),
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    overlong: Overlong = "error",
    batch_rows: int = 16,
    trust_remote_code: bool = False,
) -> Reward:
    """One reward from all that were given: the only one itself, or a weighted sum (weights 1 unless given).

    ValueError or FileNotFoundError, before anything large is loaded, for a name or weight that means nothing.
    """
    if not texts:
        raise ValueError(f"no reward was given: it is {allowed()}")
    check_distinct(texts)
    if weights:
        check_weights(texts, weights)
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    limits = {"max_length": max_length, "overlong": overlong, "batch_rows": batch_rows}
    loaders = [understood(text, options, limits) for text in texts]
    rewards = [load() for load in loaders]
    if len(rewards) == 1 and not weights:
        return rewards[0]
    return mixture(rewards, weights or [1.0] * len(rewards))


def understood(text: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> Callable[[], Reward]:
    """What loads the reward of a text; the text itself is checked at once."""
    if text in RULES:
        return partial(RuleReward, text, RULES[text])
    if text.startswith("py:"):
        function = load_function(text)
        return lambda: function
    if text.startswith("ensemble:"):
        return understood_ensemble(text, options, limits)
    if text.startswith("implicit:"):
        return partial(load_implicit, text, implicit_source(text), options, limits)
    check_source(text)
    return partial(load_model, text, options, limits)


def understood_ensemble(text: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> Callable[[], Reward]:
    """What loads an ensemble and its members."""
    match = ENSEMBLE.fullmatch(text)
    if not match:
        raise ValueError(f"reward {text!r} is not of the form ensemble:{'|'.join(ENSEMBLES)}[:lambda=L](R1,R2,...)")
    settings = {} if match["lam"] is None else {"lam": to_lambda(text, match["lam"])}
    names = members(text, match["members"])
    check_ensemble(match["kind"], names, **settings)
    loaders = [understood(name, options, limits) for name in names]
    return lambda: ensemble(match["kind"], [load() for load in loaders], **settings)


def to_lambda(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"reward {text!r}: lambda must be a number of at least 0, given {value!r}") from None


def members(text: str, inner: str) -> list[str]:
    """The names between an ensemble's parentheses; commas inside inner parentheses do not divide them.

    Nor do those of `implicit:RUN,reference=M,beta=B`.
    """
    found, depth = [""], 0
    for character in inner:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    if depth:
        raise ValueError(f"reward {text!r}: its parentheses do not match")
    names: list[str] = []
    for name in map(str.strip, found):
        if names and names[-1].startswith("implicit:") and name.startswith(("reference=", "beta=")):
            names[-1] += f",{name}"
        else:
            names.append(name)
    return names


def load_model(text: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> ModelReward:
    from trimtab.models import load_scalar

    return ModelReward(text, load_scalar(text, new_head=False, **options), **limits)


def check_source(text: str) -> None:
    """FileNotFoundError or ValueError if this can be neither a folder nor a hub id."""
    if not text:
        raise ValueError(f"no reward was given: it is {allowed()}")
    if home_expanded(text).exists():
        return
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {text} to read a reward model from")
    if "/" not in text or ":" in text:
        close = difflib.get_close_matches(re.split("[:(]", text)[0], [*RULES, "implicit", "py", "ensemble"], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown reward {text!r}.{hint} A reward is {allowed()}")


def allowed() -> str:
    """Everything that may stand after --reward."""
    return (
        f"{', '.join(RULES)}, py:package.module:function, implicit:RUN, ensemble:{'|'.join(ENSEMBLES)}(R1,R2,...), "
        "or a reward model's run directory, folder or hub id"
    )
