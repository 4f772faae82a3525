"""The algorithms of online RL: one row each, and the table is their documentation.

A row holds names: of an advantage (`ADVANTAGES`), a policy loss (`POLICY_LOSSES`), a KL estimator (`KL_ESTIMATORS` in
the reward, `KL_LOSSES` in the loss), a way to average tokens (`mean_over`), a value loss (`VALUE_LOSSES`) and what is
done to scores (`SCORE_SHAPES`). Arguments are `name=value` texts, as on the command line. What is not in a row is the
same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.batches import Average


@dataclass(frozen=True)
class Algorithm:
    """A recipe for a step of online RL, in names; the defaults of a row are those of its paper."""

    advantage: str
    loss: str
    kl_in: Literal["reward", "loss"]
    """`reward` prices the KL of every token; `loss` adds it to the loss of every token."""
    kl: str
    kl_coefficient: float
    """Reward units (or loss units) per nat; 0 leaves KL out."""
    mean_over: Average
    value_loss: str = ""
    """The critic's loss; empty for algorithms without a critic."""
    loss_arguments: tuple[str, ...] = ()
    advantage_arguments: tuple[str, ...] = ()
    score_shape: str = "raw"
    score_arguments: tuple[str, ...] = ()
    unfinished_score: float | None = None
    """The score of every answer that was cut, whatever its reward; None leaves it as it is."""
    whiten_advantages: bool = False
    epochs: int = 1
    """How often the answers of a rollout are gone through."""
    minibatches: int = 1
    """Updates in each of those passes."""

    @property
    def critic(self) -> bool:
        """Whether values are learned."""
        return bool(self.value_loss)

    @property
    def updates(self) -> int:
        """Updates on the answers of one rollout."""
        return self.epochs * self.minibatches


ALGORITHMS = {
    #                         advantage        loss         KL in     by    coef. mean over    value loss
    "reinforce": Algorithm("batch_centred", "reinforce", "reward", "k1", 0.05, "sums"),
    "rloo": Algorithm("rloo", "reinforce", "reward", "k1", 0.03, "sums"),
    "remax": Algorithm("remax", "reinforce", "reward", "k1", 0.05, "sums"),
    "reinforce_pp": Algorithm("reinforce_pp", "ppo_clip", "reward", "k1", 0.01, "tokens"),
    "ppo": Algorithm("gae", "ppo_clip", "reward", "k1", 0.05, "tokens", "clipped", whiten_advantages=True, epochs=4),
    "ppo_max": Algorithm(
        *("gae", "ppo_clip", "reward", "k1", 0.05, "tokens", "clipped"),
        advantage_arguments=("lam=0.9",),
        score_shape="normalized",
        minibatches=4,
    ),
    "ppo_max_script": Algorithm(
        *("gae", "ppo_clip", "reward", "k1", 0.01, "tokens", "clipped"), score_shape="scaled", minibatches=4
    ),
    "grpo": Algorithm("grpo", "ppo_clip", "loss", "k3", 0.04, "sequences"),
    "dr_grpo": Algorithm("dr_grpo", "ppo_clip", "loss", "k3", 0.0, "constant"),
    "dapo": Algorithm(
        *("grpo", "ppo_clip", "loss", "k3", 0.0, "tokens"), loss_arguments=("epsilon_high=0.28",), minibatches=16
    ),
    "gspo": Algorithm("grpo", "gspo", "loss", "k3", 0.0, "sequences", minibatches=4),
}
