"""A conversation with a model as plain values: what was typed, what the model is asked, what it said, what is kept.

Nothing here loads or runs a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from trimtab.data import to_row
from trimtab.records import Answer, Demonstration, Message, Prompt
from trimtab.untrusted import home_expanded

COMMANDS = {
    "/reset": "begin anew; the system message stays",
    "/system TEXT": "begin anew under this system message; without TEXT under none",
    "/seed N": "draw by another seed from here on",
    "/save FILE": "add the last answers to a .jsonl file: prompt, completion, and what was measured",
    "/help": "this list; a message that begins with a slash is typed with two",
    "/quit": "leave, as the end of the input and Ctrl-C do",
}


@dataclass(frozen=True)
class Typed:
    """A line that somebody typed: a message (`command` is empty), or a command and what follows it."""

    command: str
    text: str


def typed(line: str) -> Typed:
    """A line as a message or a command. ValueError, naming those there are, for another command."""
    line = line.strip()
    if not line.startswith("/") or line.startswith("//"):
        return Typed("", line.removeprefix("/") if line.startswith("//") else line)
    word, _, rest = line.partition(" ")
    known = [name.split()[0] for name in COMMANDS]
    if word not in known:
        near = get_close_matches(word, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"there is no command {word}.{hint} There are {', '.join(known)}; a message that begins with a slash is "
            "typed with two."
        )
    return Typed(word, rest.strip())


@dataclass(frozen=True)
class Conversation:
    """What was said so far between a user and one model.

    A model without a chat template (`is_plain`) continues texts: each one stands alone, for nothing in its training
    tells it where an answer ends and the next question begins.
    """

    is_plain: bool = False
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    def asked(self, text: str) -> Prompt:
        """What the model reads before it answers `text`."""
        if self.is_plain:
            return Prompt.from_text(text)
        system = [Message("system", self.system)] if self.system else []
        earlier = [Message(role, said) for turn in self.turns for role, said in zip(ROLES, turn, strict=True)]
        return Prompt((*system, *earlier, Message("user", text)))

    def answered(self, text: str, answer: str) -> Conversation:
        """The conversation with one more turn."""
        return replace(self, turns=(*self.turns, (text, answer)))

    def reset(self, system: str | None = None) -> Conversation:
        """The conversation without its turns, under another system message if one is given."""
        return replace(self, turns=(), system=self.system if system is None else system)


ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Reply:
    """What a model answered, and what was measured of it.

    `tokens` counts the closing one; `kl` is in nats per answer, None without a reference; `reward` is None without a
    reward or where the reward leaves the answer out.
    """

    model: str
    prompt: Prompt
    answer: Answer
    tokens: int
    seed: int
    kl: float | None = None
    reward: float | None = None

    @property
    def figures(self) -> str:
        """What was measured, for people."""
        told = [f"{self.tokens} tokens" + ("" if self.answer.finished else ", cut")]
        told += [] if self.kl is None else [f"KL {self.kl:.2f}"]
        told += [] if self.reward is None else [f"reward {self.reward:.3f}"]
        return ", ".join(told)

    def to_row(self) -> dict[str, Any]:
        """The same as a row of a file, in the columns that every command reads."""
        row = to_row(Demonstration(self.prompt, self.answer.text, finished=self.answer.finished))
        row |= {"model": self.model, "seed": self.seed, "tokens": self.tokens}
        measured = {"kl": self.kl, "reward": self.reward}
        return row | {name: value for name, value in measured.items() if value is not None}


def save(replies: list[Reply], name: str) -> None:
    """Add replies to a .jsonl file. ValueError where there are none, or for another kind of file."""
    path = home_expanded(name)
    if not replies:
        raise ValueError("/save: nothing was answered yet.")
    if path.suffix != ".jsonl":
        raise ValueError(f"/save {name}: give a file whose name ends in .jsonl.")
    lines = [json.dumps(reply.to_row(), ensure_ascii=False) for reply in replies]
    # A lone surrogate, which is no Unicode text, goes back as the JSON escape that it came as.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(f"{line}\n" for line in lines))


def to_seed(text: str) -> int:
    """The number after /seed. ValueError for what is none."""
    try:
        seed = int(text)
    except ValueError:
        raise ValueError(f"/seed {text}: a whole number is needed, such as /seed 1.") from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"/seed {text}: a number of at most 63 bits is needed.")
    return seed
