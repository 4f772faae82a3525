"""From rows to records: the column formats of the ecosystem, which one a row has, and how records turn into others.

Each `Format` says which columns it needs and reads a row into the record that the columns are made for; `convert` turns
that record into the kind that was asked for (a pair into a demonstration of its chosen answer, a ranking into pairs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..records import NO_COLUMNS, TEXT, Demonstration, Feedback, Message, Preference, Prompt, Ranking, Record
from .conversations import (
    InvalidField,
    Messages,
    at_last_turn,
    explicit,
    implicit,
    is_list,
    messages_of,
    prompt_messages,
    text_of,
    unexpected,
)
from .files import Row

# The first name is the documented one, the others are what data sets in the wild call the same thing.
PROMPT = ("prompt", "question", "instruction", "input")
COMPLETION = ("completion", "response", "output")
MESSAGES = ("messages", "conversations")
JUDGEMENT = ("label", "majority")
ANSWER = ("final_answer", "answer")
TIE = 0.5
ENDINGS = ("chosen_finished", "rejected_finished")
ANSWERS = ("chosen", "rejected", "completions", "output_1", "output_2", *COMPLETION, *MESSAGES)
ABOUT_ANSWERS = (*ANSWERS, *JUDGEMENT, *ENDINGS, "finished", "weight", "margin", "confidence", "annotator")


@dataclass(frozen=True)
class Format:
    """A column format: how it is written for people, the columns it needs (each with other names), its reader."""

    title: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row, str], Record]

    def has_columns(self, row: Row) -> bool:
        """Whether a row has all columns of this format, filled or not."""
        return all(any(name in row for name in names) for names in self.columns)


def present(row: Row, names: Collection[str]) -> str | None:
    """The first of several column names that a row has."""
    return next((name for name in names if name in row), None)


def column(row: Row, names: Collection[str]) -> str:
    """The first of several column names that a row has; there must be one."""
    name = present(row, names)
    assert name is not None, names
    return name


def number(row: Row, name: str, default: float, *, low: float = -math.inf, high: float = math.inf) -> float:
    """An optional finite number between bounds; csv files write it as text."""
    value = row.get(name)
    if value is None:
        return default
    expected = (
        "a finite number" if math.isinf(low) else f"a number from {low:g}" + (f" to {high:g}" * (high < math.inf))
    )
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not (math.isfinite(parsed) and low <= parsed <= high):
        raise unexpected(name, value, expected)
    return parsed


def name_of(row: Row, name: str | None) -> str | None:
    """An optional text or number, as text: who judged, whose preference it is, or the known right answer."""
    value = None if name is None else row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return None if name is None or value is None else text_of(value, name, "text or a number")


def weight_of(row: Row) -> float:
    """How much a row counts."""
    return number(row, "weight", 1.0, low=0.0)


def make_prompt(messages: Messages, row: Row, where: str, used: Collection[str]) -> Prompt:
    """A prompt with everything else that its row says; `used` names the columns that a record holds itself."""
    answer = next((name for name in ANSWER if name not in used and row.get(name) is not None), None)
    gone = {*used, answer, "user"}
    columns = {name: value for name, value in row.items() if name not in gone}
    return Prompt(messages, name_of(row, answer), name_of(row, "user"), columns or NO_COLUMNS, where)


def about_answers(columns: Mapping[str, Any]) -> Collection[str]:
    """The columns that speak of a row's answers, which a prompt without them must not carry on to other answers."""
    return ABOUT_ANSWERS if any(name in columns for name in ANSWERS) else ()


def finished_of(row: Row, name: str = "finished") -> bool:
    """Whether an answer came to its own end; only a false one says that it was cut while it was sampled."""
    value = LABELS.get(str(row.get(name, True)).strip().lower())
    if value is None:
        raise unexpected(name, row[name], "true or false")
    return value


def prompt_value(row: Row) -> tuple[Any, list[str]]:
    """The value of the prompt and the columns it is made of: an Alpaca row's input belongs to its instruction."""
    name = column(row, PROMPT)
    value = row[name]
    if name == "instruction" and isinstance(value, str) and row.get("input"):
        return f"{value}\n\n{text_of(row['input'], 'input')}", ["instruction", "input"]
    return value, [name]


def read_prompt(row: Row, where: str) -> Prompt:
    """A row with a prompt, read as it is when the row's answers are wanted, too."""
    value, used = prompt_value(row)
    answered = next((name for name in ("chosen", *COMPLETION) if is_list(row.get(name))), None)
    if answered and isinstance(value, str):
        messages, _ = explicit(value, used[0], {answered: row[answered]})
    else:
        messages = prompt_messages(value, used[0], as_turn=any(is_list(row.get(name)) for name in MESSAGES))
    return make_prompt(messages, row, where, (*used, *about_answers(row)))


