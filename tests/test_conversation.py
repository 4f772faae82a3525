"""Conversations as values: what lines mean, what a model is asked, what is kept for later."""

import json
from pathlib import Path

import pytest

from trimtab import data
from trimtab.conversation import COMMANDS, Conversation, Reply, Typed, save, to_seed, typed
from trimtab.records import Answer, Demonstration, Message, Prompt

TALK = Conversation(system="Be brief.").answered("Hi", "Hello.").answered("Who?", "Me.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("What is 1/2?", Typed("", "What is 1/2?")),
        ("  What?  ", Typed("", "What?")),
        ("", Typed("", "")),
        ("/reset", Typed("/reset", "")),
        ("/system  Be brief. ", Typed("/system", "Be brief.")),
        ("//etc is a folder", Typed("", "/etc is a folder")),
        ("/save my answers.jsonl", Typed("/save", "my answers.jsonl")),
    ],
)
def test_what_a_line_means(line: str, expected: Typed) -> None:
    assert typed(line) == expected


def test_an_unknown_command_is_told_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match=r"no command /sytem\. Did you mean /system\?"):
        typed("/sytem x")
    with pytest.raises(ValueError, match="/quit"):
        typed("/")
    assert all(typed(name.split()[0]).command for name in COMMANDS)


def test_a_model_is_asked_with_all_that_was_said() -> None:
    roles = [(message.role, message.content) for message in TALK.asked("Why?").messages]
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?")]
    assert roles == [("system", "Be brief."), *turns]
    assert Conversation().asked("Hi") == Prompt.from_user("Hi")


def test_a_model_without_template_continues_each_text_alone() -> None:
    assert Conversation(is_plain=True).answered("One", " two").asked("Three") == Prompt.from_text("Three")


def test_resetting() -> None:
    assert TALK.reset() == Conversation(system="Be brief.")
    assert TALK.reset("Other.") == Conversation(system="Other.")
    assert TALK.reset("") == Conversation()


@pytest.mark.parametrize("prompt", [TALK.asked("Why?"), Prompt.from_text("Once upon")], ids=["chat", "text"])
def test_what_is_saved_is_read_as_what_was_said(prompt: Prompt, tmp_path: Path) -> None:
    replies = [
        Reply("a", prompt, Answer("Ünïcode\n\x1b[2J"), 3, seed=1, kl=0.5, reward=-2.0),
        Reply("b", prompt, Answer("cut", finished=False), 2, seed=1),
    ]
    out = tmp_path / "answers.jsonl"
    for _ in range(2):
        save(replies, str(out))
    records = data.load(out, Demonstration).records
    told = [(record.prompt.messages, record.response, record.finished) for record in records]
    assert told == 2 * [(prompt.messages, reply.answer.text, reply.answer.finished) for reply in replies]
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[:2])
    assert (first["model"], first["seed"], first["tokens"], first["kl"], first["reward"]) == ("a", 1, 3, 0.5, -2.0)
    assert "kl" not in second and "reward" not in second


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    reply = Reply("a", Prompt.from_user("Hi"), Answer("Hello."), 2, seed=0)
    with pytest.raises(ValueError, match="nothing was answered"):
        save([], str(tmp_path / "x.jsonl"))
    for name in ("answers.txt", ""):
        with pytest.raises(ValueError, match=r"ends in \.jsonl"):
            save([reply], name)
    with pytest.raises(OSError, match="nowhere"):
        save([reply], str(tmp_path / "nowhere" / "x.jsonl"))
    with pytest.raises(OSError, match="nobody-of-this-name"):
        save([reply], "~nobody-of-this-name/x.jsonl")


def test_figures_for_people() -> None:
    reply = Reply("a", Prompt.from_user("Hi"), Answer("Hello.", finished=False), 7, seed=0, kl=1.234, reward=0.5)
    assert reply.figures == "7 tokens, cut, KL 1.23, reward 0.500"
    assert Reply("a", reply.prompt, Answer(""), 1, seed=0).figures == "1 tokens"


@pytest.mark.parametrize("text", ["", "one", "1.5", str(2**63)])
def test_a_seed_is_a_whole_number(text: str) -> None:
    assert to_seed("-3") == -3
    with pytest.raises(ValueError, match="/seed"):
        to_seed(text)


def test_prompts_of_a_conversation_are_messages() -> None:
    assert all(isinstance(message, Message) for message in TALK.asked("x").messages)
