"""Objectives: what a step minimizes. One final class per kind of batch.

An objective has two halves. `outputs` is the only half that runs the model: it turns rows into a few differentiable
numbers. `loss` is arithmetic on those numbers and what the batch already holds. A loss that looks across a batch
(`across`) is always given the whole batch's outputs, whatever the micro-batches are; see `Learner.step`.

Every loss and metric is a `Mean`; micro-batches and ranks add, and one division at the end makes the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.batches import (
    DemonstrationBatch,
    FeedbackBatch,
    FreshBatch,
    Mask,
    Mean,
    MixedBatch,
    PairBatch,
    Pairs,
    PerPair,
    PerSequence,
    PerToken,
    PolicyBatch,
    RankingBatch,
    Referenced,
    Tokens,
)
from trimtab.kl import KlTerms, log_ratio
from trimtab.losses.arguments import CombinedLoss
from trimtab.losses.language import negative_log_likelihood
from trimtab.losses.policy import PolicyTerms, clip_fraction, ratio_statistics, token_ratio
from trimtab.losses.preference import ACROSS, REFERENCE_FREE, LengthSplitPairs, WeightedPairs
from trimtab.losses.reward import PairScores
from trimtab.losses.unpaired import Unpaired
from trimtab.losses.value import ValueTerms, value_clip_fraction

Metrics = dict[str, Mean]


class HasLogprobs(Protocol):
    """A policy: differentiable log-probabilities of rows (nats), zero outside the responses."""

    def logprobs(self, tokens: Tokens) -> PerToken: ...


class HasStatistics(HasLogprobs, Protocol):
    """A policy that also reports statistics of its whole next-token distribution."""

    def statistics(self, tokens: Tokens) -> Any: ...


class HasScores(Protocol):
    """A reward model: one differentiable number per row."""

    def scores(self, tokens: Tokens) -> PerSequence: ...


class Objective(Protocol):
    """What `Learner.step` needs of an objective."""

    @property
    def across(self) -> bool:
        """Whether the loss of one item depends on the other items of its batch."""
        ...

    def outputs(self, model: Any, batch: Any, /) -> Any:
        """The differentiable numbers of some rows: a dataclass of tensors."""
        ...

    def loss(self, outputs: Any, batch: Any, /) -> tuple[Mean, Metrics]:
        """The loss and the metrics of those numbers."""
        ...


@dataclass(frozen=True)
class TokenOutputs:
    """Log-probabilities of the response tokens, `[B, T]`."""

    logprobs: PerToken


@dataclass(frozen=True)
class DemonstrationObjective:
    """Supervised fine-tuning: the mean negative log-likelihood of the response tokens, nats per token."""

    across: bool = False

    def outputs(self, model: HasLogprobs, batch: DemonstrationBatch) -> TokenOutputs:
        return TokenOutputs(model.logprobs(batch.tokens))

    def loss(self, outputs: TokenOutputs, batch: DemonstrationBatch) -> tuple[Mean, Metrics]:
        mask = batch.tokens.response_mask
        losses = negative_log_likelihood(outputs.logprobs, mask)
        return Mean.of(losses, mask * batch.weights[:, None]), {"length": Mean.of(batch.tokens.response_lengths)}


@dataclass(frozen=True)
class ScoreOutputs:
    """Scores of rows, `[B]`."""

    scores: PerSequence


@dataclass(frozen=True)
class RewardObjective:
    """A reward model on pairs: `pair_loss` maps `PairScores` to one number a pair."""

    pair_loss: Callable[[PairScores], PerPair]
    across: bool = False

    def outputs(self, model: HasScores, batch: PairBatch) -> ScoreOutputs:
        return ScoreOutputs(model.scores(batch.tokens))

    def loss(self, outputs: ScoreOutputs, batch: PairBatch) -> tuple[Mean, Metrics]:
        chosen, rejected = outputs.scores.view(-1, 2).unbind(-1)
        losses = self.pair_loss(PairScores(chosen, rejected, batch.confidence, batch.margin))
        decided = batch.confidence != 0.5  # a tie has no right answer
        right = (chosen > rejected) == (batch.confidence > 0.5)
        metrics = {
            "accuracy": Mean.of((right & (chosen != rejected)).float(), decided),
            "margin": Mean.of(chosen - rejected),
            "reward": Mean.of(outputs.scores),
        }
        return Mean.of(losses, batch.weights), metrics


@dataclass(frozen=True)
class RankingObjective:
    """A reward model on rankings: `ranking_loss` maps scores `[rows]` and sizes `[P]` to one number a ranking.

    Each answer is scored once, however many pairs it stands in (Ouyang et al. 2022).
    """

    ranking_loss: Callable[[Tensor, Tensor], PerPair]
    across: bool = False

    def outputs(self, model: HasScores, batch: RankingBatch) -> ScoreOutputs:
        return ScoreOutputs(model.scores(batch.tokens))

    def loss(self, outputs: ScoreOutputs, batch: RankingBatch) -> tuple[Mean, Metrics]:
        losses = self.ranking_loss(outputs.scores, batch.sizes)
        margins = torch.cat([ordered_differences(scores) for scores in outputs.scores.split(batch.sizes.tolist())])
        metrics = {
            "accuracy": Mean.of((margins > 0).float()),
            "margin": Mean.of(margins),
            "reward": Mean.of(outputs.scores),
        }
        return Mean.of(losses, batch.weights), metrics


def ordered_differences(scores: Tensor) -> Tensor:
    """Better minus worse for every pair of a ranking's scores `[K]`, best first: `[K (K - 1) / 2]`."""
    better, worse = torch.triu_indices(len(scores), len(scores), offset=1)
    return scores[better] - scores[worse]