def read_messages_prompt(row: Row, where: str) -> Prompt:
    """A conversation as a prompt: all of it, or all before its last turn where that is the assistant's."""
    name = column(row, MESSAGES)
    messages = messages_of(row[name], name)
    if messages[-1].role == "assistant":
        messages, _ = at_last_turn(messages, name)
    return make_prompt(messages, row, where, (name, *about_answers(row)))


def read_implicit_prompt(row: Row, where: str) -> Prompt:
    """The prompt that chosen and rejected have in common; plain strings have none."""
    prompt = read_preference(row, where).prompt
    if prompt.messages == (Message(TEXT, ""),):
        raise InvalidField("chosen", "found plain strings without a prompt, expected a column `prompt`")
    return prompt


def read_messages(row: Row, where: str) -> Demonstration:
    """A conversation as a demonstration of its last assistant turn; turns after it are dropped."""
    name = column(row, MESSAGES)
    messages = messages_of(row[name], name)
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        roles = ", ".join(message.role for message in messages)
        raise InvalidField(name, f"found no assistant turn (roles: {roles}), expected one to imitate")
    prompt, response = at_last_turn(messages[: last + 1], name)
    return Demonstration(make_prompt(prompt, row, where, (name, "weight")), response, weight_of(row))


def read_answered(row: Row, where: str, names: Collection[str], further: Collection[str] = ()) -> tuple[Prompt, str]:
    """The prompt and the answer of a row with one answer in the first of these columns."""
    value, used = prompt_value(row)
    name = column(row, names)
    messages, (response,) = explicit(value, used[0], {name: row[name]})
    return make_prompt(messages, row, where, (*used, name, "weight", "finished", *further)), response


def read_completion(row: Row, where: str) -> Demonstration:
    """A prompt and its completion."""
    return Demonstration(*read_answered(row, where, COMPLETION), weight_of(row), finished_of(row))


def read_question(row: Row, where: str) -> Demonstration:
    """A question and its answer, to be imitated; `final_answer`, if there is one, is the answer that verifiers know."""
    return Demonstration(*read_answered(row, where, ("answer",)), weight_of(row))


def read_text(row: Row, where: str) -> Demonstration:
    """Plain text to imitate from its first token on: the prompt is empty."""
    text = text_of(row["text"], "text")
    if not text.strip():
        raise unexpected("text", text, "text with something in it")
    return Demonstration(make_prompt((Message(TEXT, ""),), row, where, ("text", "weight")), text, weight_of(row))


def read_preference(row: Row, where: str) -> Preference:
    """Two answers, the better one named, with an explicit prompt or with the prompt inside the answers."""
    answers = {"chosen": row["chosen"], "rejected": row["rejected"]}
    used: list[str] = []
    if present(row, PROMPT):
        value, used = prompt_value(row)
        messages, texts = explicit(value, used[0], answers)
    else:
        messages, texts = implicit(answers)
    return make_preference(row, where, messages, texts, [*used, *answers, "confidence"])


def make_preference(
    row: Row, where: str, messages: Messages, texts: list[str], used: list[str], confidence: float | None = None
) -> Preference:
    """A preference from its parts and from the optional columns of its row."""
    if texts[0] == texts[1]:
        raise InvalidField("rejected", f"found the same answer as the chosen one ({shorten_answer(texts[0])})")
    return Preference(
        make_prompt(messages, row, where, (*used, "annotator", "margin", "weight", *ENDINGS)),
        *texts,
        annotator=name_of(row, "annotator"),
        confidence=number(row, "confidence", 1.0, low=0.0, high=1.0) if confidence is None else confidence,
        margin=number(row, "margin", 0.0),
        weight=weight_of(row),
        chosen_finished=finished_of(row, "chosen_finished"),
        rejected_finished=finished_of(row, "rejected_finished"),
    )


def shorten_answer(text: str) -> str:
    """The beginning of an answer, for an error message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def read_judged(row: Row, where: str) -> Preference:
    """Two outputs and a person's label: 1 or 2 says which is better; 0 or nothing says neither, a tie."""
    value, used = prompt_value(row)
    outputs = {"output_1": row["output_1"], "output_2": row["output_2"]}
    name = column(row, JUDGEMENT)
    winner = 0 if row[name] is None else number({name: row[name]}, name, 0, low=0, high=2)
    if winner not in (0, 1, 2):
        raise unexpected(name, row[name], "1 or 2 (the better output) or 0 (a tie)")
    messages, texts = explicit(value, used[0], outputs)
    texts = texts[::-1] if winner == 2 else texts
    return make_preference(row, where, messages, texts, [*used, *outputs, name], 1.0 if winner else TIE)


