"""The nouns of the text world: what people write, compare and label. Standard library only.

A conversation is a tuple of `Message`s. Plain text (no chat template is applied) is one message whose role is `TEXT`.
A `Prompt` is everything the model reads before it answers; a response is the text of one answer, without any
end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

TEXT = "text"
"""The role of a message that is plain text: it is tokenized as it stands, outside any chat template."""

NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or a piece of plain text (role `TEXT`)."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers.

    `answer` is a known right answer for verifiers, `user` says whose preferences count, `columns` holds every further
    column of the row it was read from, and `source` says where that row stands ("train.jsonl:17").
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    user: str | None = None
    columns: Mapping[str, Any] = field(default_factory=lambda: NO_COLUMNS, compare=False)
    source: str = field(default="", compare=False)

    @property
    def is_text(self) -> bool:
        """Whether this is plain text rather than a conversation."""
        return all(message.role == TEXT for message in self.messages)

    @property
    def text(self) -> str:
        """The contents of all messages, one a line, for people and for rules that look at words."""
        return "\n".join(message.content for message in self.messages)

    @classmethod
    def from_text(cls, text: str, **fields: Any) -> Prompt:
        """A plain-text prompt, no chat template."""
        return cls((Message(TEXT, text),), **fields)

    @classmethod
    def from_user(cls, content: str, **fields: Any) -> Prompt:
        """A conversation of one user turn."""
        return cls((Message("user", content),), **fields)


@dataclass(frozen=True)
class Answer:
    """One answer as a reward sees it: its text without special tokens, and whether anybody ended it.

    `finished` is false for an answer that was cut at a length limit, so that no end-of-sequence token follows it.
    `ids` are the exact tokens drawn, the closing one included; empty where nobody knows them. `raw` is the text of
    those tokens with the special ones written out.
    """

    text: str
    finished: bool = True
    ids: tuple[int, ...] = ()
    raw: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """An answer to imitate. Earlier assistant turns of a conversation stand in `prompt.messages`.

    `finished` is false for a sampled answer that was cut at a length limit: nobody ended it there, so no
    end-of-sequence token follows it. Other records say the same of their answers.
    """

    prompt: Prompt
    response: str
    weight: float = 1.0
    finished: bool = True


@dataclass(frozen=True)
class Comparison:
    """Two answers nobody has judged yet."""

    prompt: Prompt
    first: Answer
    second: Answer


@dataclass(frozen=True)
class Preference:
    """Two answers of which `chosen` is better with probability `confidence` (0.5 is a tie, 1 is certain).

    `margin` says by how much (in units of reward), `weight` how much the pair counts, `annotator` who judged.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    annotator: str | None = None
    confidence: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    chosen_finished: bool = True
    rejected_finished: bool = True


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, best first."""

    prompt: Prompt
    responses: tuple[str, ...]
    annotator: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Feedback:
    """One answer and whether it was wanted: unpaired feedback."""

    prompt: Prompt
    response: str
    desirable: bool
    annotator: str | None = None
    weight: float = 1.0
    finished: bool = True


Record = Prompt | Demonstration | Preference | Ranking | Feedback


def answers_of(record: Record) -> tuple[Answer, ...]:
    """The answers of a record: chosen before rejected, best first, none for a prompt alone."""
    match record:
        case Demonstration() | Feedback():
            return (Answer(record.response, record.finished),)
        case Preference():
            return (Answer(record.chosen, record.chosen_finished), Answer(record.rejected, record.rejected_finished))
        case Ranking():
            return tuple(Answer(response) for response in record.responses)
    return ()
