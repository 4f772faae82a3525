"""Agreement: published examples worked by hand, limits, and planted annotators."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from trimtab.evals.agreement import against_majority, cohen, krippendorff, mean_cohen, raw_agreement

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


def units(rows: Sequence[Sequence[int | None]]) -> list[list[float]]:
    return [[float(value) for value in unit if value is not None] for unit in zip(*rows, strict=True)]


def table(*cells: tuple[str, str, int]) -> tuple[list[str], list[str]]:
    """Two annotators' answers from the cells of a table of counts."""
    rows = [(one, other) for one, other, count in cells for _ in range(count)]
    return [one for one, _ in rows], [other for _, other in rows]


def test_krippendorffs_own_examples() -> None:
    assert krippendorff(units(OBSERVERS)).value == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(units(OBSERVERS), is_interval=True).value == pytest.approx(0.849, abs=5e-4)
    # The same paper, section A: two observers, binary data.
    first, second = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    assert krippendorff(units((first, second))).value == pytest.approx(0.095, abs=5e-4)


@pytest.mark.parametrize(
    ("yes_yes", "yes_no", "no_yes", "no_no", "kappa"),
    [(20, 5, 10, 15, 0.4), (45, 15, 25, 15, 0.1304), (25, 35, 5, 35, 0.2593)],
)
def test_cohens_kappa_by_the_textbook(yes_yes: int, yes_no: int, no_yes: int, no_no: int, kappa: float) -> None:
    said = table(("yes", "yes", yes_yes), ("yes", "no", yes_no), ("no", "yes", no_yes), ("no", "no", no_no))
    assert cohen(*said) == pytest.approx(kappa, abs=5e-5)


def test_limits_of_kappa_and_alpha() -> None:
    assert cohen("abab", "abab") == 1 and cohen("ab", "ba") == -1 and math.isnan(cohen("aa", "aa"))
    with pytest.raises(ValueError, match="got 1 and 2"):
        cohen("a", "ab")
    assert krippendorff([[0, 0], [1, 1], [0, 0, 0]]).value == 1
    assert math.isnan(krippendorff([[1, 1], [1, 1]]).value)
    assert math.isnan(krippendorff([[1], [0]]).value)
    # Coin flips agree by chance alone.
    flips = np.random.default_rng(0).integers(0, 2, (3000, 2)).tolist()
    found = krippendorff(flips)
    assert found.low < 0 < found.high and found.high - found.low < 0.1


def test_alpha_knows_no_names_and_no_order() -> None:
    rows = units(OBSERVERS)
    assert krippendorff([unit[::-1] for unit in rows[::-1]]).value == pytest.approx(krippendorff(rows).value)
    renamed = [[10.0 - value for value in unit] for unit in rows]
    assert krippendorff(renamed).value == pytest.approx(krippendorff(rows).value)


def test_raw_agreement_and_the_majority_by_hand() -> None:
    said = {
        1: {"a": 1.0, "b": 1.0, "c": 0.0},
        2: {"a": 1.0, "b": 1.0},
        3: {"a": 0.0, "b": 1.0, "c": 1.0},
        4: {"a": 1.0},
    }
    # Pairs of votes: 1 of 3, 1 of 1, 1 of 3.
    assert raw_agreement(said).value == pytest.approx(3 / 7) and raw_agreement(said).count == 3
    found = against_majority(said)
    # a: item 1 has others 1 and 0, no majority; item 2 agrees; item 3 does not. c: disagrees on 1, item 3 has 0 and 1.
    assert (found["a"].value, found["a"].count) == (0.5, 2)
    assert (found["b"].value, found["b"].count) == (1.0, 1)
    assert (found["c"].value, found["c"].count) == (0.0, 1)


def test_an_annotator_who_guesses_stands_out() -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 2, 400)
    said = {}
    for item, right in enumerate(truth):
        votes = {f"careful {i}": float(right if generator.random() < 0.9 else 1 - right) for i in range(4)}
        said[item] = votes | {"guesser": float(generator.integers(0, 2))}
    found = against_majority(said)
    assert found["guesser"].low < 0.5 < found["guesser"].high
    assert all(estimate.low > 0.8 for name, estimate in found.items() if name != "guesser")


def test_mean_kappa_needs_items_in_common() -> None:
    said = {item: {"a": float(item % 2), "b": float(item % 2)} for item in range(12)}
    assert mean_cohen(said) == (1.0, 1)
    said |= {f"more {item}": {"a": 1.0, "c": 1.0} for item in range(9)}
    assert mean_cohen(said) == (1.0, 1)
    none, pairs = mean_cohen({1: {"a": 1.0, "b": 0.0}})
    assert math.isnan(none) and pairs == 0