def read_ranking(row: Row, where: str) -> Ranking:
    """Several answers to one prompt, best first, all different."""
    if "labels" in row:
        raise InvalidField("labels", "found labels of single steps, expected `completions` as a ranking, best first")
    value, used = prompt_value(row)
    completions = row["completions"]
    if not is_list(completions) or len(completions) < 2:
        raise unexpected("completions", completions, "a list of at least two answers, best first")
    named = {f"completions[{index}]": answer for index, answer in enumerate(completions)}
    messages, texts = explicit(value, used[0], named)
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InvalidField("completions", f"found the same answer twice ({shorten_answer(twice)})")
    used = [*used, "completions", "annotator", "weight"]
    return Ranking(make_prompt(messages, row, where, used), tuple(texts), name_of(row, "annotator"), weight_of(row))


def read_feedback(row: Row, where: str) -> Feedback:
    """One answer and whether it was wanted."""
    desirable = LABELS.get(str(row["label"]).strip().lower())
    if desirable is None:
        raise unexpected("label", row["label"], "true or false (or 1 or 0)")
    prompt, response = read_answered(row, where, COMPLETION, ("label", "annotator"))
    return Feedback(prompt, response, desirable, name_of(row, "annotator"), weight_of(row), finished_of(row))


LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

PROMPTS = Format("`prompt`", (PROMPT,), read_prompt)
CONVERSATION_PROMPTS = Format("`messages`", (MESSAGES,), read_messages_prompt)
IMPLICIT_PROMPTS = Format("`chosen` + `rejected` (prompt inside)", (("chosen",), ("rejected",)), read_implicit_prompt)
CONVERSATIONS = Format("`messages`", (MESSAGES,), read_messages)
COMPLETIONS = Format("`prompt` + `completion`", (PROMPT, COMPLETION), read_completion)
QUESTIONS = Format("`question` + `answer`", (("question",), ("answer",)), read_question)
TEXTS = Format("`text`", (("text",),), read_text)
PREFERENCES = Format("`chosen` + `rejected` (+ `prompt`)", (("chosen",), ("rejected",)), read_preference)
JUDGED = Format(
    "`prompt` + `output_1` + `output_2` + `label`", (PROMPT, ("output_1",), ("output_2",), JUDGEMENT), read_judged
)
RANKINGS = Format("`prompt` + `completions` (best first)", (PROMPT, ("completions",)), read_ranking)
FEEDBACKS = Format("`prompt` + `completion` + `label`", (PROMPT, COMPLETION, ("label",)), read_feedback)

ACCEPTED: dict[type[Record], tuple[Format, ...]] = {
    Prompt: (PROMPTS, CONVERSATION_PROMPTS, IMPLICIT_PROMPTS),
    Demonstration: (CONVERSATIONS, COMPLETIONS, QUESTIONS, TEXTS, PREFERENCES, JUDGED, RANKINGS),
    Preference: (PREFERENCES, JUDGED, RANKINGS),
    Ranking: (RANKINGS, PREFERENCES, JUDGED),
    Feedback: (FEEDBACKS, PREFERENCES, JUDGED),
}
"""The formats that each kind of record can be read from; a row is read by the first whose columns it has."""

NATURAL: tuple[tuple[Format, type[Record]], ...] = (
    (PREFERENCES, Preference),
    (JUDGED, Preference),
    (RANKINGS, Ranking),
    (FEEDBACKS, Feedback),
    (CONVERSATIONS, Demonstration),
    (COMPLETIONS, Demonstration),
    (QUESTIONS, Demonstration),
    (TEXTS, Demonstration),
    (PROMPTS, Prompt),
)
"""The kind that the columns of a row are made for, most telling first."""


def natural_kind(row: Row) -> type[Record]:
    """The kind of record that a row's columns are made for."""
    for form, kind in NATURAL:
        if form.has_columns(row):
            return kind
    raise missing_columns(row, "Expected", [form.title for form, _ in NATURAL])


def missing_columns(row: Row, needed_by: str, titles: list[str]) -> InvalidField:
    """The error of a row that no format can read."""
    found = ", ".join(row) or "none"
    found = found if len(found) < 300 else found[:297] + "..."
    return InvalidField("columns", f"found {found}. {needed_by} one of: {'; '.join(titles)}")


