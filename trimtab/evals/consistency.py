"""Whether a verdict survives what should not matter: the order of two answers, the wording of a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from trimtab.evals.choices import pick
from trimtab.evals.intervals import Estimate, bootstrap_mean, wilson
from trimtab.evals.position_bias import TIE, PositionBias, position_bias
from trimtab.evals.rows import Located, cell, conversation, read_rows, texts
from trimtab.judges import Verdict
from trimtab.records import Prompt
from trimtab.rewards import Reward

Better = int | None
"""1 or 2 for the better output, 0 for neither, None where the judge's words could not be read."""


@dataclass(frozen=True)
class Judged:
    """A pair that a judge saw in both orders: the outputs as they stand, then exchanged.

    Both verdicts name outputs, not places. `label` is what people say, None if nobody does.
    """

    given: Better
    swapped: Better
    label: int | None
    group: str = ""

    @property
    def verdict(self) -> Verdict:
        """The same as probabilities that the first output is better."""
        first_is_better = {1: 1.0, 2: 0.0, 0: TIE, None: None}
        return Verdict(first_is_better[self.given], first_is_better[self.swapped])


@dataclass(frozen=True)
class JudgeConsistency:
    """What the order of the outputs does to a judge's verdicts.

    `consistent` is the share of pairs with one verdict in both orders, `accuracy` the mean over both orders,
    `right_both` the share of pairs right in both. Unreadable verdicts are wrong, and their pairs tell nothing of the
    position; in both orders they make a pair consistent, as in LLMBar's published figures.
    """

    judge: str
    consistent: Estimate
    position: PositionBias
    accuracy: Estimate | None
    accuracy_given: Estimate | None
    accuracy_swapped: Estimate | None
    right_both: Estimate | None
    unreadable: int


def judge_consistency(judge: str, pairs: Sequence[Judged], *, seed: int = 0) -> JudgeConsistency:
    """The consistency of one judge; accuracies are None where no pair has a label. Intervals over pairs."""
    labelled = [pair for pair in pairs if pair.label in (1, 2)]
    right = [(pair.given == pair.label, pair.swapped == pair.label) for pair in labelled]
    return JudgeConsistency(
        judge=judge,
        consistent=wilson(sum(pair.given == pair.swapped for pair in pairs), len(pairs)),
        position=position_bias([pair.verdict for pair in pairs], range(len(pairs)), seed),
        accuracy=bootstrap_mean([fmean(both) for both in right], seed) if right else None,
        accuracy_given=wilson(sum(given for given, _ in right), len(right)) if right else None,
        accuracy_swapped=wilson(sum(swapped for _, swapped in right), len(right)) if right else None,
        right_both=wilson(sum(map(all, right)), len(right)) if right else None,
        unreadable=sum((pair.given is None) + (pair.swapped is None) for pair in pairs),
    )


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
