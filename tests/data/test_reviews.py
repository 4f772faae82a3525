"""The review-writing prompts: distinct, the same for a seed, neutral, and disjoint between the splits."""

import pytest

from trimtab.data.reviews import (
    OPENINGS,
    REQUESTS,
    articled,
    review_openings,
    review_prompts,
    subjects,
)

MAKERS = [review_prompts, review_openings]


@pytest.mark.parametrize("make", MAKERS)
def test_prompts_are_distinct_and_the_same_for_a_seed(make):
    first = make(1000, seed=3, split="train")
    assert len({prompt.messages for prompt in first}) == 1000
    assert first == make(1000, seed=3, split="train")
    assert first != make(1000, seed=4, split="train")


@pytest.mark.parametrize("make", MAKERS)
def test_the_splits_share_no_subject(make):
    parts = {split: make(400, seed=0, split=split) for split in ("train", "heldout")}
    found = {
        split: {(prompt.columns["thing"], prompt.columns["aspect"]) for prompt in prompts}
        for split, prompts in parts.items()
    }
    assert found["train"].isdisjoint(found["heldout"])
    assert found["heldout"] <= set(subjects("heldout"))


def test_the_splits_are_a_partition_and_every_thing_is_in_training():
    train, heldout = subjects("train"), subjects("heldout")
    assert len(set(train) | set(heldout)) == len(train) + len(heldout)
    assert {thing for thing, _ in heldout} <= {thing for thing, _ in train}
    assert 0.2 < len(heldout) / (len(train) + len(heldout)) < 0.3


def test_conversations_ask_and_openings_are_plain_text():
    [asked], [begun] = review_prompts(1, seed=0, split="train"), review_openings(1, seed=0, split="train")
    assert [message.role for message in asked.messages] == ["user"]
    assert begun.is_text
    assert begun.text == begun.text.strip()


@pytest.mark.parametrize("pattern", [*REQUESTS, *OPENINGS])
def test_no_pattern_leans_to_one_side(pattern: str):
    """A lexicon of feelings finds nothing in it, or both sides named together."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    lexicon = SentimentIntensityAnalyzer().lexicon
    words = pattern.lower().replace(".", " ").replace("?", " ").replace(",", " ").replace(":", " ").split()
    leaning = [lexicon.get(word, 0) for word in words if word not in ("like", "honest", "friend")]
    leaning = [value for value in leaning if abs(value) > 1]
    assert abs(sum(leaning)) < 1.5
    assert len(leaning) in (0, 2)


def test_articles_fit_the_vowel():
    assert (
        articled("a review of a online shop and a unit, a airline")
        == "a review of an online shop and a unit, an airline"
    )


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_more_prompts_than_there_are_is_an_error(count: int):
    with pytest.raises(ValueError, match=rf"count: found {count}, expected 1 to \d+ \(heldout has no more prompts\)"):
        review_prompts(count, seed=0, split="heldout")


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split: found 'test', expected train or heldout"):
        review_prompts(1, seed=0, split="test")  # type: ignore[arg-type]
