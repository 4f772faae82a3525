"""Whether a verdict survives what should not matter: the order of two answers, the wording of a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from trimtab.evals.choices import pick
from trimtab.evals.intervals import Estimate, bootstrap_difference, bootstrap_mean, wilson
from trimtab.evals.rows import Located, cell, conversation, read_rows, texts
from trimtab.records import Prompt
from trimtab.rewards import Reward

Verdict = int | None
"""1 or 2 for the better output, 0 for neither, None where the judge's words could not be read."""


@dataclass(frozen=True)
class Judged:
    """A pair that a judge saw in both orders: the outputs as they stand, then exchanged.

    Both verdicts name outputs, not places. `label` is what people say, None if nobody does.
    """

    given: Verdict
    swapped: Verdict
    label: int | None
    group: str = ""


@dataclass(frozen=True)
class JudgeConsistency:
    """What the order of the outputs does to a judge's verdicts.

    `consistent` is the share of pairs with one verdict in both orders, `first_place` the share of verdicts for what was
    shown first minus 0.5: position bias, positive for the first. `accuracy` is the mean over both orders,
    `right_both` the share of pairs right in both. Unreadable verdicts are wrong, and no side of the position bias;
    in both orders they make a pair consistent, as in LLMBar's published figures.
    """

    judge: str
    consistent: Estimate
    first_place: Estimate | None
    accuracy: Estimate | None
    accuracy_given: Estimate | None
    accuracy_swapped: Estimate | None
    right_both: Estimate | None
    unreadable: int

    @property
    def biased(self) -> bool:
        """Whether the interval of the position bias lies clear of zero."""
        return self.first_place is not None and self.first_place.low * self.first_place.high > 0


def judge_consistency(judge: str, pairs: Sequence[Judged], *, seed: int = 0) -> JudgeConsistency:
    """The consistency of one judge; accuracies are None where no pair has a label. Intervals over pairs."""
    places = [place for pair in pairs if (place := first_share(pair)) is not None]
    labelled = [pair for pair in pairs if pair.label in (1, 2)]
    right = [(pair.given == pair.label, pair.swapped == pair.label) for pair in labelled]
    return JudgeConsistency(
        judge=judge,
        consistent=wilson(sum(pair.given == pair.swapped for pair in pairs), len(pairs)),
        first_place=bootstrap_difference(places, [0.5] * len(places), seed) if places else None,
        accuracy=bootstrap_mean([fmean(both) for both in right], seed) if right else None,
        accuracy_given=wilson(sum(given for given, _ in right), len(right)) if right else None,
        accuracy_swapped=wilson(sum(swapped for _, swapped in right), len(right)) if right else None,
        right_both=wilson(sum(map(all, right)), len(right)) if right else None,
        unreadable=sum((pair.given is None) + (pair.swapped is None) for pair in pairs),
    )


def first_share(pair: Judged) -> float | None:
    """The share of a pair's verdicts for what was shown first; a tie is half. None where none can be read."""
    places = [
        0.5 if verdict == 0 else float(verdict == shown_first)
        for verdict, shown_first in ((pair.given, 1), (pair.swapped, 2))
        if verdict is not None
    ]
    return fmean(places) if places else None


def read_verdicts(source: str) -> dict[str, list[Judged]]:
    """The verdicts of every judge: rows with `verdicts` = {judge: [in this order, exchanged]}, `label`, `subset`."""
    found: dict[str, list[Judged]] = {}
    for row in read_rows(source):
        label = row[1].get("label")
        for judge, pair in cell(row, "verdicts", Mapping).items():
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(v in (None, 0, 1, 2) for v in pair)):
                raise ValueError(f"{row[0]}: verdicts: found {pair!r} of {judge}, expected two of 1, 2, 0 and null")
            judged = Judged(pair[0], pair[1], label, str(row[1].get("subset", "")))
            found.setdefault(str(judge), []).append(judged)
    return found


# ---- Paraphrases


@dataclass(frozen=True)
class Paraphrased:
    """A question in several wordings, and the answers to choose from."""

    prompts: tuple[Prompt, ...]
    choices: tuple[str, ...]


@dataclass(frozen=True)
class ParaphraseConsistency:
    """The mean share of two wordings of a question for which the same answer is chosen, over questions.

    `unanimous` is the share of questions for which all wordings agree. `ties` counts wordings whose best answers tie:
    such agree with nothing.
    """

    scorer: str
    agreement: Estimate
    unanimous: Estimate
    ties: int


def paraphrase_consistency(reward: Reward, questions: Sequence[Paraphrased], *, seed: int = 0) -> ParaphraseConsistency:
    """Whether a policy (as a likelihood) or a reward chooses the same answer however a question is worded."""
    asked = [(prompt, question.choices) for question in questions for prompt in question.prompts]
    flat = iter(pick(reward, asked))
    picks = [[next(flat) for _ in question.prompts] for question in questions]
    agreements = [fmean(first == second and len(first) == 1 for first, second in combinations(p, 2)) for p in picks]
    return ParaphraseConsistency(
        scorer=reward.name,
        agreement=bootstrap_mean(agreements, seed),
        unanimous=wilson(sum(share == 1 for share in agreements), len(agreements)),
        ties=sum(len(picked) > 1 for row in picks for picked in row),
    )


def read_paraphrases(source: str) -> list[Paraphrased]:
    """Rows with `prompt`, `paraphrases` (a list of other wordings), and `choices` or `chosen` + `rejected`."""
    return [read_paraphrased(row) for row in read_rows(source)]


def read_paraphrased(row: Located) -> Paraphrased:
    where, columns = row
    wordings = [columns.get("prompt"), *cell(row, "paraphrases", list, lambda found: len(found) > 0)]
    prompts = tuple(conversation((where, {**columns, "prompt": wording})) for wording in wordings)
    if "choices" in columns:
        return Paraphrased(prompts, tuple(texts(row, "choices")))
    return Paraphrased(prompts, (cell(row, "chosen", str), cell(row, "rejected", str)))
