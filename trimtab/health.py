"""Signs that a run is going wrong, in plain words: what happened, and which knob moves it. Pure.

Each sign warns once and is counted always, so that a report can say how often it was seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.batches import Rollouts

MOST = 0.5
FEW_TOKENS = 1
RUNAWAY_KL = 4.0
"""Times the KL of the recent past that counts as running away."""


@dataclass
class Health:
    """What was seen so far: how often each sign, and the KL of recent rollouts."""

    seen: Counter[str] = field(default_factory=Counter)
    usual_kl: float = 0.0

    def look(self, rollouts: Rollouts, texts: Sequence[str]) -> list[str]:
        """The warnings that this rollout is the first to give."""
        found = signs(rollouts, texts)
        kl = mean_kl(rollouts)
        if self.usual_kl and kl > max(RUNAWAY_KL * self.usual_kl, 1.0):
            found["kl_runs_away"] = f"KL jumped from about {self.usual_kl:.1f} to {kl:.1f} nats an answer"
        self.usual_kl = kl if not self.usual_kl else 0.8 * self.usual_kl + 0.2 * max(kl, 0.0)
        new = [f"{text}. {ADVICE[name]}" for name, text in found.items() if not self.seen[name]]
        self.seen.update(list(found))
        return new


ADVICE = {
    "cut": "Raise --max-new-tokens, or give --unfinished-score a low value.",
    "no_spread": "Nothing is learned from such groups: raise --group-size or --temperature, or take harder prompts.",
    "empty": "Give --unfinished-score, or a reward that does not like silence.",
    "identical": "The policy has collapsed: lower --lr, raise --kl-coef, or go back to an earlier checkpoint.",
    "one_token": "The reward is being gamed: raise --kl-coef, or mend the reward.",
    "kl_runs_away": "Lower --lr, raise --kl-coef, or set --kl-budget.",
}


def signs(rollouts: Rollouts, texts: Sequence[str]) -> dict[str, str]:
    """What is wrong with a rollout, by name, in words."""
    found = {}
    total = len(texts)
    cut = int((~rollouts.finished).sum())
    if cut > MOST * total:
        found["cut"] = f"{cut} of {total} answers were cut at the length limit"
    scores = rollouts.scores.view(-1, rollouts.group_size)
    flat = int((scores == scores[:, :1]).all(-1).sum()) if rollouts.group_size > 1 else 0
    if flat > MOST * len(scores):
        found["no_spread"] = f"in {flat} of {len(scores)} groups all answers have the same reward"
    if all(not text.strip() for text in texts):
        found["empty"] = f"all {total} answers are empty"
    elif total > 1 and len(set(texts)) == 1:
        found["identical"] = f"all {total} answers are the same text"
    repeated = sum(is_one_token(ids, mask) for ids, mask in zip(rollouts.tokens.ids, rollouts.mask, strict=True))
    if repeated > MOST * total:
        found["one_token"] = f"{repeated} of {total} answers repeat one token"
    return found


def is_one_token(ids: object, mask: object) -> bool:
    """Whether an answer of several tokens is one token over and over, its last one (the end) left out."""
    drawn = ids[mask][:-1]  # pyright: ignore[reportIndexIssue]
    return len(drawn) > FEW_TOKENS and len(drawn.unique()) == 1


def mean_kl(rollouts: Rollouts) -> float:
    """Nats per answer, from log-ratios."""
    ratio = (rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask
    return (ratio.sum() / rollouts.valid.sum().clamp(min=1)).item()
