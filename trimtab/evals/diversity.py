"""How much answers differ: those to one prompt from each other, and those to different prompts.

Kirk et al. 2024 found that RLHF costs both. Every measure is higher for more diverse answers, but self-BLEU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.evals.intervals import Estimate, bootstrap_difference, bootstrap_mean, jackknife

VOCABULARY = 50_257
"""What Kirk et al. 2024 take for the size of the vocabulary."""

LONGEST = 5
"""n-grams of 1 to so many words."""

WORD = re.compile(r"\w+|[^\w\s]")

Embed = Callable[[Sequence[str]], NDArray[np.float64]]
"""Texts to vectors, `[N, D]`."""


@dataclass(frozen=True)
class Diversity:
    """Each measure per input (the mean over prompts of what their answers differ) and across inputs.

    Across inputs, one answer to each prompt is compared, the first. Intervals: over prompts; across inputs a jackknife
    over prompts (for self-BLEU a bootstrap over the texts' own figures).
    """

    inputs: int
    answers: int
    per_input: dict[str, Estimate]
    across_inputs: dict[str, Estimate]


Measure = Callable[[Sequence[str]], float]
"""Some texts to one number; NaN where they are too few or too short to say anything."""


def measures(*, vocabulary: int = VOCABULARY, bleu: bool = False, embed: Embed | None = None) -> dict[str, Measure]:
    """The measures by their names: `distinct_1` to `distinct_5`, their mean `distinct`, self-BLEU, embeddings."""
    if vocabulary < 2:
        raise ValueError(f"the vocabulary has {vocabulary} words: at least 2 are needed")
    found: dict[str, Measure] = {"distinct": lambda texts: distinct(words_of(texts), vocabulary)}
    for n in range(1, LONGEST + 1):
        found[f"distinct_{n}"] = lambda texts, n=n: distinct_ngrams(words_of(texts), n, vocabulary)
    if bleu:
        check_sacrebleu()
        found["self_bleu"] = lambda texts: mean_or_nan(self_bleu(texts))
    if embed is not None:
        found["embedding"] = lambda texts: embedding_diversity(embed(texts))
    return found


def diversity(
    groups: Sequence[Sequence[str]],
    *,
    vocabulary: int = VOCABULARY,
    bleu: bool = False,
    embed: Embed | None = None,
    seed: int = 0,
) -> Diversity:
    """The diversity of answers, `groups` holding those to each prompt. ValueError if there is nothing to compare."""
    if not groups or (len(groups) < 2 and len(groups[0]) < 2):
        raise ValueError("diversity needs at least two answers: several to a prompt, or answers to several prompts")
    named = measures(vocabulary=vocabulary, bleu=bleu, embed=embed)
    values = per_input(groups, named)
    first = [group[0] for group in groups]
    return Diversity(
        inputs=len(groups),
        answers=sum(map(len, groups)),
        per_input={name: bootstrap_mean(kept, seed) for name, found in values.items() if (kept := finite(found))},
        across_inputs=dict(across(first, vocabulary, bleu, embed, seed)) if len(first) > 1 else {},
    )


def distinct_per_input(groups: Sequence[Sequence[str]], seed: int = 0) -> Estimate:
    """`distinct` of the answers to each prompt, the mean over prompts; NaN where no two answers have words."""
    kept = finite(per_input(groups, {"distinct": lambda texts: distinct(words_of(texts))})["distinct"])
    return bootstrap_mean(kept, seed) if kept else Estimate(math.nan, math.nan, math.nan, 0)


def diversity_difference(
    after: Sequence[Sequence[str]], before: Sequence[Sequence[str]], named: Mapping[str, Measure], *, seed: int = 0
) -> dict[str, Estimate]:
    """What the per-input diversity has changed by, over the same prompts in the same order, paired."""
    late, early = per_input(after, named), per_input(before, named)
    found = {}
    for name in named:
        pairs = [(a, b) for a, b in zip(late[name], early[name], strict=True) if math.isfinite(a - b)]
        if pairs:
            found[name] = bootstrap_difference([a for a, _ in pairs], [b for _, b in pairs], seed)
    return found


def per_input(groups: Sequence[Sequence[str]], named: Mapping[str, Measure]) -> dict[str, list[float]]:
    """Every measure of each prompt's answers; NaN for a prompt with one answer."""
    return {
        name: [measure(group) if len(group) > 1 else math.nan for group in groups] for name, measure in named.items()
    }


def across(
    texts: Sequence[str], vocabulary: int, bleu: bool, embed: Embed | None, seed: int
) -> Iterator[tuple[str, Estimate]]:
    """Every measure of one answer to each prompt, with its interval, where it exists."""
    rows = words_of(texts)
    by_n = {n: leave_one_out(rows, n, vocabulary) for n in range(1, LONGEST + 1)}
    alone = {n: distinct_ngrams(rows, n, vocabulary) for n in by_n}
    if math.isfinite(alone[1]):
        usable = [n for n, value in alone.items() if math.isfinite(value)]
        means = [mean_or_nan(values) for values in zip(*(by_n[n] for n in usable), strict=True)]
        yield "distinct", jackknifed(mean_or_nan([alone[n] for n in usable]), means)
        for n in usable:
            yield f"distinct_{n}", jackknifed(alone[n], by_n[n])
    if bleu:
        yield "self_bleu", bootstrap_mean(self_bleu(texts), seed)
    if embed is not None:
        vectors = unit(embed(texts))
        without = [embedding_diversity(np.delete(vectors, i, axis=0)) for i in range(len(texts))]
        yield "embedding", jackknifed(embedding_diversity(vectors), without)


def jackknifed(value: float, without: Sequence[float]) -> Estimate:
    """`jackknife`, or no interval where a figure does not exist without one of the texts."""
    if all(map(math.isfinite, without)):
        return jackknife(value, without)
    return Estimate(value, math.nan, math.nan, len(without))


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def mean_or_nan(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# ---- n-grams


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Every text as lower-case words and punctuation marks."""
    return [WORD.findall(text.lower()) for text in texts]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(rows: Sequence[Sequence[str]], vocabulary: int = VOCABULARY) -> float:
    """The mean of `distinct_ngrams` over n = 1..5, as far as the texts are long enough; NaN without any word."""
    return mean_or_nan(finite([distinct_ngrams(rows, n, vocabulary) for n in range(1, LONGEST + 1)]))


def distinct_ngrams(rows: Sequence[Sequence[str]], n: int, vocabulary: int = VOCABULARY) -> float:
    """Expectation-adjusted distinct n-grams of all texts together: `U / (V (1 - ((V - 1) / V)^C))`.

    Liu et al. 2022: U different n-grams among C, over the number expected of C uniform draws from V; unlike the plain
    ratio it does not fall with length. V is one number for every n, as in Kirk et al. 2024; deviation: words, not a
    model's tokens. NaN where there is no n-gram.
    """
    grams = [gram for words in rows for gram in ngrams(words, n)]
    return adjusted(len(set(grams)), len(grams), vocabulary)


def adjusted(different: int, count: int, vocabulary: int) -> float:
    """Different ones over how many are expected among `count` draws."""
    expected = -vocabulary * math.expm1(count * math.log1p(-1 / vocabulary))
    return different / expected if expected else math.nan


def leave_one_out(rows: Sequence[Sequence[str]], n: int, vocabulary: int) -> list[float]:
    """`distinct_ngrams` without each of the texts; NaN where no n-gram is left then."""
    sets = [set(ngrams(words, n)) for words in rows]
    sizes = [max(len(words) - n + 1, 0) for words in rows]
    holders = Counter(gram for grams in sets for gram in grams)
    total = sum(sizes)
    found = []
    for grams, size in zip(sets, sizes, strict=True):
        own = sum(holders[gram] == 1 for gram in grams)
        found.append(adjusted(len(holders) - own, total - size, vocabulary))
    return found


# ---- Self-BLEU and embeddings


def self_bleu(texts: Sequence[str]) -> list[float]:
    """The BLEU of each text against all others, 0 to 100 (Zhu et al. 2018); high where they repeat each other.

    By sacrebleu, with the effective order for short texts.
    """
    metric: Any = import_module("sacrebleu.metrics").BLEU(effective_order=True)
    others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
    return [float(metric.sentence_score(text, rest).score) for text, rest in zip(texts, others, strict=True)]


def check_sacrebleu() -> None:
    """ValueError, saying what to install, where sacrebleu is absent."""
    if find_spec("sacrebleu") is None:
        raise ValueError("self-BLEU needs sacrebleu, which is not installed: pip install '.[eval]'")


def embedding_diversity(vectors: NDArray[np.float64]) -> float:
    """1 - the mean cosine of all pairs of different rows (Kirk et al. 2024); NaN for fewer than two."""
    count = len(vectors)
    if count < 2:
        return math.nan
    total = unit(vectors).sum(0)
    return 1 - float((total @ total - count) / (count * (count - 1)))


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)
