"""Calibration by hand numbers, and on margins that are what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.evals.calibration import calibration


def margin(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_error_by_hand() -> None:
    # Two bins of [0.5, 1]. The lower: confidences 0.6 (right) and 0.7 (wrong), a tie at 0.5: accuracy 1.5 / 3 against
    # 0.6. The upper: 0.9 (right) and 0.8 (right): 1 against 0.85.
    found = calibration([margin(0.6), -margin(0.7), 0.0, margin(0.9), margin(0.8)], bins=2)
    assert found.error.value == pytest.approx(3 / 5 * 0.1 + 2 / 5 * 0.15)
    assert [(one.low, one.high) for one in found.bins] == [(0.5, 0.75), (0.75, 1.0)]
    assert [one.confidence for one in found.bins] == pytest.approx([0.6, 0.85])
    assert [one.accuracy.value for one in found.bins] == pytest.approx([0.5, 1.0])
    assert [one.accuracy.count for one in found.bins] == [3, 2]


def test_certain_and_right_has_no_error_and_certain_and_wrong_has_all() -> None:
    assert calibration([40.0] * 5).error.value == 0
    assert calibration([-40.0] * 5).error.value == pytest.approx(1)
    assert calibration([0.0] * 4).error.value == 0, "equal scores claim half and are half right"


def test_margins_that_mean_what_they_say_have_a_small_error_and_doubled_ones_a_large_one() -> None:
    generator = np.random.default_rng(0)
    true = np.abs(generator.normal(0, 1.5, 20_000))
    right = generator.random(20_000) < 1 / (1 + np.exp(-true))
    margins = np.where(right, true, -true)
    assert calibration(margins.tolist()).error.high < 0.02
    doubled = calibration((3 * margins).tolist()).error
    assert doubled.low > 0.05


def test_nothing_to_calibrate_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibration([])
