"""Signs that a run is going wrong, in plain words: what happened, and which knob moves it. Pure.

Each sign warns once and is counted always, so that a report can say how often it was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trimtab.batches import Rollouts

MOST = 0.5
"""The share of answers (or groups) above which something is said of them."""
FEW_TOKENS = 3
"""Answers of so few tokens may be one token over and over without being a sign."""
RUNAWAY = 4.0
"""A KL of so many times the recent one runs away,"""
SMALL_KL = 2.0
"""unless it is below so many nats an answer."""
SUNK_SHARE, SUNK_NATS = 0.05, 1.0
"""Log-probabilities that fell by this share of themselves, and by so many nats an answer, have sunk."""

ADVICE = {
    "cut": "Raise --max-new-tokens, or give --unfinished-score a low value.",
    "no_spread": "Nothing is learned from such groups: raise --group-size or --temperature, or take other prompts.",
    "empty": "Give a reward that does not like silence, or go back to an earlier checkpoint.",
    "identical": "The policy has collapsed: lower --lr, raise --kl-coef, or go back to an earlier checkpoint.",
    "one_token": "The reward is being gamed: raise --kl-coef, or mend the reward.",
    "unscored": "Such rollouts are passed over: see what the reward gives None for.",
    "kl_runs_away": "Lower --lr, raise --kl-coef, or set --kl-budget.",
}
"""What to do about each sign of online RL."""

SIGNS = {
    "cut": "most answers were cut at the length limit",
    "no_spread": "in most groups all answers had the same reward",
    "empty": "all answers were empty",
    "identical": "all answers were the same text",
    "one_token": "most answers repeated one token",
    "unscored": "no answer had a score",
    "kl_runs_away": "KL jumped to several times what it was",
}
"""What each sign says of a rollout, for reports."""


@dataclass
class Health:
    """What was seen so far: how often each sign, and the KL of recent rollouts, nats per answer."""

    seen: dict[str, int] = field(default_factory=dict)
    usual_kl: float | None = None

    def look(self, rollouts: Rollouts, texts: Sequence[str]) -> list[str]:
        """The warnings that this rollout is the first to give."""
        return self.count(signs(rollouts, texts) | (self._kl_sign(rollouts.mean_kl) if rollouts.valid.any() else {}))

    def count(self, found: Mapping[str, str], advice: Mapping[str, str] = ADVICE) -> list[str]:
        """The signs among these that are the first of their kind, each with what to do about it; all are counted."""
        new = [f"{text}. {advice[name]}" for name, text in found.items() if name not in self.seen]
        for name in found:
            self.seen[name] = self.seen.get(name, 0) + 1
        return new

    def _kl_sign(self, kl: float) -> dict[str, str]:
        usual = self.usual_kl
        self.usual_kl = kl if usual is None else (usual + kl) / 2
        if usual is None or kl <= max(RUNAWAY * usual, SMALL_KL):
            return {}
        return {"kl_runs_away": f"KL jumped from about {max(usual, 0):.1f} to {kl:.1f} nats an answer"}


def signs(rollouts: Rollouts, texts: Sequence[str]) -> dict[str, str]:
    """What is wrong with the answers of a rollout, by name, in words."""
    found, total = {}, len(texts)
    cut = int((~rollouts.finished).sum())
    if cut > MOST * total:
        found["cut"] = f"{cut} of {total} answers were cut at the length limit"
    if not rollouts.valid.any():
        found["unscored"] = f"none of {total} answers has a score"
    flat, groups = groups_without_spread(rollouts)
    if flat > MOST * groups:
        found["no_spread"] = f"in {flat} of {groups} groups all answers have the same reward"
    if not any(text.strip() for text in texts):
        found["empty"] = f"all {total} answers are empty"
    elif total > 1 and len(set(texts)) == 1:
        found["identical"] = f"all {total} answers are the same text"
    answers = zip(rollouts.tokens.ids, rollouts.tokens.response_mask, strict=True)
    repeated = sum(is_one_token(ids[mask]) for ids, mask in answers)
    if repeated > MOST * total:
        found["one_token"] = f"{repeated} of {total} answers repeat one token"
    return found


def groups_without_spread(rollouts: Rollouts) -> tuple[int, int]:
    """How many groups have several scored answers of one and the same score, and how many have several at all."""
    scores, valid = (values.view(-1, rollouts.group_size) for values in (rollouts.scores, rollouts.valid))
    groups = [values[counts] for values, counts in zip(scores, valid, strict=True) if counts.sum() > 1]
    return sum(bool((values == values[0]).all()) for values in groups), len(groups)


def is_one_token(drawn: Tensor) -> bool:
    """Whether the tokens of an answer are one token over and over, the last (which may be the end) left out."""
    return len(drawn) > FEW_TOKENS and len(drawn[:-1].unique()) == 1


def sinking(first: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """What to say when chosen *and* rejected answers have become less likely since the first evaluation."""
    names = ("chosen_logprob", "rejected_logprob")
    if not all(name in first and name in now for name in names):
        return None
    if any(first[name] - now[name] <= max(SUNK_SHARE * abs(first[name]), SUNK_NATS) for name in names):
        return None
    chosen, rejected = (f"{first[name]:.1f} to {now[name]:.1f}" for name in names)
    return (
        f"chosen and rejected answers both became less likely (from {chosen} and from {rejected} nats an answer): "
        "probability goes to answers that nobody compared. Lower --lr, raise beta, or add a term that holds the chosen "
        "ones up, such as --loss dpo+0.2*preferred_ft."
    )
