"""Rewards: prompts and their answers -> one score an answer.

A `Reward` is anything that can be called like that and has a name: a reward model, the implicit reward of a policy, a
rule, somebody's Python function. `parse_reward` makes one from what `--reward` says.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import yaml
from torch import Tensor

from trimtab.batches import Tokens, move
from trimtab.progress import progress_bar
from trimtab.records import Answer, Demonstration, Prompt
from trimtab.tokens import Overlong, Row, fit, pad, tokenize

if TYPE_CHECKING:
    from trimtab.losses.arguments import Term
    from trimtab.models import Policy, ScalarModel, Scorer


class Reward(Protocol):
    """Scores answers, higher is better: one finite number for each prompt and its answer."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]: ...


def checked(name: str, prompts: Sequence[Prompt], answers: Sequence[Answer], values: Iterable[Any]) -> list[float]:
    """The values as floats. ValueError, naming prompt and answer, unless there is one finite number for each answer."""
    values = list(values)
    if len(values) != len(answers):
        raise ValueError(f"reward {name} returned {len(values)} values for {len(answers)} answers")
    for prompt, answer, value in zip(prompts, answers, values, strict=True):
        if not is_finite_number(value):
            raise ValueError(
                f"reward {name} returned {value!r}, which is not a finite number, for the answer {answer.text[:80]!r} "
                f"to the prompt {prompt.text[-80:]!r}{f' ({prompt.source})' if prompt.source else ''}"
            )
    return [float(value) for value in values]


def is_finite_number(value: Any) -> bool:
    """Whether this is a number (NumPy's and torch's scalars too) other than NaN and infinity."""
    if value is None or isinstance(value, str | bytes):
        return False
    return hasattr(value, "__float__") and math.isfinite(float(value))


# ---- Rules


