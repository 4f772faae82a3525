"""Every known way to get a row wrong is one clear error: the place, the field, what was found, what was expected."""

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab import data
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking, Record


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ASK = [user("What colour?")]
PAIR = {"prompt": ASK, "chosen": "Blue.", "rejected": "Black."}
GOOD: dict[type, dict[str, Any]] = {
    Prompt: {"prompt": "p"},
    Demonstration: {"prompt": "p", "completion": "c"},
    Preference: PAIR,
    Ranking: {"prompt": "p", "completions": ["a", "b"]},
    Feedback: {"prompt": "p", "completion": "c", "label": True},
}

# kind, row, field, and words of the message
BAD: dict[str, tuple[type[Record], dict[str, Any], str, str]] = {
    "prompt is a number": (Prompt, {"prompt": 5}, "prompt", "found 5, expected text or a list of messages"),
    "prompt is null": (Prompt, {"prompt": None}, "prompt", "found null, expected text or"),
    "prompt is an empty list": (Prompt, {"prompt": []}, "prompt", "found [], expected a list of messages"),
    "prompt is an object": (Prompt, {"prompt": {"role": "user"}}, "prompt", "expected text or a list"),
    "prompt is a list of strings": (Prompt, {"prompt": ["hi"]}, "prompt[0]", "found 'hi', expected a message"),
    "role is missing": (
        Prompt,
        {"prompt": [{"content": "x"}]},
        "prompt[0].role",
        "found null, expected one of system, user",
    ),
    "role is unknown": (Prompt, {"prompt": [{"role": "boss", "content": "x"}]}, "prompt[0].role", "found 'boss'"),
    "role is a number": (
        Prompt,
        {"prompt": [{"role": 1, "content": "x"}]},
        "prompt[0].role",
        "found 1, expected one of",
    ),
    "role is a list": (Prompt, {"prompt": [{"role": ["user"], "content": "x"}]}, "prompt[0].role", "found ['user']"),
    "content is null": (Prompt, {"prompt": [user(None)]}, "prompt[0].content", "found null, expected text"),
    "content is an image": (
        Prompt,
        {"prompt": [user([{"type": "image"}])]},
        "prompt[0].content[0]",
        "expected a part of text",
    ),
    "prefill": (
        Prompt,
        {"prompt": [*ASK, assistant("Well,")]},
        "prompt",
        "found an assistant turn at the end ('Well,')",
    ),
    "prefill in a transcript": (
        Demonstration,
        {"prompt": "\n\nHuman: a\n\nAssistant: Well,", "completion": "b"},
        "prompt",
        "found an assistant turn at the end",
    ),
    "lone surrogate": (Prompt, {"prompt": "a\ud800b"}, "prompt", "found '\\ud800' alone at character 1"),
    "answer is a list": (Prompt, {"prompt": "p", "answer": ["a"]}, "answer", "found ['a'], expected text or a number"),
    "user is an object": (Prompt, {"prompt": "p", "user": {}}, "user", "found {}, expected text or a number"),
    "no prompt in plain strings": (Prompt, {"chosen": "a", "rejected": "b"}, "chosen", "expected a column `prompt`"),
    "text is a number": (Demonstration, {"text": 1.5}, "text", "found 1.5, expected text"),
    "text is blank": (Demonstration, {"text": " \n"}, "text", "expected text with something in it"),
    "messages is text": (Demonstration, {"messages": "hi"}, "messages", "found 'hi', expected a list of messages"),
    "messages without an answer": (
        Demonstration,
        {"messages": ASK},
        "messages",
        "found no assistant turn (roles: user)",
    ),
    "messages without a prompt": (Demonstration, {"messages": [assistant("a")]}, "messages", "no prompt"),
    "messages with two answers": (
        Demonstration,
        {"messages": [*ASK, assistant("a"), assistant("b")]},
        "messages",
        "found two assistant turns in a row at the end",
    ),
    "completion is null": (
        Demonstration,
        {"prompt": "p", "completion": None},
        "completion",
        "found null, expected text",
    ),
    "completion of two messages": (
        Demonstration,
        {"prompt": ASK, "completion": [assistant("a"), assistant("b")]},
        "completion",
        "found messages with roles: assistant, assistant; expected one assistant message",
    ),
    "completion by the user": (
        Demonstration,
        {"prompt": ASK, "completion": [user("a")]},
        "completion",
        "with roles: user",
    ),
    "completion is an empty list": (Demonstration, {"prompt": ASK, "completion": []}, "completion", "found []"),
    "completion is a bool": (Demonstration, {"prompt": "p", "completion": True}, "completion", "found True"),
    "chosen is null": (Preference, PAIR | {"chosen": None}, "chosen", "found null, expected text or a list"),
    "rejected is a number": (Preference, PAIR | {"rejected": 3}, "rejected", "found 3, expected text or a list"),
    "chosen = rejected": (
        Preference,
        PAIR | {"rejected": "Blue."},
        "rejected",
        "found the same answer as the chosen one",
    ),
    "chosen = rejected, after reading": (
        Preference,
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": "b\n"},
        "rejected",
        "found the same answer",
    ),
    "prompts differ": (
        Preference,
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        "rejected",
        "found another prompt before the last assistant turn than in chosen (message 1: 'b', not 'a')",
    ),
    "prompts differ in length": (
        Preference,
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        },
        "rejected",
        "(3 messages, not 1)",
    ),
    "transcript and plain text": (
        Preference,
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
        "rejected",
        "found another prompt",
    ),
    "implicit, the user speaks last": (
        Preference,
        {"chosen": [*ASK, assistant("a"), user("b")], "rejected": [*ASK, assistant("c")]},
        "chosen",
        "found a turn of user at the end, expected the assistant's",
    ),
    "implicit transcript, the human speaks last": (
        Preference,
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
        "chosen",
        "found a turn of user at the end",
    ),
    "implicit, no prompt at all": (
        Preference,
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "chosen",
        "found one assistant message and no prompt",
    ),
    "prompt is none of the turns": (
        Preference,
        {"prompt": "Other?", "chosen": [*ASK, assistant("a")], "rejected": [*ASK, assistant("b")]},
        "prompt",
        "found 'Other?', expected one of the turns before the last one of chosen",
    ),
    "margin is NaN": (Preference, PAIR | {"margin": float("nan")}, "margin", "found nan, expected a finite number"),
    "margin is text": (Preference, PAIR | {"margin": "much"}, "margin", "found 'much', expected a finite number"),
    "margin is a bool": (Preference, PAIR | {"margin": True}, "margin", "found True, expected a finite number"),
    "weight is infinite": (
        Preference,
        PAIR | {"weight": float("inf")},
        "weight",
        "found inf, expected a number from 0",
    ),
    "weight is negative": (
        Demonstration,
        GOOD[Demonstration] | {"weight": -1},
        "weight",
        "found -1, expected a number from 0",
    ),
    "weight is a list": (Feedback, GOOD[Feedback] | {"weight": [1]}, "weight", "found [1], expected a number"),
    "weight is too large": (Feedback, GOOD[Feedback] | {"weight": 10**400}, "weight", "expected a number from 0"),
    "confidence is too large": (Preference, PAIR | {"confidence": 1.01}, "confidence", "expected a number from 0 to 1"),
    "confidence is negative": (Preference, PAIR | {"confidence": -0.1}, "confidence", "expected a number from 0 to 1"),
    "annotator is a list": (Preference, PAIR | {"annotator": ["a", "b"]}, "annotator", "expected text or a number"),
    "judge's label is 3": (
        Preference,
        {"prompt": "p", "output_1": "a", "output_2": "b", "label": 3},
        "label",
        "found 3, expected",
    ),
    "judge's label is 1.5": (
        Preference,
        {"prompt": "p", "output_1": "a", "output_2": "b", "label": 1.5},
        "label",
        "found 1.5, expected 1 or 2",
    ),
    "judge's outputs are equal": (
        Preference,
        {"prompt": "p", "output_1": "a", "output_2": "a", "label": 0},
        "rejected",
        "the same answer",
    ),
    "ranking of one": (
        Ranking,
        {"prompt": "p", "completions": ["a"]},
        "completions",
        "at least two answers, best first",
    ),
    "ranking is text": (
        Ranking,
        {"prompt": "p", "completions": "a, b"},
        "completions",
        "expected a list of at least two",
    ),
    "ranking with a number": (Ranking, {"prompt": "p", "completions": ["a", 2]}, "completions[1]", "found 2"),
    "ranking with the same twice": (
        Ranking,
        {"prompt": "p", "completions": ["a", "b", "a"]},
        "completions",
        "found the same answer twice ('a')",
    ),
    "step labels": (
        Ranking,
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        "labels",
        "single steps",
    ),
    "label is a fraction": (Feedback, GOOD[Feedback] | {"label": 0.7}, "label", "found 0.7, expected true or false"),
    "label is null": (Feedback, GOOD[Feedback] | {"label": None}, "label", "found null, expected true or false"),
    "label is text": (Feedback, GOOD[Feedback] | {"label": "good"}, "label", "found 'good', expected true or false"),
    "label is -1": (Feedback, GOOD[Feedback] | {"label": -1}, "label", "found -1, expected true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_clear_error(write, name: str):
    kind, row, field, words = BAD[name]
    path = write(GOOD[kind], row)
    with pytest.raises(ValueError) as caught:
        data.load(path, kind)
    assert str(caught.value).startswith(f"{path}:2: {field}: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < len(path) + 400


@pytest.mark.parametrize("name", BAD)
def test_skip_invalid_skips_it_and_says_so(write, name: str):
    kind, row, field, words = BAD[name]
    path = write(row, GOOD[kind], row)
    loaded = data.load(path, kind, skip_invalid=True)
    assert (len(loaded.records), loaded.rows) == (1, 3)
    assert [(problem.where, problem.field) for problem in loaded.skipped] == [
        (f"{path}:1", field),
        (f"{path}:3", field),
    ]
    assert words in loaded.skipped[0].message


@pytest.mark.parametrize("kind", GOOD)
def test_missing_columns_are_named_with_what_is_accepted(write, kind: type[Record]):
    path = write({"id": 1, "query": "a"})
    with pytest.raises(ValueError) as caught:
        data.load(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: columns: found id, query. {kind.__name__} records need one of: `")
    assert "--skip-invalid" not in message


def test_a_long_value_is_cut_in_the_message(write):
    with pytest.raises(ValueError) as caught:
        data.load(write({"prompt": [{"role": "x" * 10_000, "content": "y"}]}), Prompt)
    assert len(str(caught.value)) < 400


LINES = {
    "not JSON": (b'{"prompt": "p"\n', 'line: found \'{"prompt"'),
    "a list": (b'["p"]\n', "line: found ['p'], expected an object"),
    "a number": (b"3\n", "line: found 3, expected an object"),
    "not UTF-8": (b'{"prompt": "\xff"}\n', "line: found bytes that are not UTF-8 (invalid start byte at byte 12)"),
    "too deep": (b"[" * 100_000 + b"\n", "expected one JSON object a line"),
    "too many digits": (b'{"prompt": ' + b"1" * 5000 + b"}\n", "expected one JSON object a line"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_broken_line_of_jsonl_is_a_bad_row(tmp_path: Path, name: str):
    raw, words = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "p"}\n\n' + raw + b'{"prompt": "q"}\n')
    with pytest.raises(ValueError) as caught:
        data.load(str(path), Prompt)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    loaded = data.load(str(path), Prompt, skip_invalid=True)
    assert ([prompt.text for prompt in loaded.records], loaded.rows, len(loaded.skipped)) == (["p", "q"], 3, 1)


def test_the_first_problem_is_shown_where_every_row_is_bad(write):
    path = write({"prompt": 1}, {"prompt": 2})
    with pytest.raises(ValueError) as caught:
        data.load(path, Prompt, skip_invalid=True)
    assert f"none of its 2 rows could be read; the first: {path}:1: prompt: found 1" in str(caught.value)


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "score": NaN, "other": Infinity, "more": {"a": [null]}}', encoding="utf-8")
    [prompt] = data.load(str(path), Prompt).records
    assert json.dumps(prompt.columns) == '{"score": NaN, "other": Infinity, "more": {"a": [null]}}'
