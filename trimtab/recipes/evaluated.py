"""What the `evaluate` commands load: a policy and what it started from, or anything that scores answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.recipes.options import Dtype
from trimtab.untrusted import home_expanded

if TYPE_CHECKING:
    from trimtab.models import Policy
    from trimtab.rewards import Reward


@dataclass(frozen=True)
class ScorerOptions:
    """What chooses among answers: a policy by their likelihood, or a reward by its score."""

    model: str | None = None
    """A policy: hub id, folder, run directory, or built-in name. It chooses what it finds most likely."""
    reward: tuple[str, ...] = ()
    """Or a reward, as for `trimtab score`. It chooses what it scores highest."""
    reward_weights: tuple[float, ...] = ()
    """One factor for each reward; 1 unless given."""
    dtype: Dtype = "auto"
    """Arithmetic of the model's body: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    batch_rows: int = 16
    """Answers scored at the same time; changes speed, not the figures (in float32)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""


def load_scorer(options: ScorerOptions) -> Reward:
    """The policy's likelihood or the reward. ValueError unless exactly one of them is given."""
    from trimtab.recipes import training
    from trimtab.rewards import parse_rewards

    if (options.model is None) == (not options.reward):
        raise ValueError("give either --model (a policy, which chooses by likelihood) or --reward.")
    if options.model is not None and options.reward_weights:
        raise ValueError("--reward-weights has no effect without --reward.")
    if options.batch_rows < 1:
        raise ValueError(f"--batch-rows {options.batch_rows}: at least 1 is needed.")
    loading = training.scoring(options)
    if options.model is None:
        return parse_rewards(options.reward, options.reward_weights, **loading, batch_rows=options.batch_rows)
    return likelihood(options.model, loading, options.batch_rows)


def likelihood(model: str, loading: dict[str, Any], batch_rows: int) -> Reward:
    """A policy that chooses the likelier answer."""
    from trimtab.evals.choices import Likelihood
    from trimtab.models import load_policy

    return Likelihood(model, load_policy(model, **loading), batch_rows)


def start_model(model: str, reference: str | None) -> str:
    """What a policy is compared with: what was given, else what its run started from.

    ValueError where the model is no run's and no reference is given.
    """
    if reference is not None:
        return reference
    found = begun_from(model)
    if not found:
        raise ValueError(f"{model} is not of a run directory with a start model: give --reference MODEL.")
    return found


def begun_from(model: str) -> str | None:
    """The reference of the run that a model is of, or what that run started from; None where it is of no run."""
    config = run_config(home_expanded(model))
    found = config.get("ref_model") or config.get("model")
    return str(found) if found else None


def run_config(path: Path) -> dict[str, Any]:
    """The config of the run that a run directory, its model or one of its checkpoints belongs to; empty without."""
    from trimtab.untrusted import read_yaml_mapping

    for folder in (path, path.parent, path.parent.parent):
        config = folder / "config.yaml"
        if config.is_file():
            return read_yaml_mapping(config)
    return {}


def check_same_vocabulary(policy: Policy, reference: Policy, names: tuple[str, str]) -> None:
    """ValueError for two models that do not read the same tokens: there is no KL between them."""
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(f"{names[0]} and {names[1]} have different vocabularies, so there is no KL between them.")
