"""The report in words: what the figures of a summary say, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.report.summary import START, Interval, inner, interval, is_best_of, method_name, number

NOTABLE_KL = 0.05
"""Nats per answer, below which a comparison at equal KL compares nothing but the start model with itself."""

NOTABLE_CHANGE = 0.1
"""What grew or shrank by more than this share is said to have changed."""


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """The outcome in sentences, best method first; each gain with its interval, its price in KL and its length.

    Of best-of-n the best n speaks for all. A gain whose interval holds zero is called not clear. A method that raised
    the proxy where gold did not rise is named.
    """
    methods = {entry["method"]: entry for entry in summary.get("methods", ())}
    start = methods.pop(START, {})
    measured = [entry for entry in methods.values() if interval(entry, "gold_gain")]
    ranked = _family_once(sorted(measured, key=lambda entry: interval(entry, "gold_gain") or (), reverse=True))
    sentences = [_gain_sentence(entry, start) for entry in ranked]
    sentences += _equal_kl_sentences(summary, start)
    sentences += [_gaming_sentence(entry) for entry in ranked if _is_gamed(entry, start)]
    return [*sentences, *_reward_model_sentences(summary), *map(str, summary.get("notes") or ())]


def _family_once(ranked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    family = [entry for entry in ranked if is_best_of(entry["method"])]
    return [entry for entry in ranked if entry not in family[1:]]


def course(name: str, key: str, evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a held-out figure of one run did from its first evaluation to its last; empty without."""
    seen = [row for row in evals if number(row.get(key)) is not None]
    if not seen:
        return []
    first, last = plain(seen[0][key]), plain(seen[-1][key])
    if len(seen) == 1:
        return [f"Held-out {key} of {name} is {first}{spread(seen[-1], key)}."]
    return [f"Held-out {key} of {name} went from {first} to {last}{spread(seen[-1], key)}."]


def change_in_words(name: str, what: str, gain: Interval) -> str:
    """A change with its interval, as the beginning of a sentence; one whose interval holds zero is not clear."""
    told = f"95% interval {signed(gain.low)} to {signed(gain.high)}"
    if gain.holds_zero:
        return f"{name}: no clear change of the {what} ({signed(gain.value)}, {told}, which holds zero)"
    verb = "raised" if gain.value > 0 else "lowered"
    return f"{name} {verb} the {what} by {abs(gain.value):.2f} ({told})"


def grown(before: float, after: float, more: str, less: str, same: str) -> str:
    """How much a positive figure grew or shrank, such as "20% longer"; `same` for a change that is not notable."""
    change = after / before - 1
    return same if abs(change) <= NOTABLE_CHANGE else f"{abs(change):.0%} {more if change > 0 else less}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, and no sign for what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def plain(value: float, digits: int = 2) -> str:
    """A number with a true minus where it is negative."""
    return signed(value, digits).lstrip("+")


def spread(row: Mapping[str, Any], key: str) -> str:
    """The interval of a figure of a row in brackets, nothing where the row has none."""
    low, high = number(row.get(f"{key}_low")), number(row.get(f"{key}_high"))
    return "" if low is None or high is None else f" (95% interval {plain(low)} to {plain(high)})"


def _gain_sentence(entry: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    gain = interval(entry, "gold_gain")
    assert gain is not None, "only methods with a gain get a sentence"
    said = change_in_words(method_name(entry["method"]), "gold reward", gain)
    return said + _price(entry) + _length_clause(entry, start) + "."


def _price(entry: Mapping[str, Any]) -> str:
    kl = interval(entry, "kl")
    return f", at {plain(kl.value, 1)} nats of KL per answer from the start model" if kl else ""


def _length_clause(entry: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    after, before = interval(entry, "length"), interval(start, "length")
    if not after or not before or before.value <= 0:
        return ""
    return f", with answers {grown(before.value, after.value, 'longer', 'shorter', 'about as long')}"


def _is_gamed(entry: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether the proxy's interval rose clear of the start's while gold did not rise clear of zero."""
    proxy, before, gain = interval(entry, "proxy"), interval(start, "proxy"), interval(entry, "gold_gain")
    if proxy is None or before is None or gain is None:
        return False
    return proxy.low > before.high and gain.low <= 0


def _gaming_sentence(entry: Mapping[str, Any]) -> str:
    name = method_name(entry["method"])
    return f"{name} pleases the reward model more than the start model does, but not the gold reward: read its answers."


def _equal_kl_sentences(summary: Mapping[str, Any], start: Mapping[str, Any]) -> list[str]:
    """What the methods' paths reach at the largest KL that all come to; nothing for less than two, or next to no KL."""
    before, paths = interval(start, "gold"), _frontier_paths(summary)
    if before is None or len(paths) < 2:
        return []
    shared = min(max(kl for kl, _ in path) for path in paths.values())
    reached = {method: _read_off([(0.0, before.value), *path], shared) for method, path in paths.items()}
    if shared < NOTABLE_KL:
        return []
    ranked = sorted(reached.items(), key=lambda found: -found[1])
    told = ", ".join(f"{plain(gold)} by {method_name(method)}" for method, gold in ranked)
    return [
        f"At equal KL ({plain(shared, 1)} nats per answer) the gold reward is {told}: "
        "read off between the measured points, without intervals."
    ]


def _frontier_paths(summary: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """KL and gold reward of each method's points of the frontier."""
    paths: dict[str, list[tuple[float, float]]] = {}
    for point in summary.get("frontier") or ():
        kl, gold = interval(point, "kl"), interval(point, "gold")
        if kl and gold:
            paths.setdefault(point["method"], []).append((kl.value, gold.value))
    return paths


def _read_off(path: Sequence[tuple[float, float]], kl: float) -> float:
    """The gold reward at a KL: on the straight line between the nearest points below and above it."""
    low = max((point for point in path if point[0] <= kl), key=lambda point: point[0])
    high = min((point for point in path if point[0] >= kl), key=lambda point: point[0])
    share = (kl - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
    return low[1] + share * (high[1] - low[1])


def _reward_model_sentences(summary: Mapping[str, Any]) -> list[str]:
    accuracy = interval(inner(summary, "reward_model"), "accuracy")
    if not accuracy:
        return []
    said = (
        f"The reward model orders {accuracy.value:.0%} of the held-out pairs as the labels do "
        f"({accuracy.low:.0%} to {accuracy.high:.0%})"
    )
    return [said + (", not clearly better than a coin." if accuracy.low <= 0.5 else ".")]