def pairs(policy: HasLogprobs, batch: Referenced[PairBatch]) -> Pairs:
    """Summed log-probabilities of chosen and rejected answers, and their reference's."""
    return summed_pairs(policy.logprobs(batch.tokens), batch)


def summed_pairs(logprobs: PerToken, batch: Referenced[PairBatch]) -> Pairs:
    """Pairs from the log-probabilities of their tokens."""
    chosen, rejected = logprobs.sum(-1).view(-1, 2).unbind(-1)
    ref_chosen, ref_rejected = batch.logprobs.sum(-1).view(-1, 2).unbind(-1)
    chosen_length, rejected_length = batch.tokens.response_lengths.view(-1, 2).unbind(-1)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length)


def length_split_pairs(policy: HasLogprobs, batch: Referenced[PairBatch]) -> LengthSplitPairs:
    """Sums over the first tokens, as many as the shorter answer has, and over what is left of the longer one."""
    mask = batch.tokens.response_mask
    shorter = mask.sum(-1).view(-1, 2).amin(-1).repeat_interleave(2)
    head = mask & (mask.cumsum(-1) <= shorter[:, None])

    def sums(logprobs: PerToken) -> tuple[Tensor, ...]:
        heads = torch.where(head, logprobs, 0).sum(-1).view(-1, 2).unbind(-1)
        tails = torch.where(mask & ~head, logprobs, 0).sum(-1).view(-1, 2).unbind(-1)
        return *heads, *tails

    chosen_head, rejected_head, chosen_tail, rejected_tail = sums(policy.logprobs(batch.tokens))
    ref_chosen_head, ref_rejected_head, ref_chosen_tail, ref_rejected_tail = sums(batch.logprobs)
    return LengthSplitPairs(
        chosen_head=chosen_head,
        rejected_head=rejected_head,
        chosen_tail=chosen_tail,
        rejected_tail=rejected_tail,
        ref_chosen_head=ref_chosen_head,
        ref_rejected_head=ref_rejected_head,
        ref_chosen_tail=ref_chosen_tail,
        ref_rejected_tail=ref_rejected_tail,
    )


