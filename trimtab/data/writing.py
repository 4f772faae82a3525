"""From records back to rows, in the ecosystem's columns: what is written here is read by `load` as the same record."""

from __future__ import annotations

from typing import Any

from ..records import Demonstration, Feedback, Preference, Prompt, Ranking, Record


def to_row(record: Record) -> dict[str, Any]:
    """A record as a row for a file: lists of messages for conversations, strings for plain text."""
    if isinstance(record, Prompt):
        return prompt_row(record)
    row = prompt_row(record.prompt)
    match record:
        case Demonstration():
            row |= {"completion": answer(record.prompt, record.response)}
            row |= unless_default(finished=(record.finished, True))
        case Preference():
            row |= {name: answer(record.prompt, getattr(record, name)) for name in ("chosen", "rejected")}
            row |= unless_default(confidence=(record.confidence, 1.0), margin=(record.margin, 0.0))
            row |= unless_default(
                chosen_finished=(record.chosen_finished, True), rejected_finished=(record.rejected_finished, True)
            )
        case Ranking():
            row |= {"completions": [answer(record.prompt, response) for response in record.responses]}
        case Feedback():
            row |= {"completion": answer(record.prompt, record.response), "label": record.desirable}
            row |= unless_default(finished=(record.finished, True))
    annotator = None if isinstance(record, Demonstration) else record.annotator
    return row | unless_default(annotator=(annotator, None), weight=(record.weight, 1.0))


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt with everything else that its row said."""
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    row = {**prompt.columns, "prompt": prompt.text if prompt.is_text else messages}
    # A row may hold both a worked answer and the final one; the final one is what `Prompt.answer` was read from.
    name = "final_answer" if "answer" in prompt.columns else "answer"
    return row | unless_default(**{name: (prompt.answer, None)}, user=(prompt.user, None))


def answer(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt."""
    return text if prompt.is_text else [{"role": "assistant", "content": text}]


def unless_default(**values: tuple[Any, Any]) -> dict[str, Any]:
    """The values, each given with its default, that differ from it."""
    return {name: value for name, (value, default) in values.items() if value != default}
