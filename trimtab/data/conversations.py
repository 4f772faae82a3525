"""From the values of columns to prompts and answers: strings, lists of messages, and transcripts.

A string is plain text, with one exception: a transcript (`\\n\\nHuman: ... \\n\\nAssistant: ...`) becomes messages. The
boundary between prompt and answer is the last assistant turn, never the longest common prefix of two answers: "Black."
and "Blue." begin alike, and all of both is answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..records import TEXT, Message
from ..untrusted import MOST_LINE
from .files import shorten

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"human": "user", "gpt": "assistant"}
TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = tuple[Message, ...]


class InvalidField(ValueError):
    """What is wrong with one field of a row; the caller knows the row."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def unexpected(field: str, value: Any, expected: str) -> InvalidField:
    """The error of a field that holds something else than it should."""
    return InvalidField(field, f"found {shorten(value)}, expected {expected}")


def is_list(value: Any) -> bool:
    """Whether a value is a list (as files give it) or a tuple (as a person's function may)."""
    return isinstance(value, (list, tuple))


def text_of(value: Any, field: str, expected: str = "text") -> str:
    """A value that must be text that can be encoded."""
    if not isinstance(value, str):
        raise unexpected(field, value, expected)
    if len(value) > MOST_LINE:
        raise InvalidField(field, f"found {len(value):,} characters, expected at most {MOST_LINE:,}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = ascii(value[error.start])
            raise InvalidField(
                field, f"found {found} alone at character {error.start}, expected Unicode text"
            ) from None
    return value


def content_of(value: Any, field: str) -> str:
    """The text of a message: a string, or a list of `{"type": "text", "text": ...}` parts."""
    if not is_list(value) or not value:
        return text_of(value, field)
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise unexpected(f"{field}[{index}]", part, 'a part of text, {"type": "text", "text": ...}')
        parts.append(text_of(part.get("text"), f"{field}[{index}].text"))
    return "".join(parts)


def message_of(value: Any, field: str) -> Message:
    """One message, `{"role": ..., "content": ...}` or, as ShareGPT writes it, `{"from": ..., "value": ...}`."""
    if not isinstance(value, Mapping):
        raise unexpected(field, value, 'a message, {"role": ..., "content": ...}')
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role = value.get(role_key)
    if isinstance(role, str):
        role = ROLE_ALIASES.get(role, role)
    if role not in ROLES:
        raise unexpected(f"{field}.{role_key}", value.get(role_key), f"one of {', '.join(ROLES)}")
    return Message(role, content_of(value.get(content_key), f"{field}.{content_key}"))


def messages_of(value: Any, field: str) -> Messages:
    """A list of messages with at least one in it."""
    if not is_list(value) or not value:
        raise unexpected(field, value, "a list of messages")
    return tuple(message_of(item, f"{field}[{index}]") for index, item in enumerate(value))


def is_transcript(text: str) -> bool:
    """Whether a string is a conversation written with `\\n\\nHuman:` and `\\n\\nAssistant:`, a human first."""
    turns = TRANSCRIPT_TURN.findall(text)
    return turns[:1] == ["Human"] and ("Assistant" in turns or text.startswith("\n\nHuman:"))


def parse_transcript(text: str) -> Messages:
    """The turns of a transcript; text before the first turn becomes a system message. Whitespace around is dropped."""
    preamble, *rest = TRANSCRIPT_TURN.split(text)
    turns = [Message(TRANSCRIPT_ROLES[name], said.strip()) for name, said in zip(rest[::2], rest[1::2], strict=True)]
    return (*([Message("system", preamble.strip())] if preamble.strip() else []), *turns)


def prompt_messages(value: Any, field: str, *, as_turn: bool) -> Messages:
    """What the model reads before it answers; a string is one user turn where `as_turn`, else plain text."""
    if isinstance(value, str):
        text_of(value, field)
        if not is_transcript(value):
            return (Message("user" if as_turn else TEXT, value),)
        messages = parse_transcript(value)
        # A transcript prompt ends with an open assistant turn: that is where the answer goes.
        messages = messages[:-1] if messages[-1] == Message("assistant", "") else messages
    else:
        if not is_list(value):
            raise unexpected(field, value, "text or a list of messages")
        messages = messages_of(value, field)
    if messages[-1].role == "assistant":
        raise InvalidField(
            field,
            f"found an assistant turn at the end ({shorten(messages[-1].content)}), expected the user's turn last: "
            "what the assistant says belongs to the answer",
        )
    return messages


def one_assistant_turn(messages: Messages, field: str) -> str:
    """The text of an answer that must be exactly one assistant message."""
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = ", ".join(message.role for message in messages) or "none"
        raise InvalidField(
            field, f"found messages with roles: {roles}; expected one assistant message, which may follow the prompt's"
        )
    return messages[0].content


def answer_text(value: Any, field: str, prompt: Messages, *, transcript: bool) -> str:
    """The text of an answer to a prompt; it may repeat the prompt's messages before it, as some data sets do."""
    if isinstance(value, str):
        text_of(value, field)
        if not transcript:
            return value
        if not is_transcript(value):
            return value.strip()
        messages = parse_transcript(value)
    else:
        if not is_list(value):
            raise unexpected(field, value, "text or a list with one assistant message")
        messages = messages_of(value, field)
    repeats = messages[: len(prompt)] == prompt
    return one_assistant_turn(messages[len(prompt) :] if repeats else messages, field)


def explicit(prompt: Any, field: str, answers: Mapping[str, Any]) -> tuple[Messages, list[str]]:
    """The prompt's messages and the answers' texts of a row that has a prompt; `answers` maps fields to values.

    A string prompt beside answers that are whole conversations is one of their turns: they say the prompt in full.
    """
    if isinstance(prompt, str) and all(is_list(value) and len(value) > 1 for value in answers.values()):
        messages, texts = implicit(answers)
        if all(message.content != prompt for message in messages):
            raise unexpected(field, prompt, f"one of the turns before the last one of {next(iter(answers))}")
        return messages, texts
    messages = prompt_messages(prompt, field, as_turn=any(is_list(value) for value in answers.values()))
    transcript = isinstance(prompt, str) and is_transcript(prompt)
    return messages, [answer_text(value, name, messages, transcript=transcript) for name, value in answers.items()]


def whole_conversation(value: Any, field: str) -> Messages:
    """An answer with its prompt before it: a list of messages, a transcript, or plain text (one `TEXT` message)."""
    if is_list(value):
        return messages_of(value, field)
    text = text_of(value, field, "text or a list of messages")
    return parse_transcript(text) if is_transcript(text) else (Message(TEXT, text),)


def at_last_turn(messages: Messages, field: str) -> tuple[Messages, str]:
    """A conversation split at its last turn, which must be the assistant's."""
    if messages[-1].role == TEXT:
        return (Message(TEXT, ""),), messages[-1].content
    if messages[-1].role != "assistant":
        raise InvalidField(field, f"found a turn of {messages[-1].role} at the end, expected the assistant's")
    if len(messages) == 1:
        raise InvalidField(
            field, "found one assistant message and no prompt, expected a column `prompt` or its messages"
        )
    if messages[-2].role == "assistant":
        raise InvalidField(field, "found two assistant turns in a row at the end, expected a turn of the user between")
    return messages[:-1], messages[-1].content


def implicit(answers: Mapping[str, Any]) -> tuple[Messages, list[str]]:
    """The common prompt and the texts of answers that have their prompt before them, up to the last assistant turn."""
    split = {field: at_last_turn(whole_conversation(value, field), field) for field, value in answers.items()}
    (first, (prompt, _)), *others = split.items()
    for field, (other, _) in others:
        if other != prompt:
            raise InvalidField(
                field, f"found another prompt before the last assistant turn than in {first}{difference(prompt, other)}"
            )
    return prompt, [text for _, text in split.values()]


def difference(left: Sequence[Message], right: Sequence[Message]) -> str:
    """Where two conversations begin to differ, for an error message."""
    if len(left) != len(right):
        return f" ({len(right)} messages, not {len(left)})"
    turn = next(index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
    return f" (message {turn + 1}: {shorten(right[turn].content, 40)}, not {shorten(left[turn].content, 40)})"
