"""Whether a judge favours the answer that it is shown first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evals.intervals import Estimate, wilson
from trimtab.evals.shares import share_over_prompts
from trimtab.judges import Verdict

TIE = 0.5


@dataclass(frozen=True)
class PositionBias:
    """How often the answer shown first wins, over both orders (0.5 without bias), and how often the order decided.

    Every two answers stand first once each, so their quality cancels. `flipped` is the share of comparisons in which
    one answer won in one order and the other in the other order.
    """

    first_wins: Estimate
    flipped: Estimate

    @property
    def found(self) -> str | None:
        """The position that is favoured, `first` or `second`, where the interval excludes 0.5."""
        if self.first_wins.low > TIE:
            return "first"
        return "second" if self.first_wins.high < TIE else None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "first_wins": self.first_wins.to_dict(),
            "flipped": self.flipped.to_dict(),
            "favours": self.found,
        }


def position_bias(verdicts: Sequence[Verdict], prompts: Sequence[Hashable], seed: int = 0) -> PositionBias:
    """The position bias in verdicts of both orders; those with one side unsaid are left out.

    `prompts` says which comparisons belong together. Half of a comparison's two verdicts is the chance that the one
    shown first wins: `(p + (1 - p')) / 2`, with p' the same answer's when the answers are exchanged.
    """
    both = [
        (verdict.in_order, verdict.exchanged, prompt)
        for verdict, prompt in zip(verdicts, prompts, strict=True)
        if verdict.in_order is not None and verdict.exchanged is not None
    ]
    shown_first = [(one + 1 - other) / 2 for one, other, _ in both]
    flips = sum((one - TIE) * (other - TIE) < 0 for one, other, _ in both)
    return PositionBias(
        share_over_prompts(shown_first, [prompt for *_, prompt in both], seed), wilson(flips, len(both))
    )