def weighted_pairs(policy: HasStatistics, batch: Referenced[PairBatch]) -> WeightedPairs:
    """Pairs with WPO's weight of each answer: exp of the mean over its tokens of log p(token) - log sum_v p(v)^2."""
    statistics = policy.statistics(batch.tokens)
    mask = batch.tokens.response_mask
    excess = torch.where(mask, statistics.logprobs - statistics.log_sum_squares, 0).detach()
    weights = (excess.sum(-1) / mask.sum(-1)).exp()
    chosen_weight, rejected_weight = weights.view(-1, 2).unbind(-1)
    summed = summed_pairs(statistics.logprobs, batch)
    return WeightedPairs(summed, chosen_weight, rejected_weight)


PAIR_READERS: dict[type, Callable[[Any, Referenced[PairBatch]], Any]] = {
    Pairs: pairs,
    LengthSplitPairs: length_split_pairs,
    WeightedPairs: weighted_pairs,
}


@dataclass(frozen=True)
class PreferenceObjective:
    """DPO and its family. A pair whose confidence is c counts as chosen > rejected with weight c, else swapped."""

    pair_loss: CombinedLoss

    @property
    def across(self) -> bool:
        return not ACROSS.isdisjoint(self.pair_loss.names)

    @property
    def reads_reference(self) -> bool:
        """Whether the reference's log-probabilities change the loss."""
        return not REFERENCE_FREE.issuperset(self.pair_loss.names)

    def outputs(self, policy: Any, batch: Referenced[PairBatch]) -> Any:
        return PAIR_READERS[self.pair_loss.reads](policy, batch)

    def loss(self, outputs: Any, batch: Referenced[PairBatch]) -> tuple[Mean, Metrics]:
        confidence = batch.batch.confidence
        losses = self.pair_loss(outputs)
        if bool((confidence != 1).any()):
            mixed = confidence * losses + (1 - confidence) * self.pair_loss(swapped(outputs))
            losses = torch.where(confidence == 1, losses, mixed)
        return Mean.of(losses, batch.batch.weights), preference_metrics(outputs, confidence)


def swapped(outputs: Any) -> Any:
    """The same pairs with chosen and rejected exchanged."""
    changes = {}
    for entry in fields(outputs):
        value = getattr(outputs, entry.name)
        other = entry.name.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected")
        changes[other] = swapped(value) if is_dataclass(value) else value
    return replace(outputs, **changes)


def preference_metrics(outputs: Any, confidence: PerPair) -> Metrics:
    """Accuracy (strict, ties left out), margin and log-probabilities of chosen and rejected answers, in nats."""
    chosen, rejected, ref_chosen, ref_rejected = answer_sums(outputs)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    right = torch.where(confidence > 0.5, margin > 0, margin < 0)
    return {
        "accuracy": Mean.of(right.float(), confidence != 0.5),
        "margin": Mean.of(margin),
        "chosen_logprob": Mean.of(chosen),
        "rejected_logprob": Mean.of(rejected),
    }