def format_of(row: Row, kind: type[Record]) -> Format:
    """The format by which a row is read as records of a kind: the first whose columns are there and not null."""
    candidates = [form for form in ACCEPTED[kind] if form.has_columns(row)]
    if not candidates:
        raise missing_columns(row, f"{kind.__name__} records need", [form.title for form in ACCEPTED[kind]])
    return next((form for form in candidates if is_filled(form, row)), candidates[0])


def is_filled(form: Format, row: Row) -> bool:
    """Whether the columns that a format reads hold something; a judge's missing label is a tie, not a hole."""
    return all(names is JUDGEMENT or row[column(row, names)] is not None for names in form.columns)


def decided(preference: Preference) -> Preference:
    """A preference of which the chosen answer is the better one."""
    if preference.confidence <= TIE:
        raise InvalidField(
            "confidence", f"found {preference.confidence:g} (a tie, or against chosen), expected more than {TIE:g} here"
        )
    return preference


def pairs_of(ranking: Ranking) -> list[Preference]:
    """All pairs of a ranking, the better answer chosen."""
    return [
        Preference(ranking.prompt, better, worse, annotator=ranking.annotator, weight=ranking.weight)
        for better, worse in combinations(ranking.responses, 2)
    ]


def unpaired(preference: Preference) -> list[Feedback]:
    """The two answers of a pair as feedback: the chosen one was wanted, the rejected one was not."""
    pair = decided(preference)
    return [
        Feedback(pair.prompt, pair.chosen, True, pair.annotator, pair.weight, pair.chosen_finished),
        Feedback(pair.prompt, pair.rejected, False, pair.annotator, pair.weight, pair.rejected_finished),
    ]


def as_ranking(preference: Preference) -> list[Ranking]:
    """A pair as a ranking of two."""
    pair = decided(preference)
    return [Ranking(pair.prompt, (pair.chosen, pair.rejected), pair.annotator, pair.weight)]


CONVERSIONS: dict[tuple[type, type], tuple[Callable[[Any], list[Any]], str]] = {
    (Preference, Demonstration): (
        lambda pair: [Demonstration(decided(pair).prompt, pair.chosen, pair.weight, pair.chosen_finished)],
        "pairs are read as demonstrations of their chosen answers",
    ),
    (Ranking, Demonstration): (
        lambda ranking: [Demonstration(ranking.prompt, ranking.responses[0], ranking.weight)],
        "rankings are read as demonstrations of their best answers",
    ),
    (Feedback, Demonstration): (
        lambda feedback: [Demonstration(feedback.prompt, feedback.response, feedback.weight, feedback.finished)],
        "feedback is read as demonstrations, wanted or not",
    ),
    (Ranking, Preference): (pairs_of, "every ranking gives all its pairs"),
    (Preference, Ranking): (as_ranking, "pairs are read as rankings of two"),
    (Preference, Feedback): (unpaired, "every pair gives a desirable and an undesirable answer"),
}
"""How a record turns into records of another kind, and the note that says so."""


def convert(record: Record, kind: type[Record]) -> list[Any]:
    """Records of the kind that was asked for, from one that was read."""
    if isinstance(record, kind):
        return [record]
    if kind is Prompt and not isinstance(record, Prompt):
        prompt = record.prompt
        gone = about_answers(prompt.columns)
        columns = {name: value for name, value in prompt.columns.items() if name not in gone}
        return [replace(prompt, columns=columns or NO_COLUMNS)]
    conversion = CONVERSIONS.get((type(record), kind))
    if conversion is None:
        raise InvalidField("record", f"found a {type(record).__name__}, expected a {kind.__name__}")
    return conversion[0](record)


def remarks(row: Row, record: Record, kind: type[Record]) -> Iterator[str]:
    """What a person should know about how a row was read as records of a kind."""
    if (type(record), kind) in CONVERSIONS:
        yield CONVERSIONS[type(record), kind][1]
    prompt = record if isinstance(record, Prompt) else record.prompt
    if prompt.is_text and prompt.text:
        yield "prompts are plain text: no chat template is applied to them"
    if kind is Demonstration and isinstance(record, Demonstration):
        yield from demonstration_remarks(row)


def demonstration_remarks(row: Row) -> Iterator[str]:
    """What a person should know about a row that was read as a demonstration by its own columns."""
    name = present(row, MESSAGES)
    if name and is_list(row[name]) and messages_of(row[name], name)[-1].role != "assistant":
        yield "turns after the last assistant turn are dropped"
    if not name and present(row, COMPLETION) and LABELS.get(str(row.get("label")).lower()) is False:
        yield "the answer is labelled undesirable and is imitated all the same"
