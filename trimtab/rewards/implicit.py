"""The reward that a policy implies, and what `implicit:RUN` says about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.batches import Tokens
from trimtab.records import Answer, Prompt
from trimtab.rewards.models import answer_rows, in_batches
from trimtab.rewards.scores import checked
from trimtab.tokens import Overlong
from trimtab.untrusted import home_expanded, read_yaml_mapping

if TYPE_CHECKING:
    from trimtab.losses.arguments import Term
    from trimtab.models import Policy, Scorer


NO_REFERENCE = "none"
"""What `reference=` says where the policy alone is to score."""


@dataclass(frozen=True)
class ImplicitReward:
    """The reward that a policy implies: beta (log pi(y|x) - log pi_ref(y|x)), nats times beta per answer.

    Rafailov et al. 2023, eq. 5, without beta log Z(x), which all answers to a prompt share: compare scores of answers
    to one prompt only. Without a reference it is beta log pi(y|x), which favours short answers.
    """

    name: str
    policy: Policy
    reference: Scorer | None
    beta: float
    max_length: int | None = None
    overlong: Overlong = "error"
    batch_rows: int = 16

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        rows = answer_rows(self.policy.tokenizer, prompts, answers, self.max_length, self.overlong)
        device, pad_id = self.policy.device, self.policy.pad_id
        values = in_batches(rows, self.scores, pad_id, device, self.batch_rows, self.name)
        return checked(self.name, prompts, answers, values)

    def scores(self, tokens: Tokens) -> Tensor:
        """The implicit reward of every row, `[B]`."""
        own = self.policy.logprobs(tokens).sum(-1)
        return self.beta * (own if self.reference is None else own - self.reference.logprobs(tokens).sum(-1))


# ---- What implicit:RUN says


@dataclass(frozen=True)
class ImplicitSource:
    """What an implicit reward is made of: where the policy and its reference (None: without) are, and beta."""

    policy: str
    reference: str | None
    beta: float


def load_implicit(
    text: str, source: ImplicitSource, options: Mapping[str, Any], limits: Mapping[str, Any]
) -> ImplicitReward:
    from trimtab.models import load_policy

    policy = load_policy(source.policy, **options)
    if source.reference is None:
        return ImplicitReward(text, policy, None, source.beta, **limits)
    reference = load_policy(source.reference, **options)
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(f"{source.policy} and {source.reference} have different vocabularies, so {text} has no value")
    return ImplicitReward(text, policy, reference, source.beta, **limits)


def implicit_source(text: str) -> ImplicitSource:
    """What `implicit:RUN[,reference=M][,beta=B]` means; what it leaves out stands in the run's config.yaml.

    `reference=none` scores without a reference; its beta is 1 unless given.
    """
    policy, *settings = text.removeprefix("implicit:").split(",")
    parts = [setting.partition("=") for setting in settings]
    given = {name: value for name, _, value in parts}
    unknown = [name for name, value in given.items() if name not in ("reference", "beta") or not value]
    if unknown or not policy:
        raise ValueError(f"reward {text!r} is not of the form implicit:RUN[,reference=M][,beta=B]")
    if given.get("reference") == NO_REFERENCE:
        given.setdefault("beta", "1")
    config = read_config(policy) if len(given) < 2 else {}
    reference = given.get("reference") or config.get("ref_model") or config.get("model")
    if not reference:
        raise ValueError(f"{policy} is no run directory with a start model: type {text},reference=MODEL")
    return ImplicitSource(
        policy,
        None if reference == NO_REFERENCE else str(reference),
        to_beta(text, given["beta"]) if "beta" in given else run_beta(text, config),
    )


def read_config(run: str) -> dict[str, Any]:
    """The run's resolved config; empty for a model that is no run directory."""
    path = home_expanded(run)
    if not path.exists() and (run.startswith((".", "/", "~")) or run.count("/") != 1):
        raise FileNotFoundError(f"there is no run directory {run}: implicit: needs a run of trimtab dpo or trimtab kto")
    config = path / "config.yaml"
    return read_yaml_mapping(config) if config.exists() else {}


def to_beta(text: str, value: str) -> float:
    try:
        beta = float(value)
    except ValueError:
        beta = math.nan
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"reward {text!r}: beta must be a positive number, given {value!r}")
    return beta


def run_beta(text: str, config: Mapping[str, Any]) -> float:
    """The weight of the KL term that the run trained with: its loss's beta (IPO calls it tau)."""
    from trimtab.losses.preference import REFERENCE_FREE

    if config.get("reference") == "moving":
        raise ValueError(f"reward {text!r}: its reference moved; type {text},reference=MODEL,beta=B")
    if config.get("command") == "reward":
        raise ValueError(f"reward {text!r}: that run is a reward model; type --reward {text.removeprefix('implicit:')}")
    terms = loss_terms(config) if "loss" in config else []
    averaged = [term.name == "length_normalized_dpo" or term.settings.get("average") for term in terms]
    if not any(averaged) and not any(term.name in REFERENCE_FREE for term in terms):
        for settings in (term.settings for term in terms):
            for name in ("beta", "tau"):
                if isinstance(settings.get(name), int | float):
                    return float(settings[name])
    raise ValueError(
        f"reward {text!r}: the policy was not trained with beta times a sum of log-ratios as its reward; "
        f"to score with one all the same, type {text},beta=1 (or what it should be)"
    )


def loss_terms(config: Mapping[str, Any]) -> Sequence[Term]:
    """Every loss that the run added up, with its hyperparameters."""
    from trimtab.losses.arguments import combine
    from trimtab.losses.preference import ALL_LOSSES
    from trimtab.losses.unpaired import UNPAIRED_LOSSES

    return combine(ALL_LOSSES | UNPAIRED_LOSSES, str(config["loss"]), config.get("loss_args") or ()).terms
