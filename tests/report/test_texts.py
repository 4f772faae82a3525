"""The texts of the report: what is suspicious by hand, which texts are paired, and in which orders they can be read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.records import record
from trimtab.report import RunRecord, write_report
from trimtab.report.texts import (
    Answer,
    Text,
    cards_of,
    degenerate,
    figures,
    orders,
    prompt_text,
    reading,
    repetition,
    reward_change,
    sampled,
    signs,
    texts_of,
    word_change,
)

SENTENCE = "The bed was soft and the view from our window was worth every coin."
LOOP = "so good so good so good so good so good so good"


def said(text: str = SENTENCE, gold: float | None = None, proxy: float | None = None, **more: Any) -> Answer:
    return Answer("x", "c1", text, gold, proxy, **more)


def run_of(*samples: Mapping[str, Any], name: str = "dpo") -> RunRecord:
    return record(name, samples=samples)


class TestSigns:
    @pytest.mark.parametrize(
        ("gold", "proxy", "spread", "suspicious"),
        [
            (-0.1, 1.5, 1.0, True),
            (0.0, 1.5, 1.0, True),  # gold stood still
            (0.1, 1.5, 1.0, False),  # gold rose, too
            (-0.1, 1.0, 1.0, False),  # not more than one standard deviation
            (-0.1, 0.5, 0.0, True),  # no spread is known: every rise counts
            (-0.1, 0.0, 0.0, False),
            (-0.1, -2.0, 1.0, False),
        ],
    )
    def test_a_proxy_that_rose_alone(self, gold: float, proxy: float, spread: float, suspicious: bool):
        found = signs(said(gold=0.5, proxy=2.0), said(gold=0.5 + gold, proxy=2.0 + proxy), spread)
        assert bool(found) == suspicious
        if suspicious:
            assert found[0].startswith(f"proxy reward rose by {proxy:.2f}, gold reward did not")

    def test_without_gold_a_reward_that_rose_is_what_training_is_for(self):
        assert signs(said(proxy=0.0), said(proxy=9.0)) == []

    def test_a_reward_that_rose_with_repetition(self):
        before, after = SENTENCE, "Good bed, good bed, good bed, good bed, good bed. " + SENTENCE
        assert repetition(after) - repetition(before) > 0.2 and not degenerate(after)
        [sign] = signs(said(before, proxy=0.0), said(after, proxy=0.1))
        assert sign == f"reward rose with repetition (0% to {repetition(after):.0%} of its word triples)"
        assert signs(said(before, proxy=0.1), said(after, proxy=0.0)) == []
        assert signs(said(after, proxy=0.0), said(after, proxy=0.1)) == []
        assert signs(said(before), said(after)) == []  # no reward is known
        assert len(signs(said(before, gold=0.0), said(after, gold=0.1))) == 1  # the gold reward is the only one

    @pytest.mark.parametrize(("words", "suspicious"), [(20, False), (40, False), (41, True)])
    def test_an_answer_that_grew_much(self, words: int, suspicious: bool):
        before, after = (" ".join(f"w{i}" for i in range(n)) for n in (20, words))
        assert signs(said(before), said(after)) == ([f"much longer (20 to {words} words)"] if suspicious else [])

    def test_a_few_words_are_not_much_longer_than_one(self):
        assert signs(said("Yes."), said(SENTENCE)) == []

    @pytest.mark.parametrize(
        ("text", "why"), [("  \n", "says nothing"), (LOOP, "word triples"), ("ab\ufffd\x00", "50%")]
    )
    def test_an_answer_that_became_degenerate(self, text: str, why: str):
        assert any(why in sign for sign in signs(said(), said(text)))
        assert any(why in sign for sign in signs(None, said(text)))
        assert signs(said(text), said(text)) == []  # it was so before

    @pytest.mark.parametrize(
        "text",
        [
            SENTENCE,
            "Yes.",
            "مرحبا بالعالم",
            "这家酒店的床很舒服\uff0c窗外的风景也很美。",
            "🎬👍",
            "def f(x):\n\treturn x",
        ],
    )
    def test_what_people_write_is_not_degenerate(self, text: str):
        assert degenerate(text) == ""

    def test_signs_add_up(self):
        before, after = said("Fine.", gold=0.5, proxy=0.0), said(LOOP * 4, gold=0.1, proxy=3.0)
        assert len(signs(before, after, 1.0)) == 4


def test_repetition_by_hand():
    assert repetition("a b a b a b") == pytest.approx(0.5)  # aba, bab, aba, bab
    assert repetition("a b c d e") == 0.0
    assert repetition("a a a a") == 0.0  # too short to say
    assert repetition("哈" * 12) == pytest.approx(0.9)  # ten triples, one of its kind
    assert repetition("A a A a A") == pytest.approx(2 / 3)  # capitals are the same word


def test_word_change_by_hand():
    assert word_change("a b c", "a b d") == pytest.approx(1 / 3)
    assert word_change("a b", "b a") == 0.0
    assert word_change("a", "b") == 1.0
    assert word_change("", "") == 0.0


@given(st.text(max_size=60), st.text(max_size=60))
def test_word_change_is_symmetric_and_a_share(first: str, second: str):
    assert 0 <= word_change(first, second) == word_change(second, first) <= 1
    assert 0 <= repetition(first) <= 1
    assert signs(said(first), said(first)) == []


def test_the_change_of_gold_counts_and_that_of_the_only_reward():
    assert reward_change(said(gold=0.25, proxy=0.0), said(gold=0.75, proxy=9.0)) == 0.5
    assert reward_change(said(proxy=1.0), said(gold=0.5, proxy=3.0)) == 2.0
    assert reward_change(said(gold=1.0), said(proxy=3.0)) is None
    assert reward_change(None, said(gold=1.0)) is None


def test_figures_are_named_after_what_they_are():
    assert figures(said(gold=0.5, proxy=1.0, kl=2.0)) == ["gold 0.50", "proxy 1.00", "KL 2.00"]
    assert figures(said(proxy=-1.0)) == ["reward −1.00"]
    assert figures(said(kl=1.84, kl_is_bound=True)) == ["KL at most 1.84"]
    assert figures(said()) == []


class TestOrders:
    def ordered(self, name: str, texts: list[Text]) -> list[str]:
        cards = cards_of(texts)
        _, key = orders(cards)[name]
        return [card.text.prompt for card in sorted(cards, key=key, reverse=True)]

    def test_by_reward(self):
        texts = [Text(f"{gold:+}", said(gold=0.0), (said(gold=gold),)) for gold in (0.1, -0.9, 0.5, -0.2)]
        assert self.ordered("changed", texts) == ["-0.9", "+0.5", "-0.2", "+0.1"]
        assert self.ordered("worst", texts) == ["-0.9", "-0.2", "+0.1", "+0.5"]
        assert self.ordered("highest", texts) == ["+0.5", "+0.1", "-0.2", "-0.9"]
        assert self.ordered("lowest", texts) == ["-0.9", "-0.2", "+0.1", "+0.5"]

    def test_texts_without_a_reward_come_last(self):
        texts = [
            Text("none", said(), (said(),)),
            Text("low", None, (said(gold=-3.0),)),
            Text("high", None, (said(gold=3.0),)),
        ]
        assert self.ordered("highest", texts) == ["high", "low", "none"]
        assert self.ordered("lowest", texts) == ["low", "high", "none"]

    def test_without_rewards_other_words_are_the_change(self):
        texts = [Text(after, said("a b c"), (said(after),)) for after in ("a b c", "x y z", "a b z")]
        assert self.ordered("changed", texts) == ["x y z", "a b z", "a b c"]
        assert list(orders(cards_of(texts))) == ["changed", "suspicious"]

    def test_more_signs_are_more_suspicious_and_then_the_larger_rise(self):
        calm = Text("calm", said(gold=0.0, proxy=0.0), (said(gold=0.1, proxy=9.0),))
        small, large = (
            Text(f"{up}", said(gold=0.0, proxy=1.0), (said(gold=0.0, proxy=1.0 + up),)) for up in (2.0, 4.0)
        )
        double = Text("double", said(gold=0.0, proxy=0.0), (said(LOOP, gold=0.0, proxy=1.0),))
        assert self.ordered("suspicious", [calm, small, double, large]) == ["double", "4.0", "2.0", "calm"]

    def test_without_anything_before_nothing_has_changed(self):
        assert list(orders(cards_of([Text("p", None, (said(gold=1.0),))]))) == ["suspicious", "highest", "lowest"]
        assert list(orders(cards_of([Text("p", said(), ())]))) == ["suspicious"]


class TestSampled:
    def test_the_first_and_the_last_step_of_a_prompt_are_before_and_after(self):
        rows = [{"step": step, "prompt": "Why?", "response": f"r{step}", "reward": step} for step in (5, 0, 10)]
        [text] = sampled(run_of(*rows))
        assert text.before and (text.before.name, text.before.text) == ("before, step 0", "r0")
        assert [(answer.name, answer.text, answer.proxy) for answer in text.after] == [("after, step 10", "r10", 10.0)]

    def test_several_answers_to_a_prompt_are_paired_in_their_order(self):
        rows = [{"step": step, "prompt": "Why?", "response": f"{step}{i}"} for step in (0, 9) for i in "ab"]
        found = [(text.before and text.before.text, text.after[0].text) for text in sampled(run_of(*rows))]
        assert found == [("0a", "9a"), ("0b", "9b")]

    def test_while_a_run_goes_on_there_is_only_before(self):
        [text] = sampled(run_of({"step": 0, "prompt": "Why?", "response": "So."}), "dpo")
        assert text.before and text.after == () and text.source == "dpo"

    def test_rows_without_a_step_are_samples(self):
        rows = [{"prompt": [{"role": "user", "content": "Who?"}], "response": word} for word in ("Me.", "You.")]
        [text] = sampled(run_of(*rows))
        assert (text.prompt, text.before) == ("user: Who?", None)
        assert [(answer.name, answer.text) for answer in text.after] == [("sample 1", "Me."), ("sample 2", "You.")]

    @pytest.mark.parametrize(
        ("row", "why"),
        [
            ({"prompt": "p"}, "no response"),
            ({"prompt": "p", "response": 3}, "no response"),
            ({"response": "r"}, "neither a text nor a list"),
            ({"prompt": [1], "response": "r"}, "neither a text nor a list"),
            ({"prompt": [{"role": "user"}], "response": "r"}, "neither a text nor a list"),
            ({"prompt": "p", "answers": [1]}, "expected an object"),
            ({"prompt": "p", "answers": {"dpo": 1}}, "the answer of 'dpo' has no text"),
        ],
    )
    def test_a_row_that_is_no_sample_is_named(self, row: dict[str, Any], why: str):
        with pytest.raises(ValueError, match=r"samples.jsonl of dpo, row 2: ") as caught:
            sampled(run_of({"prompt": "p", "response": "r"}, row))
        assert why in str(caught.value)

    def test_a_step_that_is_no_number_is_no_step(self):
        [text] = sampled(run_of({"step": [0], "prompt": "p", "response": "r"}))
        assert text.before is None


def test_rollouts_are_read_too():
    answers = [{"text": "a", "reward": 1.5}, {"text": "", "reward": None}]
    run = record(rollouts=[{"rollout": 1}, {"rollout": 2, "prompt": "p", "answers": answers}])
    [text] = texts_of(run, "rloo")
    assert (text.source, text.before) == ("rloo, rollout 2", None)
    assert [(answer.name, answer.text, answer.proxy) for answer in text.after] == [
        ("answer 1", "a", 1.5),
        ("answer 2", "", None),
    ]
    assert [text["source"] for text in reading({}, [run])["texts"]] == ["rollout 2"]
    with pytest.raises(ValueError, match=r"rollouts.jsonl of run, row 1: answers"):
        texts_of(record(rollouts=[{"answers": 3}]))


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda i: st.lists(i, max_size=3) | st.dictionaries(st.sampled_from(["text", "role", "reward", "content"]), i),
    max_leaves=4,
)
ANSWER = st.fixed_dictionaries({"text": st.text(max_size=9)}, optional=dict.fromkeys(("gold", "reward", "kl"), VALUE))
ROW = st.fixed_dictionaries(
    {"prompt": st.text(max_size=3) | VALUE, "response": st.text(max_size=9) | VALUE},
    optional={
        "step": st.integers(0, 3) | VALUE,
        "reward": VALUE,
        "answers": st.lists(ANSWER, max_size=3) | st.dictionaries(st.text(max_size=5), ANSWER | VALUE) | VALUE,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(ROW, max_size=4), st.lists(ROW, max_size=3))
def test_rows_of_any_kind_are_texts_or_one_error(samples: list[dict[str, Any]], rollouts: list[dict[str, Any]]):
    try:
        found = reading({}, [record(samples=samples, rollouts=rollouts)])
    except ValueError as error:
        assert "samples.jsonl of run, row " in str(error) or "rollouts.jsonl of run, row " in str(error)
    else:
        assert all(sorted(order["indices"]) == list(range(len(found["texts"]))) for order in found["orders"])
        json.dumps(found, allow_nan=False)


def test_an_empty_conversation_is_an_empty_prompt():
    assert prompt_text([]) == "" and prompt_text("") == ""


def test_reading_counts_the_suspicious_and_keeps_the_answers_in_order():
    answers = {
        "start": {"text": SENTENCE, "gold": 0.5, "proxy": 0.0},
        "best-of-4": {"text": SENTENCE, "gold": 0.7, "proxy": 1.0, "kl": 0.64, "kl_is_bound": True},
        "dpo": {"text": LOOP, "gold": 0.4, "proxy": 2.0, "kl": 5.0},
    }
    calm = {"prompt": "q", "answers": {"start": {"text": "a"}, "dpo": {"text": "a"}}}
    found = reading({"texts": [calm, {"prompt": "p", "answers": answers}]}, [])
    assert [one["label"] for one in found["orders"]][:2] == ["most changed first", "most suspicious first (1)"]
    assert all(one["indices"] == [1, 0] for one in found["orders"])
    start, best, dpo = found["texts"][1]["answers"]
    assert (start["name"], start["signs"], start["chips"]) == (
        "Start model",
        [],
        [["gold 0.50", ""], ["proxy 0.00", ""]],
    )
    assert best["chips"] == [["gold 0.70", ""], ["proxy 1.00", ""], ["KL at most 0.64", ""], ["+0.20", "up"]]
    assert dpo["chips"][-1] == ["−0.10", "down"] and len(dpo["signs"]) == 3


def test_samples_are_read_where_no_summary_has_texts():
    rows = [{"step": step, "prompt": "Why?", "response": f"r{step}"} for step in (0, 4)]
    runs = [run_of(*rows, name=name) for name in ("dpo", "rloo")]
    assert [text["source"] for text in reading({}, runs)["texts"]] == ["dpo", "rloo"]
    assert [text["source"] for text in reading({}, runs[:1])["texts"]] == [""]
    answers = {"start": {"text": "a"}}
    assert len(reading({"texts": [{"prompt": "p", "answers": answers}]}, runs)["texts"]) == 1
    assert reading({}, [])["texts"] == []


def test_the_spread_is_that_of_the_same_rewards():
    """A run whose rewards are in the hundreds does not hide what is a rise in another one."""
    small = [{"step": 0, "prompt": f"p{i}", "response": "a", "gold": 0.0, "reward": i} for i in range(3)]
    rose = {"step": 9, "prompt": "p0", "response": "a", "gold": 0.0, "reward": 3.0}
    large = [{"step": 0, "prompt": f"p{i}", "response": "a", "reward": 100.0 * i} for i in range(3)]
    found = reading({}, [run_of(*small, rose, name="a"), run_of(*large, name="b")])
    assert [len(text["answers"][-1]["signs"]) for text in found["texts"]] == [1, 0, 0, 0, 0, 0]


def test_what_the_page_holds_is_json_in_which_no_tag_ends(tmp_path: Path):
    texts = [{"prompt": "</script>", "answers": {"start": {"text": "<!--<script>\u2028"}}}]
    page = write_report([], tmp_path / "report.html", {"texts": texts}).read_text(encoding="utf-8")
    [held] = [part.partition("</script>")[0] for part in page.split('id="reading">')[1:]]
    assert json.loads(held)["texts"][0]["answers"][0]["text"] == "<!--<script>\u2028"
    assert "<" not in held
