"""Texts to read: the answers to a prompt side by side, what is suspicious about them, and the orders to read them in.

The page gets them as JSON and makes a bounded number of them visible at a time, so that thousands are no burden.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import pstdev
from typing import Any

from trimtab.report.read import RunRecord
from trimtab.report.summary import START, interval, method_color, method_name, number
from trimtab.report.words import plain, signed

RISE = 1.0
"""A proxy reward rose notably by more than so many standard deviations of the answers before training."""
LONGER, MANY_WORDS = 2.0, 20
"""An answer grew much if it has more than so many times the words, and so many words more."""
MORE_REPEATED = 0.2
"""By so much the repeated share of an answer must have grown to be said beside a reward that rose."""
MOSTLY_REPEATED = 0.5
"""From this repeated share on, an answer is degenerate."""
UNREADABLE = 0.1
"""From this share of unreadable characters on, an answer is degenerate."""

# Scripts that set no spaces between words count by the character.
PIECES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
BROKEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufffd]")


@dataclass(frozen=True)
class Answer:
    """What one method, or one step of a run, said to a prompt. Rewards and KL (nats) are None where nobody measured."""

    name: str
    color: str
    text: str
    gold: float | None = None
    proxy: float | None = None
    kl: float | None = None
    kl_is_bound: bool = False

    @property
    def reward(self) -> float | None:
        """The gold reward, or what there is instead."""
        return self.proxy if self.gold is None else self.gold


@dataclass(frozen=True)
class Text:
    """A prompt and the answers to it: what was said before, None if unknown, and what was said after."""

    prompt: str
    before: Answer | None
    after: tuple[Answer, ...]
    source: str = ""
    """The run that it is of, where there are several, and its rollout."""

    @property
    def changes(self) -> list[float]:
        """The rewards after, minus the reward before."""
        return [change for answer in self.after if (change := reward_change(self.before, answer)) is not None]

    @property
    def rewards(self) -> list[float]:
        """The rewards after; of a text with nothing after, the reward before."""
        answers = self.after or ((self.before,) if self.before else ())
        return [answer.reward for answer in answers if answer.reward is not None]

    @property
    def reworded(self) -> float:
        """The largest `word_change` from before to after."""
        if self.before is None:
            return 0.0
        return max((word_change(self.before.text, answer.text) for answer in self.after), default=0.0)


@dataclass(frozen=True)
class Card:
    """A text as the page shows it: with the signs of each answer after, and the largest rise of a proxy reward.

    The rise is in standard deviations of the rewards before.
    """

    text: Text
    signs: list[list[str]]
    rise: float

    @property
    def suspicion(self) -> tuple[int, float]:
        """What "most suspicious first" sorts by: how many signs there are, then the rise."""
        return sum(map(len, self.signs)), self.rise


# ---- Suspicion


def signs(before: Answer | None, after: Answer, spread: float = 0.0) -> list[str]:
    """Why an answer is suspicious, in words; empty if it is not. `spread` is the standard deviation of proxies before.

    An answer is suspicious

    - if its proxy reward rose by more than `RISE` times `spread` while its gold reward did not rise: what was learned
      pleases the proxy alone;
    - if the reward that it was chosen or trained by rose, and with it the share of repeated word triples (by more than
      `MORE_REPEATED`): repetition may be what pays;
    - if it has more than `LONGER` times the words, and more than `MANY_WORDS` words more: length may be what pays;
    - if it is `degenerate` and the answer before was not.

    Without an answer before only the last can be told. A sign is a reason to read, no proof.
    """
    found = [_degenerate_sign(before, after)]
    if before is not None:
        found += [_proxy_sign(before, after, spread), _repetition_sign(before, after), _length_sign(before, after)]
    return [sign for sign in found if sign]


def _proxy_sign(before: Answer, after: Answer, spread: float) -> str:
    if before.gold is None or after.gold is None:
        return ""
    rise, gold = proxy_rise(before, after), after.gold - before.gold
    if rise <= RISE * spread or gold > 0:
        return ""
    return f"proxy reward rose by {plain(rise)}, gold reward did not ({signed(gold)})"


def _repetition_sign(before: Answer, after: Answer) -> str:
    rise = proxy_rise(before, after) or reward_change(before, after) or 0.0
    low, high = repetition(before.text), repetition(after.text)
    if rise <= 0 or high - low <= MORE_REPEATED:
        return ""
    return f"reward rose with repetition ({low:.0%} to {high:.0%} of its word triples)"


def _length_sign(before: Answer, after: Answer) -> str:
    short, long = len(pieces(before.text)), len(pieces(after.text))
    if long <= LONGER * short or long - short <= MANY_WORDS:
        return ""
    return f"much longer ({short} to {long} words)"


def _degenerate_sign(before: Answer | None, after: Answer) -> str:
    return "" if before is not None and degenerate(before.text) else degenerate(after.text)


def degenerate(text: str) -> str:
    """What makes this no text that a person would write, in words: nothing said, broken characters, repetition."""
    if not text.strip():
        return "says nothing"
    broken = len(BROKEN.findall(text)) / len(text)
    if broken >= UNREADABLE:
        return f"{broken:.0%} of its characters are unreadable"
    share = repetition(text)
    return f"{share:.0%} of its word triples are repeated" if share >= MOSTLY_REPEATED else ""


def pieces(text: str) -> list[str]:
    """Words and signs in lower case; in scripts without spaces, characters."""
    return PIECES.findall(text.lower())


def repetition(text: str) -> float:
    """1 - (different triples of neighbouring words) / (all of them); 0 for answers of fewer than five words."""
    words = pieces(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if len(words) >= 5 else 0.0


def word_change(before: str, after: str) -> float:
    """The share of words that two texts do not have in common: 0 for the same words in any order, 1 for no common one.

    One minus Dice's coefficient of the bags of words.
    """
    first, second = Counter(pieces(before)), Counter(pieces(after))
    total = first.total() + second.total()
    return 1 - 2 * (first & second).total() / total if total else 0.0


def reward_change(before: Answer | None, after: Answer) -> float | None:
    """The reward after minus the reward before: of gold where both have it, else of the proxy."""
    if before is None:
        return None
    for first, second in ((before.gold, after.gold), (before.proxy, after.proxy)):
        if first is not None and second is not None:
            return second - first
    return None


def proxy_rise(before: Answer, after: Answer) -> float:
    """The proxy reward after minus the one before, 0 where one is unknown."""
    return 0.0 if before.proxy is None or after.proxy is None else after.proxy - before.proxy


def cards_of(found: Sequence[Text]) -> list[Card]:
    """Texts that were scored by the same rewards, with their signs."""
    before = [text.before.proxy for text in found if text.before and text.before.proxy is not None]
    spread = pstdev(before) if len(before) > 1 else 0.0
    return [_card(text, spread) for text in found]


def _card(text: Text, spread: float) -> Card:
    rises = [proxy_rise(text.before, answer) for answer in text.after] if text.before else []
    return Card(
        text, [signs(text.before, answer, spread) for answer in text.after], max(rises, default=0.0) / (spread or 1.0)
    )


# ---- Orders

Order = tuple[str, Callable[[Card], Any]]

ORDERS: dict[str, Order] = {
    "changed": ("most changed first", lambda card: (max(map(abs, card.text.changes), default=0.0), card.text.reworded)),
    "suspicious": ("most suspicious first", lambda card: card.suspicion),
    "worst": ("got worse first", lambda card: -min(card.text.changes, default=float("inf"))),
    "highest": ("highest reward first", lambda card: max(card.text.rewards, default=float("-inf"))),
    "lowest": ("lowest reward first", lambda card: -min(card.text.rewards, default=float("inf"))),
}
"""By name: what the reader chooses, and what it sorts by, largest first."""


def orders(cards: Sequence[Card]) -> dict[str, Order]:
    """The orders that mean something for these texts; the first one is the page's own choice."""
    needed = {
        "changed": any(card.text.before and card.text.after for card in cards),
        "worst": any(card.text.changes for card in cards),
        "highest": any(card.text.rewards for card in cards),
        "lowest": any(card.text.rewards for card in cards),
    }
    return {name: order for name, order in ORDERS.items() if needed.get(name, True)}