def answer_sums(outputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed log-probabilities of chosen and rejected answers and the reference's, whatever the loss reads."""
    if isinstance(outputs, LengthSplitPairs):
        return (
            outputs.chosen_head + outputs.chosen_tail,
            outputs.rejected_head + outputs.rejected_tail,
            outputs.ref_chosen_head + outputs.ref_chosen_tail,
            outputs.ref_rejected_head + outputs.ref_rejected_tail,
        )
    summed = outputs.pairs if isinstance(outputs, WeightedPairs) else outputs
    return summed.chosen, summed.rejected, summed.ref_chosen, summed.ref_rejected


@dataclass(frozen=True)
class FeedbackObjective:
    """KTO and BCO on unpaired feedback. Mismatched answers are run without gradient, and only for KTO's KL term."""

    answer_loss: CombinedLoss
    across: bool = True

    @property
    def reads_mismatched(self) -> bool:
        """Whether mismatched answers enter the loss; BCO has no KL term."""
        return "kto" in self.answer_loss.names

    def outputs(self, policy: HasLogprobs, batch: Referenced[FeedbackBatch]) -> Unpaired:
        rows = torch.arange(len(batch.tokens), device=batch.tokens.ids.device).view(-1, 2)
        ref_logprob, ref_mismatched = batch.logprobs.sum(-1).view(-1, 2).unbind(-1)
        logprob = policy.logprobs(batch.tokens.select(rows[:, 0])).sum(-1)
        mismatched = ref_mismatched
        if self.reads_mismatched:
            with torch.no_grad():
                mismatched = policy.logprobs(batch.tokens.select(rows[:, 1])).sum(-1)
        return Unpaired(logprob, ref_logprob, mismatched, ref_mismatched, batch.batch.desirable)

    def loss(self, outputs: Unpaired, batch: Referenced[FeedbackBatch]) -> tuple[Mean, Metrics]:
        wanted, unwanted = outputs.desirable, ~outputs.desirable
        metrics = {
            "chosen_logprob": Mean.of(outputs.logprob, wanted),
            "rejected_logprob": Mean.of(outputs.logprob, unwanted),
            "chosen_log_ratio": Mean.of(outputs.log_ratio, wanted),
            "rejected_log_ratio": Mean.of(outputs.log_ratio, unwanted),
        }
        if self.reads_mismatched:
            metrics["kl"] = Mean.of(outputs.mismatched - outputs.ref_mismatched)
        return Mean.of(self.answer_loss(outputs), batch.batch.weights), metrics


# ---- Online RL


@dataclass(frozen=True)
class PolicyOutputs:
    """Log-probabilities of the response tokens and the critic's values before them (zeros without one), `[B, T]`."""

    logprobs: PerToken
    values: PerToken


@dataclass(frozen=True)
class PolicyObjective:
    """Online RL: a policy loss on the answers that the policy drew, plus KL where it is in the loss, plus the critic's.

    `average` makes a `Mean` of per-token losses and their mask (`mean_over`). With `fresh`, every batch is used for one
    update only, so the policy that drew it is the policy as it is and the old log-probabilities are its own: the
    ratio is exactly 1, and what sampling rounded otherwise is reported (`logprob_gap`) and not trained on. `clip` are
    the loss's bounds on `ratio`, for the share of clipped tokens.
    """

    policy_loss: Callable[[PolicyTerms], PerToken]
    average: Callable[[PerToken, Mask], Mean]
    fresh: bool
    kl_loss: Callable[[KlTerms], PerToken] | None = None
    kl_coefficient: float = 0.0
    value_loss: Callable[[ValueTerms], PerToken] | None = None
    value_coefficient: float = 0.1
    ratio: Callable[[PolicyTerms], PerToken] = token_ratio
    clip: Mapping[str, float] | None = None
    across: bool = False

    def outputs(self, policy: Any, batch: PolicyBatch) -> PolicyOutputs:
        logprobs = policy.logprobs(batch.tokens)
        values = policy.values(batch.tokens) if self.value_loss else torch.zeros_like(logprobs)
        return PolicyOutputs(logprobs, values)

    def loss(self, outputs: PolicyOutputs, batch: PolicyBatch) -> tuple[Mean, Metrics]:
        old = outputs.logprobs.detach() if self.fresh else batch.old_logprobs
        terms = PolicyTerms(outputs.logprobs, old, batch.advantages, batch.mask)
        losses, metrics = self.policy_loss(terms), policy_metrics(terms, batch)
        if self.kl_loss:
            kl = self.kl_loss(KlTerms(outputs.logprobs, old, batch.ref_logprobs, batch.mask))
            losses = losses + self.kl_coefficient * kl
        if self.clip:
            metrics["clip_fraction"] = clip_fraction(terms, self.ratio(terms).detach(), **self.clip)
        if self.value_loss:
            given = ValueTerms(outputs.values, batch.old_values, batch.returns, batch.mask)
            values = self.value_loss(given)
            losses = losses + self.value_coefficient * values
            metrics["value_loss"] = Mean.of(values, batch.mask)
            metrics["value_clip_fraction"] = value_clip_fraction(given)
        return self.average(losses, batch.mask), metrics

    def count(self, batch: PolicyBatch) -> Tensor:
        """What the losses of a batch are divided by."""
        return self.average(torch.zeros_like(batch.advantages), batch.mask).count


def policy_metrics(terms: PolicyTerms, batch: PolicyBatch) -> Metrics:
    """Reward, KL and length of the answers, and how far training's log-probabilities are from others."""
    lengths, drawn = batch.tokens.response_lengths, batch.weights
    to_reference = log_ratio(terms.logprobs.detach(), batch.ref_logprobs, batch.mask)
    to_sampling = log_ratio(terms.old_logprobs, batch.sampled_logprobs, batch.mask)
    return {
        "reward": Mean.of(batch.scores, drawn),
        "kl": Mean.of(to_reference.sum(-1), drawn),
        "kl_per_token": Mean.of(to_reference, batch.mask),
        "entropy": Mean.of(-batch.sampled_logprobs, batch.mask),
        "length": Mean.of(lengths, drawn),
        "unfinished": Mean.of((~batch.finished).float(), drawn),
        "logprob_gap": Mean.of(to_sampling.abs(), batch.mask),
        **ratio_statistics(terms),
    }


@dataclass(frozen=True)
class MixedOutputs:
    """Those of the answers that the policy drew, and those of the demonstrations."""

    drawn: PolicyOutputs
    shown: TokenOutputs


@dataclass(frozen=True)
class MixedObjective:
    """Online RL with demonstrations mixed in (Ouyang et al. 2022, PPO-ptx, eq. 2): the loss of the answers, plus the
    mean negative log-likelihood of the demonstrations' tokens times the `weight` that `mixed` gave them.
    """

    policy: PolicyObjective
    across: bool = False

    def outputs(self, policy: Any, batch: MixedBatch) -> MixedOutputs:
        return MixedOutputs(
            self.policy.outputs(policy, batch.answers) if batch.answers.size else no_outputs(batch.answers),
            TokenOutputs(policy.logprobs(batch.demonstrations.tokens))
            if batch.demonstrations.size
            else TokenOutputs(no_outputs(batch.demonstrations).logprobs),
        )

    def loss(self, outputs: MixedOutputs, batch: MixedBatch) -> tuple[Mean, Metrics]:
        loss, metrics = self.policy.loss(outputs.drawn, batch.answers)
        shown, _ = DemonstrationObjective().loss(outputs.shown, batch.demonstrations)
        total = loss.total + batch.weight * shown.total
        return Mean(total, loss.count), {**metrics, "demonstration_loss": shown}


def no_outputs(batch: PolicyBatch | DemonstrationBatch) -> PolicyOutputs:
    """What a model says about no rows."""
    nothing = torch.zeros(batch.tokens.ids.shape, device=batch.tokens.ids.device)
    return PolicyOutputs(nothing, nothing)


def mixed(
    answers: PolicyBatch, demonstrations: DemonstrationBatch, objective: PolicyObjective, coefficient: float
) -> MixedBatch:
    """A batch whose gradient is that of the answers' mean loss plus `coefficient` times the demonstrations'."""
    tokens = Mean.of(demonstrations.tokens.response_lengths, demonstrations.weights).total.clamp(min=1)
    return MixedBatch(answers, demonstrations, coefficient * (objective.count(answers) / tokens).item())


@dataclass(frozen=True)
class FreshObjective:
    """Any objective on answers that the policy just drew; its metrics and the figures about all that was drawn."""

    objective: Objective

    @property
    def across(self) -> bool:
        return self.objective.across

    def outputs(self, policy: Any, batch: FreshBatch) -> Any:
        return self.objective.outputs(policy, batch.batch)

    def loss(self, outputs: Any, batch: FreshBatch) -> tuple[Mean, Metrics]:
        loss, metrics = self.objective.loss(outputs, batch.batch)
        return loss, {**metrics, **batch.figures}
