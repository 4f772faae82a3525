"""The bridge: where an answer begins and ends, what carries loss, and what happens to rows that are too long."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tokenizers as small
from tests.tokenizers import BOS, END, EOS, KINDS, TEMPLATES
from trimtab.batches import split
from trimtab.records import Demonstration, Feedback, Message, Preference, Prompt, Ranking
from trimtab.tokens import (
    OVERLONG,
    Encoded,
    Row,
    decode,
    demonstration_batch,
    encode,
    encode_answer,
    encode_feedback,
    encode_prompt,
    encode_prompts,
    feedback_batch,
    fit,
    mismatched,
    pad,
    pad_id,
    pair_batch,
    ranking_batch,
    show,
    stop_ids,
    tokenize,
)

QUESTION = Prompt.from_user("the question")
CONVERSATION = Prompt(
    (
        Message("user", "the question"),
        Message("assistant", "the first answer"),
        Message("user", "another"),
        Message("assistant", "the second"),
        Message("user", "the last question"),
    ),
    source="talk.jsonl:3",
)
SPECIAL = (small.BOS, small.EOS, small.PAD, small.END)
SHARED = Path(__file__).parents[1] / "../shared/data"

letters = st.characters(exclude_categories=("Cs",))
contents = st.one_of(
    st.text(letters, max_size=30),
    st.sampled_from(
        ["", " ", "\n", "\n\nthe answer", " yes", "\nno ", "the answer\n\n", "\u00e9\u0301 \U0001f469\u200d\U0001f467"]
    ),
)


@cache
def tokenizer_of(kind: str, template: str, adds_bos: bool = False, pad_is_eos: bool = False):
    return KINDS[kind](TEMPLATES[template], adds_bos=adds_bos, pad_is_eos=pad_is_eos)


def words(tokenizer, row: Row) -> list[str]:
    """The texts of the stretches that carry loss."""
    stretches, previous = [], False
    for token, carries_loss in zip(row.ids, row.response, strict=True):
        if carries_loss:
            stretches = stretches if previous else [*stretches, []]
            stretches[-1].append(token)
        previous = carries_loss
    return [tokenizer.decode(ids) for ids in stretches]


def closing_of(tokenizer, template: str) -> int:
    return tokenizer.convert_tokens_to_ids(END if template == "closed by end of turn" else EOS)


# ---- Properties that hold for every template, tokenizer and text


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "merging"])
@given(
    template=st.sampled_from(sorted(set(TEMPLATES) - {"instruction"})),
    adds_bos=st.booleans(),
    question=contents,
    response=contents,
)
@settings(max_examples=60, deadline=None)
def test_answer_follows_the_prompt_and_is_closed_once(kind, pad_is_eos, template, adds_bos, question, response):
    tokenizer = tokenizer_of(kind, template, adds_bos, pad_is_eos)
    prompt = Prompt.from_user(question)
    start = encode_prompt(tokenizer, prompt)
    row = encode_answer(tokenizer, prompt, response)
    answer = row.ids[len(start) :]
    assert row.ids[: len(start)] == start
    assert decode(tokenizer, answer) == tokenizer.decode(answer[:-1]) == response
    assert answer.count(closing_of(tokenizer, template)) == 1
    assert answer[-1] == closing_of(tokenizer, template)
    assert row.response == [False] * len(start) + [True] * len(answer)
    assert row.ids.count(tokenizer.bos_token_id) == (adds_bos or template == "writes bos")


@pytest.mark.parametrize("kind", ["byte level", "merging"])
@given(adds_bos=st.booleans(), pad_is_eos=st.booleans(), question=contents, response=contents)
@settings(max_examples=60, deadline=None)
def test_plain_text_follows_the_same_rules(kind, adds_bos, pad_is_eos, question, response):
    tokenizer = tokenizer_of(kind, "closed by end of turn", adds_bos, pad_is_eos)
    prompt = Prompt.from_text(question)
    start = encode_prompt(tokenizer, prompt)
    row = encode_answer(tokenizer, prompt, response)
    assert row.ids[: len(start)] == start
    assert tokenizer.decode(start, skip_special_tokens=True) == question
    assert tokenizer.decode(row.ids[len(start) : -1]) == response
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert row.ids.count(tokenizer.bos_token_id) == adds_bos
    assert sum(row.response) == len(row.ids) - max(len(start), 1)
    assert not row.response[0]


@pytest.mark.parametrize("legacy", [False, True])
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    question=st.text("answer the\n", max_size=12),
    response=st.text("answer the\n\u00e9", max_size=12).map(str.strip),
)
@settings(max_examples=60, deadline=None)
def test_sentencepiece_answers_get_no_prefix_space(legacy, template, question, response):
    tokenizer = small.prefix_space(TEMPLATES[template], legacy=legacy)
    prompt = Prompt.from_user(question)
    start = encode_prompt(tokenizer, prompt)
    row = encode_answer(tokenizer, prompt, response)
    lead = " " if template == "instruction" and response else ""
    assert row.ids[: len(start)] == start
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row.ids[:-1]).strip(" ") == (tokenizer.decode(start) + lead + response).strip(" ")


@pytest.mark.parametrize("kind", ["byte level", "merging"])
@given(
    template=st.sampled_from(sorted(set(TEMPLATES) - {"trimmed", "instruction"})), earlier=contents, response=contents
)
@settings(max_examples=60, deadline=None)
def test_all_turns_carry_loss_and_nothing_else_does(kind, template, earlier, response):
    tokenizer = tokenizer_of(kind, template)
    messages = (Message("user", "hello"), Message("assistant", earlier), Message("user", "and?"))
    row = encode_answer(tokenizer, Prompt(messages), response, turns="all")
    rendered = encode_prompt(tokenizer, Prompt(messages))
    closing = tokenizer.decode([closing_of(tokenizer, template)])
    closes = template not in ("closed by nothing", "without markers")
    expected = [earlier + (closing if closes else ""), response + closing]
    assert words(tokenizer, row) == [text for text in expected if text]
    assert tokenizer.decode(row.ids) == tokenizer.decode(rendered) + response + closing


# ---- The boundary


def test_a_token_that_straddles_the_boundary_is_cut_there():
    tokenizer = small.merging()
    prompt, response = Prompt.from_text("the question\n"), "\nthe answer"
    start = encode_prompt(tokenizer, prompt)
    whole = tokenizer("the question\n\nthe answer")["input_ids"]
    assert whole[: len(start)] != start
    row = encode_answer(tokenizer, prompt, response)
    assert row.ids[: len(start)] == start
    assert tokenizer.decode(row.ids[len(start) : -1]) == response


def test_where_nothing_straddles_the_whole_is_tokenized_at_once():
    tokenizer = small.merging()
    row = encode_answer(tokenizer, Prompt.from_text("the question"), " is yes")
    assert row.ids[:-1] == tokenizer("the question is yes")["input_ids"]


def test_a_trailing_space_of_a_text_prompt_does_not_become_two():
    tokenizer = small.prefix_space()
    row = encode_answer(tokenizer, Prompt.from_text("the answer: "), "yes")
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == "the answer: yes"
    assert tokenizer.convert_ids_to_tokens([i for i, r in zip(row.ids, row.response, strict=True) if r]) == [
        *"yes",
        EOS,
    ]


def test_a_space_that_merges_with_the_first_word_is_the_policys():
    tokenizer = small.prefix_space(small.INSTRUCTION)
    row = encode_answer(tokenizer, QUESTION, "yes")
    official = "<s>[INST] the question [/INST] yes</s>"
    assert row.ids == tokenizer(official, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encode_prompt(tokenizer, QUESTION)).endswith("[/INST]")


def test_earlier_turns_too_get_the_space_that_merges():
    tokenizer = small.prefix_space(small.INSTRUCTION)
    row = encode_answer(tokenizer, CONVERSATION, "yes", turns="all")
    assert row.ids == encode_answer(tokenizer, CONVERSATION, "yes").ids
    assert words(tokenizer, row) == ["the first answer" + EOS, "the second" + EOS, "yes" + EOS]


def test_the_assistant_marker_is_there_without_a_generation_prompt():
    tokenizer = small.byte_level(small.WITHOUT_GENERATION_PROMPT)
    row = encode_answer(tokenizer, QUESTION, "yes")
    assert tokenizer.decode(row.ids) == f"<|user|>\nthe question{EOS}<|assistant|>\nyes{EOS}"


def test_a_template_without_markers_has_no_empty_mask():
    tokenizer = small.byte_level(small.WITHOUT_MARKERS)
    assert words(tokenizer, encode_answer(tokenizer, QUESTION, "yes")) == ["yes" + EOS]


def test_many_prompts_are_the_same_as_one_by_one():
    tokenizer = small.merging(small.DEFAULT_SYSTEM, adds_bos=True)
    prompts = [QUESTION, Prompt.from_text("the"), CONVERSATION, Prompt.from_text("")]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_answers_are_tokenized_as_if_with_their_whole_prompt(kind, template):
    """The short cut at the last special token gives what the long way gives."""
    tokenizer = tokenizer_of(kind, template)
    for response in ("the answer", "\n\nyes", " no"):
        start = encode_prompt(tokenizer, CONVERSATION)
        rendered = tokenizer.apply_chat_template(
            [*({"role": m.role, "content": m.content} for m in CONVERSATION.messages)],
            add_generation_prompt=True,
            tokenize=False,
        )
        if template in ("without generation prompt", "instruction"):
            continue
        whole = tokenizer(rendered + response, add_special_tokens=False)["input_ids"]
        if whole[: len(start)] == start:
            assert encode_answer(tokenizer, CONVERSATION, response).ids[:-1] == whole


# ---- Beginning and end


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [small.CLOSED_BY_EOS, small.WRITES_BOS])
def test_one_bos_whoever_writes_it(template, adds_bos):
    tokenizer = small.byte_level(template, adds_bos=adds_bos)
    ids = encode_prompt(tokenizer, QUESTION)
    expected = adds_bos or template == small.WRITES_BOS
    assert ids.count(tokenizer.bos_token_id) == expected
    assert (ids[0] == tokenizer.bos_token_id) == expected


def test_text_that_spells_its_bos_and_eos_has_each_once():
    tokenizer = small.byte_level(None, adds_bos=True)
    row = encode_answer(tokenizer, Prompt.from_text(""), f"{BOS}hello{EOS}")
    assert tokenizer.decode(row.ids) == f"{BOS}hello{EOS}"
    assert row.response == [False] + [True] * 6
    row = encode_answer(tokenizer, Prompt.from_text(f"{BOS}hel"), "lo")
    assert tokenizer.decode(row.ids) == f"{BOS}hello{EOS}"


@pytest.mark.parametrize(
    "spelled", ["yes", f"yes{END}", f"yes{END}\n", f"yes{EOS}", f"yes{END}{EOS}", f"yes{END} {END}"]
)
def test_a_spelled_out_end_is_not_doubled(spelled):
    tokenizer = small.byte_level(small.CLOSED_BY_END_OF_TURN)
    assert encode_answer(tokenizer, QUESTION, spelled) == encode_answer(tokenizer, QUESTION, "yes")


def test_special_tokens_within_an_answer_are_ordinary_text():
    tokenizer = small.merging()
    response = f"the {EOS} is {BOS} not the end"
    row = encode_answer(tokenizer, QUESTION, response)
    answer = [token for token, carries_loss in zip(row.ids, row.response, strict=True) if carries_loss]
    assert answer.count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in answer
    assert decode(tokenizer, answer) == response
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id], "the tokenizer itself is as before"


def test_special_tokens_in_plain_text_are_themselves():
    tokenizer = small.byte_level(None)
    row = encode_answer(tokenizer, Prompt.from_text(""), f"one{END}two")
    assert row.ids.count(tokenizer.convert_tokens_to_ids(END)) == 1


def test_an_empty_answer_still_ends():
    tokenizer = small.byte_level()
    row = encode_answer(tokenizer, QUESTION, "")
    assert words(tokenizer, row) == [EOS]


def test_an_empty_prompt_without_bos_has_no_loss_at_zero():
    tokenizer = small.byte_level(None)
    row = encode_answer(tokenizer, Prompt.from_text(""), "hi")
    assert encode_prompt(tokenizer, Prompt.from_text("")) == []
    assert row.response == [False, True, True]


def test_stop_ids_are_eos_the_templates_end_and_the_generation_configs():
    tokenizer = small.byte_level(small.CLOSED_BY_END_OF_TURN)
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)
    assert stop_ids(tokenizer, None) == {eos, end}
    assert stop_ids(tokenizer, 3) == {eos, end, 3}
    assert stop_ids(tokenizer, [3, 4]) == {eos, end, 3, 4}
    assert stop_ids(small.byte_level(None), [0]) == {eos, 0}


def test_pad_id_is_eos_where_there_is_no_pad_token():
    tokenizer = small.byte_level()
    assert pad_id(tokenizer) == tokenizer.convert_tokens_to_ids(small.PAD)
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


# ---- Several turns


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_turns_asked_for(kind, template):
    tokenizer = tokenizer_of(kind, template)
    closing = tokenizer.decode([closing_of(tokenizer, template)])
    between = "" if template in ("closed by nothing", "without markers") else closing
    last = encode_answer(tokenizer, CONVERSATION, "yes")
    every = encode_answer(tokenizer, CONVERSATION, "yes", turns="all")
    assert [text.strip(" ") for text in words(tokenizer, last)] == ["yes" + closing]
    assert [text.strip(" ") for text in words(tokenizer, every)] == [
        "the first answer" + between,
        "the second" + between,
        "yes" + closing,
    ]
    assert tokenizer.decode(last.ids) == tokenizer.decode(every.ids)


def test_earlier_turns_that_the_template_trims_are_found():
    tokenizer = small.byte_level(small.TRIMMED)
    messages = (Message("user", "a"), Message("assistant", " b\n"), Message("user", "c"))
    assert words(tokenizer, encode_answer(tokenizer, Prompt(messages), "d", turns="all")) == ["b" + EOS, "d" + EOS]


def test_earlier_turns_that_the_template_rewrites_are_an_error():
    tokenizer = small.byte_level(small.CLOSED_BY_EOS.replace("m.content", "m.content | replace('first', '1st')"))
    encode_answer(tokenizer, CONVERSATION, "yes")
    with pytest.raises(ValueError, match=r"talk.jsonl:3.*rewrites earlier assistant"):
        encode_answer(tokenizer, CONVERSATION, "yes", turns="all")


# ---- Errors


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"no chat template.*plain-text columns.*instruct"):
        encode_prompt(small.byte_level(None), QUESTION)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_answer(small.byte_level(eos=False), QUESTION, "yes")
    with pytest.raises(ValueError, match="exactly once"):
        encode_answer(small.byte_level(small.DROPS_ANSWERS), QUESTION, "yes")
    with pytest.raises(ValueError, match="either plain text or a conversation"):
        encode_prompt(small.byte_level(), Prompt((Message("text", "a"), Message("user", "b"))))
    with pytest.raises(ValueError, match=r"data.csv:2: .*refuses a conversation of system, user: no system role"):
        system = Prompt((Message("system", "a"), Message("user", "b")), source="data.csv:2")
        encode_prompt(small.byte_level(small.ONLY_USERS), system)
    with pytest.raises(ValueError, match=r"unknown turns 'first'.*last, all"):
        tokenize(small.byte_level(), [Demonstration(QUESTION, "yes")], turns="first")  # pyright: ignore
    with pytest.raises(ValueError, match=r"unknown overlong 'cut'.*truncate-response"):
        encode(small.byte_level(), [], max_length=9, overlong="cut")  # pyright: ignore
    with pytest.raises(ValueError, match="--max-length is 1"):
        encode(small.byte_level(), [], max_length=1)
    with pytest.raises(ValueError, match="a prompt alone"):
        tokenize(small.byte_level(), [QUESTION])


# ---- Rows that are too long (plain text and one token a byte, so that lengths can be counted by eye)


def pair(prompt: str, chosen: str, rejected: str, source: str = "") -> Preference:
    return Preference(Prompt.from_text(prompt, source=source), chosen, rejected)


def texts(tokenizer, items: list[Encoded]) -> list[list[str]]:
    return [[tokenizer.decode(row.ids) for row in item.rows] for item in items]


RECORDS = [pair("abcdef", "gh", "g"), pair("abcdef", "ghij", "g"), pair("ab", "cdefghij", "c"), pair("a", "b", "c")]


def test_error_names_the_longest_and_what_to_type():
    records = [pair("ab", "cd", "e", "x:1"), pair("abc", "de", "f", "x:2"), pair("abcd", "ef", "g", "x:3")]
    with pytest.raises(ValueError) as caught:
        encode(small.byte_level(None), records, max_length=5)
    assert str(caught.value).startswith(
        "2 of 3 rows are longer than --max-length 5 tokens, the longest 7 (x:3). Type --max-length 7"
    )
    assert all(policy in str(caught.value) for policy in OVERLONG[1:])
    items, counts = encode(small.byte_level(None), records, max_length=7)
    assert len(items) == 3
    assert (counts.cut, counts.dropped, counts.longest) == (0, 0, 7)


def test_drop_takes_whole_pairs():
    tokenizer = small.byte_level(None)
    items, counts = encode(tokenizer, RECORDS, max_length=9, overlong="drop")
    assert [item.record for item in items] == [RECORDS[0], RECORDS[3]]
    assert asdict(counts) == {
        "rows": 4, "cut": 0, "dropped": 2, "longest": 11, "max_length": 9, "policy": "drop",
    }  # fmt: skip
    assert str(counts) == "4 rows, the longest 11 tokens (--max-length 9): 0 cut, 2 dropped (--overlong drop)"


def test_truncating_the_prompt_cuts_the_rows_of_a_pair_alike():
    tokenizer = small.byte_level(None)
    items, counts = encode(tokenizer, RECORDS, max_length=7, overlong="truncate-prompt-left")
    assert texts(tokenizer, items) == [
        [f"cdefgh{EOS}", f"cdefg{EOS}"],
        [f"efghij{EOS}", f"efg{EOS}"],
        [f"ab{EOS}", f"ac{EOS}"],
    ]
    assert [item.prompt_length for item in items] == [4, 2, 1]
    assert (counts.cut, counts.dropped) == (2, 1)


def test_truncating_the_prompt_keeps_bos():
    tokenizer = small.byte_level(None, adds_bos=True)
    items, counts = encode(tokenizer, RECORDS, max_length=6, overlong="truncate-prompt-left")
    assert texts(tokenizer, items) == [
        [f"{BOS}efgh{EOS}", f"{BOS}efg{EOS}"],
        [f"{BOS}ghij{EOS}", f"{BOS}g{EOS}"],
        [f"{BOS}ab{EOS}", f"{BOS}ac{EOS}"],
    ]
    assert (counts.cut, counts.dropped) == (2, 1)


def test_truncating_responses_claims_no_end():
    tokenizer = small.byte_level(None)
    items, counts = encode(tokenizer, RECORDS, max_length=8, overlong="truncate-response")
    assert texts(tokenizer, items) == [
        ["abcdefgh", f"abcdefg{EOS}"],
        ["abcdefgh", f"abcdefg{EOS}"],
        ["abcdefgh", f"abc{EOS}"],
        [f"ab{EOS}", f"ac{EOS}"],
    ]  # fmt: skip
    assert (counts.cut, counts.dropped) == (3, 0)


def test_truncating_responses_drops_what_cannot_be_told_apart_or_has_no_room():
    tokenizer = small.byte_level(None)
    records = [pair("ab", "cdX", "cdYZ"), pair("abcd", "e", "fg"), pair("a", "b", "cdefg"), pair("ab", "cd", "cdef")]
    items, counts = encode(tokenizer, records, max_length=4, overlong="truncate-response")
    assert texts(tokenizer, items) == [[f"ab{EOS}", "acde"]]
    assert (counts.cut, counts.dropped) == (1, 3)


@pytest.mark.parametrize("policy", OVERLONG[1:])
@given(
    rows=st.lists(st.tuples(*[st.text("ab", max_size=9)] * 3), min_size=1, max_size=4),
    max_length=st.integers(2, 12),
    adds_bos=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_kept_fits_and_can_be_learned_from(policy, rows, max_length, adds_bos):
    tokenizer = tokenizer_of("byte level", "closed by eos", adds_bos)
    whole = tokenize(tokenizer, [pair(*row) for row in rows])
    kept, counts = fit(whole, max_length, policy)
    full = {id(item.record): item for item in whole}
    for item in kept:
        for row, before in zip(item.rows, full[id(item.record)].rows, strict=True):
            changed = row != before
            assert 0 < sum(row.response) <= len(row.ids) == len(row.response) <= max_length
            assert not row.response[0]
            assert row.ids[0] == tokenizer.bos_token_id or not adds_bos
            assert (row.ids[-1] == tokenizer.eos_token_id) == (policy != "truncate-response" or not changed)
            assert row.ids[: item.prompt_length] == item.rows[0].ids[: item.prompt_length]
            if changed and policy == "truncate-prompt-left":
                assert sum(row.response) >= sum(before.response) - 1
    untouched = sum(item.longest <= max_length and all(any(row.response) for row in item.rows) for item in whole)
    assert counts.rows == len(rows) == untouched + counts.cut + counts.dropped
    assert len(kept) == untouched + counts.cut


def test_a_text_without_anything_to_learn_is_refused_or_dropped():
    tokenizer = small.byte_level(None)
    records = [Demonstration(Prompt.from_text("", source="t:9"), ""), Demonstration(QUESTION_TEXT, "yes")]
    with pytest.raises(ValueError, match=r"1 of 2 rows have no token to learn from.*t:9"):
        encode(tokenizer, records, max_length=30)
    items, counts = encode(tokenizer, records, max_length=30, overlong="drop")
    assert [item.record for item in items] == records[1:]
    assert counts.dropped == 1


QUESTION_TEXT = Prompt.from_text("the question ")


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"nothing is left.*--max-length 14"):
        encode(small.byte_level(None), [Demonstration(QUESTION_TEXT, "")], max_length=5, overlong="drop")


def test_cut_earlier_turns_keep_no_loss_on_the_first_token():
    tokenizer = small.byte_level(small.WITHOUT_MARKERS)
    record = Demonstration(CONVERSATION, "yes")
    whole = tokenize(tokenizer, [record], turns="all")
    for max_length in range(5, whole[0].longest):
        [item], _ = fit(whole, max_length, "truncate-prompt-left")
        assert not item.rows[0].response[0]
        assert item.rows[0].response[1:] == whole[0].rows[0].response[-max_length + 1 :]


# ---- Mismatched answers


def feedback(prompt: str, response: str) -> Feedback:
    return Feedback(Prompt.from_text(prompt), response, desirable=len(response) % 2 == 0)


@given(prompts=st.lists(st.sampled_from("abcd"), min_size=2, max_size=12), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_mismatched_is_a_derangement_across_prompts_where_possible(prompts, seed):
    records = [feedback(prompt, f"{prompt}{i}") for i, prompt in enumerate(prompts)]
    others = mismatched(records, seed)
    assert [other.prompt for other in others] == [record.prompt for record in records]
    assert sorted(other.response for other in others) == sorted(record.response for record in records)
    assert all(other.response != record.response for other, record in zip(others, records, strict=True))
    same = sum(other.response[0] == record.prompt.text for other, record in zip(others, records, strict=True))
    assert same == max(0, 2 * max(Counter(prompts).values()) - len(prompts))
    assert mismatched(records, seed) == others


def test_mismatched_depends_on_the_seed_and_needs_two():
    records = [feedback(str(i), str(i)) for i in range(20)]
    assert mismatched(records, 0) != mismatched(records, 1)
    with pytest.raises(ValueError, match="at least 2 rows of feedback, and there are 1"):
        mismatched(records[:1], 0)


def test_a_long_mismatched_answer_is_cut_and_nothing_is_refused():
    tokenizer = small.byte_level(None)
    items, counts = encode_feedback(tokenizer, [feedback("abcd", "e"), feedback("f", "ghij")], seed=0, max_length=6)
    assert texts(tokenizer, items) == [[f"abcde{EOS}", "abcdgh"], [f"fghij{EOS}", f"fe{EOS}"]]
    assert counts.dropped == counts.cut == 0


def test_a_mismatched_answer_follows_the_prompt_as_it_was_cut():
    tokenizer = small.byte_level(None, adds_bos=True)
    records = [feedback("abcd", "e"), feedback("f", "ghi")]
    items, counts = encode_feedback(tokenizer, records, seed=0, max_length=6, overlong="truncate-prompt-left")
    assert texts(tokenizer, items) == [[f"{BOS}bcde{EOS}", f"{BOS}bcdgh"], [f"{BOS}fghi{EOS}", f"{BOS}fe{EOS}"]]
    assert counts.cut == 1


# ---- Batches


def test_batches_have_the_rows_of_their_items():
    tokenizer = small.byte_level(None)
    demonstrations = tokenize(
        tokenizer, [Demonstration(QUESTION_TEXT, "yes", weight=0.5), Demonstration(QUESTION_TEXT, "")]
    )
    batch = demonstration_batch(demonstrations, pad_id(tokenizer))
    assert batch.tokens.ids.shape == (2, 17)
    assert batch.weights.tolist() == [0.5, 1.0]
    assert batch.tokens.response_lengths.tolist() == [4, 1]

    pairs = tokenize(tokenizer, [Preference(QUESTION_TEXT, "a", "bc", confidence=0.75, margin=2.0, weight=3.0)] * 2)
    batch = pair_batch(pairs, pad_id(tokenizer))
    assert batch.tokens.response_lengths.tolist() == [2, 3, 2, 3]
    assert (batch.confidence.tolist(), batch.margin.tolist(), batch.weights.tolist()) == ([0.75] * 2, [2] * 2, [3] * 2)
    assert [len(part.tokens) for part in split(batch, 2)] == [2, 2]

    rankings = tokenize(tokenizer, [Ranking(QUESTION_TEXT, ("a", "bc", "")), Ranking(QUESTION_TEXT, ("d", "e"))])
    batch = ranking_batch(rankings, pad_id(tokenizer))
    assert batch.sizes.tolist() == [3, 2]
    assert batch.tokens.response_lengths.tolist() == [2, 3, 1, 2, 2]

    items, _ = encode_feedback(tokenizer, [feedback("a", "bc"), feedback("d", "e")], seed=0, max_length=9)
    batch = feedback_batch(items, pad_id(tokenizer))
    assert batch.desirable.tolist() == [True, False]
    assert batch.tokens.response_lengths.tolist() == [3, 2, 2, 3]


def test_a_batch_of_the_wrong_records_is_our_mistake():
    tokenizer = small.byte_level(None)
    with pytest.raises(AssertionError):
        pair_batch(tokenize(tokenizer, [Demonstration(QUESTION_TEXT, "yes")]), 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_eos_hides_no_eos(side):
    tokenizer = small.byte_level(pad_is_eos=True)
    rows = [encode_answer(tokenizer, QUESTION, response) for response in ("yes", "", "no no")]
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokens = pad(rows, pad_id(tokenizer), side=side)
    assert tokens.ids.shape == tokens.attention_mask.shape == tokens.response_mask.shape
    assert tokens.response_mask.sum(-1).tolist() == [4, 1, 6]
    assert tokens.attention_mask.sum(-1).tolist() == [len(row.ids) for row in rows]
    for i, row in enumerate(rows):
        assert tokens.ids[i][tokens.attention_mask[i]].tolist() == row.ids
        assert tokens.response_mask[i][tokens.attention_mask[i]].tolist() == row.response
        outside = tokens.ids[i][~tokens.attention_mask[i]]
        assert torch.equal(outside, torch.full_like(outside, tokenizer.eos_token_id))
    edge = 0 if side == "right" else -1
    assert bool(tokens.attention_mask[:, edge].all())


def test_pad_refuses_an_unknown_side():
    with pytest.raises(ValueError, match="unknown side 'middle'"):
        pad([Row([1, 2], [False, True])], 0, side="middle")  # pyright: ignore


# ---- For people


def test_show_marks_what_carries_loss():
    tokenizer = small.byte_level(small.CLOSED_BY_END_OF_TURN)
    rows = [encode_answer(tokenizer, QUESTION, "na\u00efve\nyes"), encode_answer(tokenizer, QUESTION, "no")]
    text = show(tokenizer, pad(rows, pad_id(tokenizer)))
    assert text == show(tokenizer, rows)
    styled = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styled["na\u00efve\u21b5\nyes"] == styled["no"] == "green"
    assert styled[END] == "bold black on green"
    assert styled[f"<|user|>\u21b5\nthe question{END}\u21b5\n<|assistant|>\u21b5\n"] == "dim"
    assert small.PAD not in text.plain


# ---- Real data


@pytest.mark.skipif(not (SHARED / "hh_helpful_valid.jsonl.gz").exists(), reason="../shared/data is not here")
def test_real_conversations_survive():
    tokenizer = small.merging(small.DEFAULT_SYSTEM, adds_bos=True, pad_is_eos=True)
    with gzip.open(SHARED / "hh_helpful_valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines][:50]
    records = [
        Preference(
            Prompt(tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])),
            row["chosen"][0]["content"],
            row["rejected"][0]["content"],
        )
        for row in found
    ]
    for item, every in zip(tokenize(tokenizer, records), tokenize(tokenizer, records, turns="all"), strict=True):
        assert isinstance(item.record, Preference)
        for row, response in zip(item.rows, (item.record.chosen, item.record.rejected), strict=True):
            assert words(tokenizer, row) == [response + EOS]
            assert row.ids.count(tokenizer.bos_token_id) == 1
        earlier = [turn.content for turn in item.record.prompt.messages if turn.role == "assistant"]
        expected = [text + EOS for text in [*earlier, item.record.chosen]]
        assert words(tokenizer, every.rows[0]) == expected
