"""The verdict: hand cases, word by word where a word could mislead."""

import pytest

from trimtab.report.words import course, grown, plain, signed, verdict


def figure(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def method(name: str, gain: tuple[float, float, float] | None = None, **figures: object) -> dict[str, object]:
    return {"method": name, **({"gold_gain": figure(*gain)} if gain else {}), **figures}


START = method("start", proxy=figure(0.0, -0.1, 0.1), length={"value": 50.0})


def test_a_clear_gain_says_how_much_at_what_kl_and_length():
    dpo = method("dpo", (0.42, 0.35, 0.49), kl={"value": 12.34}, length={"value": 60.0})
    assert verdict({"methods": [START, dpo]}) == [
        "DPO raised the gold reward by 0.42 (95% interval +0.35 to +0.49), at 12.3 nats of KL per answer "
        "from the start model, with answers 20% longer."
    ]


@pytest.mark.parametrize("gain", [(0.02, -0.05, 0.09), (0.05, 0.0, 0.1), (-0.05, -0.1, 0.0), (0.0, 0.0, 0.0)])
def test_an_interval_that_holds_zero_is_not_clear(gain: tuple[float, float, float]):
    [sentence] = verdict({"methods": [START, method("dpo", gain)]})
    assert "no clear change" in sentence and "holds zero" in sentence
    assert "raised" not in sentence and "lowered" not in sentence


def test_a_loss_is_called_a_loss():
    [sentence] = verdict({"methods": [START, method("dpo", (-0.3, -0.4, -0.2))]})
    assert sentence == "DPO lowered the gold reward by 0.30 (95% interval −0.40 to −0.20)."


def test_the_best_comes_first_and_one_n_speaks_for_best_of_n():
    methods = [START, method("best-of-4", (0.2, 0.1, 0.3)), method("best-of-16", (0.4, 0.3, 0.5))]
    sentences = verdict({"methods": [*methods, method("dpo", (0.3, 0.2, 0.4))]})
    assert [sentence.split()[0] for sentence in sentences] == ["Best-of-16", "DPO"]


def test_paths_are_compared_at_the_largest_kl_that_all_reach():
    start = START | {"gold": figure(0.2, 0.1, 0.3)}
    points = [("best-of-n", 0.0, 0.2), ("best-of-n", 2.0, 0.5), ("dpo", 4.0, 0.6), ("rloo", 1.0, 0.3), ("rloo", 5, 0.9)]
    frontier = [{"method": name, "kl": kl, "gold": gold} for name, kl, gold in points]
    # At 2 nats: best-of-n is there; DPO is half way from 0.2 to 0.6; RLOO a quarter of the way from 0.3 to 0.9.
    told = "At equal KL (2.0 nats per answer) the gold reward is 0.50 by Best-of-n, 0.45 by RLOO, 0.40 by DPO: "
    assert verdict({"methods": [start], "frontier": frontier}) == [
        told + "read off between the measured points, without intervals."
    ]
    assert verdict({"methods": [start], "frontier": frontier[:2]}) == []
    nowhere = {"method": "grpo", "kl": 0.01, "gold": 0.2}
    assert verdict({"methods": [start], "frontier": [*frontier, nowhere]}) == []


@pytest.mark.parametrize(
    ("after", "said"), [(54.0, "about as long"), (56.0, "12% longer"), (40.0, "20% shorter"), (45.0, "about as long")]
)
def test_length(after: float, said: str):
    [sentence] = verdict({"methods": [START, method("dpo", (0.3, 0.2, 0.4), length={"value": after})]})
    assert sentence.endswith(f", with answers {said}.")


def test_a_proxy_that_rose_alone_is_named():
    gamed = method("dpo", (0.02, -0.05, 0.09), proxy=figure(2.0, 1.9, 2.1))
    assert any("read its answers" in sentence for sentence in verdict({"methods": [START, gamed]}))
    honest = method("dpo", (0.3, 0.2, 0.4), proxy=figure(2.0, 1.9, 2.1))
    still = method("dpo", (0.02, -0.05, 0.09), proxy=figure(0.1, 0.0, 0.2))
    for entry in (honest, still):
        assert not any("read its answers" in sentence for sentence in verdict({"methods": [START, entry]}))


@pytest.mark.parametrize(("low", "clear"), [(0.51, True), (0.5, False), (0.44, False)])
def test_a_reward_model_near_a_coin_is_said_to_be_one(low: float, clear: bool):
    [sentence] = verdict({"reward_model": {"accuracy": figure(0.6, low, 0.7)}})
    assert "60% of the held-out pairs" in sentence
    assert ("not clearly better than a coin" not in sentence) == clear


def test_what_was_not_measured_gets_no_sentence():
    assert verdict({}) == []
    assert verdict({"methods": [START, method("dpo", gold={"value": None})]}) == []
    unmeasured = {"method": "dpo", "gold_gain": {"value": None, "low": None, "high": None}}
    assert verdict({"methods": [START, unmeasured]}) == []


def test_the_course_of_a_figure():
    rows = [
        {"step": 0, "reward": -0.5},
        {"step": 9, "reward": 1.25, "reward_low": 1.0, "reward_high": 1.5},
        {"step": 10},
    ]
    assert course("rloo", "reward", rows) == [
        "Held-out reward of rloo went from −0.50 to 1.25 (95% interval 1.00 to 1.50)."
    ]
    assert course("rloo", "reward", rows[:1]) == ["Held-out reward of rloo is −0.50."]
    assert course("rloo", "reward", rows[2:]) == []


@pytest.mark.parametrize(("after", "said"), [(2.5, "25% up"), (1.5, "25% down"), (2.1, "the same"), (1.9, "the same")])
def test_what_has_grown(after: float, said: str):
    assert grown(2.0, after, "up", "down", "the same") == said


def test_numbers_for_people():
    assert [signed(value) for value in (0.126, -0.126, 0.001, -0.001)] == ["+0.13", "−0.13", "0.00", "0.00"]
    assert [plain(value, 1) for value in (1.26, -1.26, -0.01)] == ["1.3", "−1.3", "0.0"]