# ---- What the page reads


def reading(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """All texts and their orders, for the page's script; where a summary has no texts, the samples of the runs."""
    told = enumerate(summary.get("texts") or (), 1)
    cards = cards_of([_told_of("texts of the summary", place, _of_summary, entry) for place, entry in told])
    cards = cards or [card for run in runs for card in cards_of(texts_of(run, run.name if len(runs) > 1 else ""))]
    suspicious = sum(any(card.signs) for card in cards)
    return {
        "texts": [_shown(card) for card in cards],
        "orders": [
            {
                "name": name,
                "label": f"{label} ({suspicious})" if name == "suspicious" else label,
                "indices": sorted(range(len(cards)), key=lambda i: key(cards[i]), reverse=True),
            }
            for name, (label, key) in orders(cards).items()
        ],
    }


def _shown(card: Card) -> dict[str, Any]:
    before = card.text.before
    answers = [_shown_answer(before, None, [])] if before else []
    answers += [_shown_answer(answer, before, found) for answer, found in zip(card.text.after, card.signs, strict=True)]
    return {"prompt": card.text.prompt, "source": card.text.source, "answers": answers}


def _shown_answer(answer: Answer, before: Answer | None, found: list[str]) -> dict[str, Any]:
    chips = [[text, ""] for text in figures(answer)]
    change = reward_change(before, answer)
    if change is not None:
        chips.append([signed(change), "up" if change > 0.005 else "down" if change < -0.005 else ""])
    return {"name": answer.name, "color": answer.color, "text": answer.text, "chips": chips, "signs": found}


def figures(answer: Answer) -> list[str]:
    """The measured figures of an answer, for people."""
    kl_name = "KL at most" if answer.kl_is_bound else "KL"
    named = {"gold": answer.gold, "reward" if answer.gold is None else "proxy": answer.proxy, kl_name: answer.kl}
    return [f"{name} {plain(value)}" for name, value in named.items() if value is not None]


# ---- Where texts come from


def _of_summary(entry: Mapping[str, Any], source: str = "") -> Text:
    if not isinstance(entry.get("answers"), Mapping):
        raise ValueError("answers: expected an object with a method's name for each answer")
    answers = {method: _answer(method, answer) for method, answer in entry["answers"].items()}
    before = answers.pop(START, None)
    return Text(prompt_text(entry.get("prompt")), before, tuple(answers.values()), source)


def _answer(method: str, answer: Mapping[str, Any]) -> Answer:
    if not isinstance(answer, Mapping) or "text" not in answer:
        raise ValueError(f"the answer of {method!r} has no text")
    bound = answer.get("kl_is_bound") is True
    return Answer(method_name(method), method_color(method), str(answer["text"]), *_measured(answer), kl_is_bound=bound)


def _measured(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Gold reward, proxy reward (or the only one that there is) and KL."""
    found = (interval(row, "gold"), interval(row, "proxy") or interval(row, "reward"), interval(row, "kl"))
    gold, proxy, kl = (one.value if one else None for one in found)
    return gold, proxy, kl


def texts_of(run: RunRecord, source: str = "") -> list[Text]:
    """What a run's policy said: its samples, then the rollouts of online RL. ValueError names the row that is none."""
    rollouts = [(place, row) for place, row in enumerate(run.rollouts, 1) if "answers" in row]
    with_places = [_told_of(f"rollouts.jsonl of {run.name}", place, _rollout, row, source) for place, row in rollouts]
    return sampled(run, source) + with_places


def _told_of(file: str, place: int, read: Callable[..., Any], *given: Any) -> Any:
    try:
        return read(*given)
    except ValueError as error:
        raise ValueError(f"{file}, row {place}: {error}.") from None


def sampled(run: RunRecord, source: str = "") -> list[Text]:
    """Of every prompt the answers of its first sampled step beside those of its last.

    A row with the answers of several methods, as in a summary, is a text of its own.
    """
    whole: list[Text] = []
    by_prompt: dict[str, dict[float | None, list[Mapping[str, Any]]]] = {}
    for place, row in enumerate(run.samples, 1):
        if "answers" in row:
            whole.append(_told_of(f"samples.jsonl of {run.name}", place, _of_summary, row, source))
        else:
            prompt, step = _told_of(f"samples.jsonl of {run.name}", place, _key, row)
            by_prompt.setdefault(prompt, {}).setdefault(step, []).append(row)
    return whole + [text for prompt, by_step in by_prompt.items() for text in _paired(prompt, by_step, source)]


def _key(row: Mapping[str, Any]) -> tuple[str, float | None]:
    if not isinstance(row.get("response"), str):
        raise ValueError("it has no response that is a text")
    return prompt_text(row.get("prompt")), number(row.get("step"))


def _rollout(row: Mapping[str, Any], source: str) -> Text:
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(one, Mapping) and "text" in one for one in answers):
        raise ValueError("answers: expected a list of objects with a text")
    said = [Answer(f"answer {place}", "c1", str(one["text"]), *_measured(one)) for place, one in enumerate(answers, 1)]
    named = ", ".join(part for part in (source, f"rollout {row.get('rollout', '')}") if part)
    return Text(prompt_text(row.get("prompt")), None, tuple(said), named)


def _paired(prompt: str, by_step: Mapping[float | None, Sequence[Mapping[str, Any]]], source: str) -> Iterator[Text]:
    unstepped = [_sample(row, f"sample {place}", "c1") for place, row in enumerate(by_step.get(None, ()), 1)]
    if unstepped:
        yield Text(prompt, None, tuple(unstepped), source)
    steps = sorted(step for step in by_step if step is not None)
    if not steps:
        return
    first, last = steps[0], steps[-1]
    for early, late in zip_longest(by_step[first], by_step[last] if last > first else ()):
        before = _sample(early, f"before, step {first:g}", "c0") if early else None
        yield Text(prompt, before, (_sample(late, f"after, step {last:g}", "c1"),) if late else (), source)


def _sample(row: Mapping[str, Any], name: str, color: str) -> Answer:
    return Answer(name, color, row["response"], *_measured(row))


def prompt_text(prompt: Any) -> str:
    """A prompt as text: a string as it stands, a conversation with its roles. ValueError for anything else."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(
        isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in prompt
    ):
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    raise ValueError("its prompt is neither a text nor a list of messages with role and content")