@dataclass(frozen=True)
class RuleReward:
    """A rule that looks at one answer at a time."""

    name: str
    rule: Callable[[Prompt, Answer], float]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        values = [self.rule(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return checked(self.name, prompts, answers, values)


def length(prompt: Prompt, answer: Answer) -> float:
    """The number of characters of the answer."""
    return float(len(answer.text))


def sentiment(prompt: Prompt, answer: Answer) -> float:
    """The answer's VADER compound score in [-1, 1] (Hutto and Gilbert 2014): how positive its words are."""
    return float(vader().polarity_scores(answer.text)["compound"])


@cache
def vader() -> Any:
    """The VADER analyzer; reading its lexicon takes a moment."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


RULES: dict[str, Callable[[Prompt, Answer], float]] = {"length": length, "sentiment": sentiment}


# ---- Somebody's function


@dataclass(frozen=True)
class FunctionReward:
    """A Python function with the signature of TRL's reward functions.

    It is called with `prompts` and `completions` and with every further column of the prompts (and `answer`) as lists,
    as far as its parameters ask for them; with `**kwargs` it gets all. Plain text is passed as strings, a conversation
    as a list of role/content messages. Deviation: `completion_ids` does not exist here, for a reward sees text only.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        arguments: dict[str, list[Any]] = {
            **columns_of(prompts),
            "prompts": [as_trl(prompt) for prompt in prompts],
            "completions": [
                answer.text if prompt.is_text else [{"role": "assistant", "content": answer.text}]
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        }
        asked = asked_for(self.name, self.function, arguments)
        try:
            values = self.function(**asked)
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(values, Iterable):
            raise ValueError(f"reward {self.name} returned {values!r}; it must return a list of one number an answer")
        return checked(self.name, prompts, answers, values)


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


def asked_for(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function has parameters for. ValueError if it needs one that there is not."""
    parameters = inspect.signature(function).parameters.values()
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.POSITIONAL_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in arguments
    ]
    if missing:
        raise ValueError(f"reward {name} needs {', '.join(missing)}; the data has {', '.join(sorted(arguments))}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    return {parameter.name: arguments[parameter.name] for parameter in parameters if parameter.name in arguments}


def load_function(text: str) -> FunctionReward:
    """The function that `py:package.module:function` names."""
    module_name, _, function_name = text.removeprefix("py:").partition(":")
    if not module_name or not function_name:
        raise ValueError(f"reward {text!r} is not of the form py:package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if not module_exists(module_name):
        raise ValueError(f"reward {text!r}: there is no module {module_name}, neither here nor on Python's path.")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"reward {text!r}: module {module_name} has no function {function_name}")
    return FunctionReward(text, function)


def module_exists(name: str) -> bool:
    """Whether Python would find this module; only the packages around it are imported."""
    parent = name.rpartition(".")[0]
    return (not parent or module_exists(parent)) and importlib.util.find_spec(name) is not None


# ---- Models


@dataclass(frozen=True)
class ModelReward:
    """A reward model's score of an answer, read at its last token: the closing one, unless the answer was cut."""

    name: str
    model: ScalarModel
    max_length: int | None = None
    overlong: Overlong = "error"
    batch_rows: int = 16

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        rows = answer_rows(self.model.tokenizer, prompts, answers, self.max_length, self.overlong)
        values = in_batches(rows, self.model.scores, self.model.pad_id, self.model.device, self.batch_rows, self.name)
        return checked(self.name, prompts, answers, values)


@dataclass(frozen=True)
class ImplicitReward:
    """The reward that a policy implies: beta (log pi(y|x) - log pi_ref(y|x)), nats times beta per answer.

    Rafailov et al. 2023, eq. 5, without beta log Z(x), which all answers to a prompt share: compare scores of answers
    to one prompt only.
    """

    name: str
    policy: Policy
    reference: Scorer
    beta: float
    max_length: int | None = None
    overlong: Overlong = "error"
    batch_rows: int = 16

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        rows = answer_rows(self.policy.tokenizer, prompts, answers, self.max_length, self.overlong)
        device, pad_id = self.policy.device, self.policy.pad_id
        values = in_batches(rows, self.scores, pad_id, device, self.batch_rows, self.name)
        return checked(self.name, prompts, answers, values)

    def scores(self, tokens: Tokens) -> Tensor:
        """The implicit reward of every row, `[B]`."""
        return self.beta * (self.policy.logprobs(tokens).sum(-1) - self.reference.logprobs(tokens).sum(-1))


def answer_rows(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Answer], max_length: int | None, overlong: Overlong
) -> list[Row]:
    """Prompt and answer as one row each; an answer that was cut has no closing token, as in training.

    ValueError if one is too long and not to be cut; none can be left out.
    """
    if overlong == "drop":
        raise ValueError("a reward scores every answer, so --overlong drop cannot be used: give error or truncate-...")
    pairs = zip(prompts, answers, strict=True)
    records = [Demonstration(prompt, answer.text, finished=answer.finished) for prompt, answer in pairs]
    items = tokenize(tokenizer, records)
    if max_length is not None:
        items, counts = fit(items, max_length, overlong)
        if counts.dropped:
            raise ValueError(f"some answers cannot be cut to length and still be scored: {counts}")
    return [item.rows[0] for item in items]


@torch.no_grad()
def in_batches(
    rows: Sequence[Row],
    scores: Callable[[Tokens], Tensor],
    pad_id: int,
    device: torch.device | str,
    batch_rows: int,
    title: str,
) -> list[float]:
    """One score a row, computed for rows of similar length together and returned in the order given."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = torch.zeros(len(rows))
    with progress_bar(f"score ({title})", len(rows)) as advance:
        for start in range(0, len(rows), batch_rows):
            chosen = by_length[start : start + batch_rows]
            tokens = move(pad([rows[i] for i in chosen], pad_id), device)
            found[chosen] = scores(tokens).float().cpu()
            advance(len(chosen))
    return found.tolist()


# ---- What --reward says


def parse_reward(
    text: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    overlong: Overlong = "error",
    batch_rows: int = 16,
    trust_remote_code: bool = False,
) -> Reward:
    """The reward that a text names:

        length | sentiment                       a built-in rule (`RULES`)
        py:package.module:function               a Python function with TRL's signature
        implicit:RUN[,reference=M][,beta=B]      the implicit reward of a run's policy against its start model
        anything else                            a reward model: run directory, folder or hub id

    ValueError or FileNotFoundError, before anything large is loaded, for a name that means nothing.
    """
    if text in RULES:
        return RuleReward(text, RULES[text])
    if text.startswith("py:"):
        return load_function(text)
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    limits = {"max_length": max_length, "overlong": overlong, "batch_rows": batch_rows}
    if text.startswith("implicit:"):
        return load_implicit(text, options, limits)
    check_source(text)
    from trimtab.models import load_scalar

    return ModelReward(text, load_scalar(text, new_head=False, **options), **limits)


def check_source(text: str) -> None:
    """FileNotFoundError or ValueError if this can be neither a folder nor a hub id."""
    if not text:
        raise ValueError(f"no reward was given: it is {allowed()}")
    if Path(text).expanduser().exists():
        return
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {text} to read a reward model from")
    if "/" not in text or ":" in text:
        close = difflib.get_close_matches(text.partition(":")[0], [*RULES, "implicit", "py"], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown reward {text!r}.{hint} A reward is {allowed()}")


def allowed() -> str:
    """Everything that may stand after --reward."""
    return (
        f"{', '.join(RULES)}, py:package.module:function, implicit:RUN, "
        "or a reward model's run directory, folder or hub id"
    )


@dataclass(frozen=True)
class ImplicitSource:
    """What an implicit reward is made of: where the policy and its reference are, and beta."""

    policy: str
    reference: str
    beta: float


def load_implicit(text: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> ImplicitReward:
    source = implicit_source(text)
    from trimtab.models import load_policy

    policy, reference = load_policy(source.policy, **options), load_policy(source.reference, **options)
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(f"{source.policy} and {source.reference} have different vocabularies, so {text} has no value")
    return ImplicitReward(text, policy, reference, source.beta, **limits)


def implicit_source(text: str) -> ImplicitSource:
    """What `implicit:RUN[,reference=M][,beta=B]` means; what it leaves out stands in the run's config.yaml."""
    policy, *settings = text.removeprefix("implicit:").split(",")
    parts = [setting.partition("=") for setting in settings]
    given = {name: value for name, _, value in parts}
    unknown = [name for name, value in given.items() if name not in ("reference", "beta") or not value]
    if unknown or not policy:
        raise ValueError(f"reward {text!r} is not of the form implicit:RUN[,reference=M][,beta=B]")
    config = read_config(policy) if len(given) < 2 else {}
    reference = given.get("reference") or config.get("ref_model") or config.get("model")
    if not reference:
        raise ValueError(f"{policy} is no run directory with a start model: type {text},reference=MODEL")
    return ImplicitSource(
        policy, str(reference), to_beta(text, given["beta"]) if "beta" in given else run_beta(text, config)
    )


def read_config(run: str) -> dict[str, Any]:
    """The run's resolved config; empty for a model that is no run directory."""
    path = Path(run).expanduser()
    if not path.exists() and (run.startswith((".", "/", "~")) or run.count("/") != 1):
        raise FileNotFoundError(f"there is no run directory {run}: implicit: needs a run of trimtab dpo or trimtab kto")
    config = path / "config.yaml"
    return yaml.safe_load(config.read_text(encoding="utf-8")) or {} if config.is_file() else {}


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
