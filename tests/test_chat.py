"""`trimtab chat`: answers are the sampler's, figures the estimators', and no text does anything to a terminal."""

import io
import json
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trimtab import models
from trimtab.cli import main
from trimtab.conversation import Reply
from trimtab.evals.drift import kl_per_token
from trimtab.models import Policy, load_policy
from trimtab.recipes import chat_screen
from trimtab.recipes.chat import Chat, legend, reference_of, same_vocabulary
from trimtab.recipes.options import SamplingOptions
from trimtab.records import Answer, Message, Prompt
from trimtab.sampling import Samples, sample

FAST = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6"]
Said = Callable[..., tuple[str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a chat with these flags and these lines says: the answers, and the rest."""

    def run(typed: str, *flags: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["chat", *flags]) == status
        told = capsys.readouterr()
        return told.out, told.err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose policy has left its start model."""
    folder = tmp_path_factory.mktemp("chat")
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": "a b c", "rejected": "x y z"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--steps", "4", "--lr", "0.01", "--samples", "0", "--no-reference-cache", *FAST[:4]]
    assert main(["dpo", "--model", "tiny", "--data", str(pairs), "--out", str(folder / "run"), *flags]) == 0
    return str(folder / "run")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a chat template."""
    policy, folder = loaded("tiny"), tmp_path_factory.mktemp("base") / "model"
    policy.tokenizer.chat_template = None
    policy.save(folder)
    return str(folder)


def loaded(name: str) -> Policy:
    return load_policy(name, dtype="float32", device="cpu")


def drawn(policy: Policy, *turns: str, seed: int = 0) -> Samples:
    """The answer to a conversation in which user and assistant take turns."""
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return sample(policy, [Prompt(tuple(messages))], max_new_tokens=6, seed=seed)


def shown(samples: Samples) -> str:
    return chat_screen.plain(samples.texts[0]).plain


# ---- What is said


def test_answers_are_the_samplers_turn_by_turn(said: Said) -> None:
    policy = loaded("tiny")
    first = drawn(policy, "Hi")
    second = drawn(policy, "Hi", first.texts[0], "Go on")
    anew, other = drawn(policy, "Go on"), drawn(policy, "Go on", seed=3)
    out, err = said("Hi\n\nGo on\n/reset\nGo on\n/reset\n/seed 3\nGo on\n", "tiny", *FAST)
    expected = [shown(one) for one in (first, second, anew, other)]
    assert [part.rpartition("\n")[0] for part in out.split("]\n")[:-1]] == expected
    assert len(set(expected)) == 4 and "KL is not measured" in err and ">" not in out


def test_figures_are_the_estimators(said: Said, run: str) -> None:
    samples = drawn(loaded(run), "Hi")
    kl = kl_per_token(loaded(run), loaded("tiny"), samples).sum().item()
    assert kl > 0.05
    out, err = said("Hi\n", run, "--reward", "length", *FAST)
    length = len(samples.answers[0].ids)
    assert f"[{length} tokens" in out and f"KL {kl:.2f}, reward " in out
    assert "nats per answer from tiny, exact over the vocabulary at every token" in err


def test_two_models_go_on_with_their_own_answers(said: Said, run: str, tmp_path: Path) -> None:
    one, two, out = loaded(run), loaded("tiny"), tmp_path / "answers.jsonl"
    mine, theirs = drawn(one, "Hi").texts[0], drawn(two, "Hi").texts[0]
    assert mine != theirs
    printed, err = said(f"Hi\nAnd?\n/save {out}\n", run, "--versus", "tiny", *FAST)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == [run, "tiny"] and "2 rows added" in err
    assert [row["prompt"][1]["content"] for row in rows] == [mine, theirs]
    assert [row["completion"][0]["content"] for row in rows] == [
        drawn(one, "Hi", mine, "And?").texts[0],
        drawn(two, "Hi", theirs, "And?").texts[0],
    ]
    assert rows[0]["kl"] > 0 and rows[1]["kl"] == 0  # the other model is the reference
    assert printed.count(f"{run}:\n") == 2 and printed.count("tiny:\n") == 2
    scored = tmp_path / "scored.jsonl"
    assert main(["score", "--reward", "length", "--data", str(out), "--out", str(scored)]) == 0


def test_a_system_message_is_read(said: Said) -> None:
    policy = loaded("tiny")
    prompt = Prompt((Message("system", "Be brief."), Message("user", "Hi")))
    expected = sample(policy, [prompt], max_new_tokens=6)
    out, _ = said("/system Be brief.\nHi\n", "tiny", *FAST)
    assert out.startswith(shown(expected) + "\n[") and expected.texts != drawn(policy, "Hi").texts


def test_a_base_model_continues_texts_each_alone(said: Said, base: str) -> None:
    expected = sample(loaded(base), [Prompt.from_text("Once")], max_new_tokens=6)
    out, err = said("Once\nOnce\n/system x\n", base, *FAST)
    assert out.count(shown(expected) + "\n[") == 2
    assert "has no chat template" in err and "/system has no effect" in err


def test_a_mistake_in_one_turn_is_told_and_changes_nothing(said: Said) -> None:
    typed = f"{'long ' * 300}\n/sytem x\n/save\nHi\n"
    out, err = said(typed, "tiny", *FAST)
    assert out.startswith(shown(drawn(loaded("tiny"), "Hi")) + "\n[")
    assert "this is too long" in err and "/reset" in err
    assert "Did you mean /system?" in err and "nothing was answered" in err


def test_a_reward_that_fails_or_leaves_out(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moody_rewards.py").write_text(
        "def none(completions):\n    return [None]\n\n\ndef broken(completions):\n    return ['x']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out, _ = said("Hi\n", "tiny", "--reward", "py:moody_rewards:none", *FAST)
    assert "tokens" in out and "reward" not in out
    out, err = said("Hi\n", "tiny", "--reward", "py:moody_rewards:broken", *FAST)
    assert not out and "not a finite number" in err


# ---- The end


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_is_quiet(end: type[BaseException], monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    def ending(sign: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", ending)
    out, err = said("", "tiny", *FAST)
    assert not out and "Traceback" not in err and "interrupted" not in err


def test_an_interrupted_answer_ends_the_chat(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.sampling.answers.draw", interrupted)
    out, err = said("Hi\nHi\n", "tiny", *FAST)
    assert not out and "Traceback" not in err


def test_quit_leaves_the_rest_unread(said: Said) -> None:
    out, err = said("/help\n/quit\nHi\n", "tiny", *FAST)
    assert not out and "/save FILE" in err


# ---- What is loaded


def test_a_model_that_is_both_is_loaded_once(said: Said, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    real = models.load_policy
    monkeypatch.setattr(models, "load_policy", lambda name, **options: names.append(name) or real(name, **options))
    said("", run, "--versus", "tiny", *FAST)
    assert names == [run, "tiny"]


def test_what_kl_is_measured_from(run: str) -> None:
    assert reference_of(Chat(run)) == "tiny" == reference_of(Chat(f"{run}/model"))
    assert reference_of(Chat(run, versus="other")) == "tiny"
    assert reference_of(Chat("tiny", versus="other")) == "other"
    assert reference_of(Chat("tiny")) is None is reference_of(Chat(run, reference="none"))
    assert reference_of(Chat(run, reference="third")) == "third"


def test_without_a_common_vocabulary_there_is_no_kl(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda v=v: v)) for v in ({"a": 1}, {"b": 1}))
    speaker: Any = SimpleNamespace(name="M", policy=one)
    assert same_vocabulary([speaker], one, "R", Chat("M"))
    assert not same_vocabulary([speaker], other, "R", Chat("M"))
    assert "M and R have different vocabularies" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--reference R"):
        same_vocabulary([speaker], other, "R", Chat("M", reference="R"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-rows", "2"], "--batch-rows 2 has no effect"),
        (["--reward-weights", "2"], "--reward-weights has no effect"),
        (["--reward", "lenght"], "Did you mean length"),
        (["--seed", str(2**64)], "63 bits"),
        (["--sampler", "other"], "--sampler other"),
        (["--versus", "./nowhere"], "nowhere"),
    ],
)
def test_mistakes_in_flags_are_told(flags: list[str], told: str, said: Said) -> None:
    out, err = said("Hi\n", "tiny", *flags, *FAST, status=2)
    assert told in err and not out


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_told_before_anything_is_loaded(
    stream: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    assert main(["chat", "tiny"]) == 2
    assert capsys.readouterr().err.startswith("trimtab: chat reads from standard input")


def test_the_legend_says_when_kl_is_no_kl_of_the_model() -> None:
    assert "not drawn plainly" not in legend("M", SamplingOptions(max_new_tokens=3, stop=("x",)))
    assert "not drawn plainly" in legend("M", SamplingOptions(temperature=0.5))
    assert "KL is not measured" in legend(None, SamplingOptions())


# ---- On a terminal

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b1A\r\x08[bold red]x[/] :smile: \u202edrow\ta\nb \ud800"


def replies(*texts: str) -> list[Reply]:
    prompt = Prompt.from_user("Hi")
    return [Reply(f"m[{i}]\x1b[1m", prompt, Answer(text), 3, seed=0, kl=0.25) for i, text in enumerate(texts)]


def on_terminal(monkeypatch: pytest.MonkeyPatch, some: list[Reply], width: int) -> str:
    """What a terminal without colours gets."""
    file = io.StringIO()
    terminal = partial(Console, file=file, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr(chat_screen, "Console", terminal)
    chat_screen.show(some)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 120])
@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_does_nothing_to_a_terminal(width: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = on_terminal(monkeypatch, replies(*[HOSTILE] * count), width)
    assert not [c for c in told if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"] and "\u202e" not in told
    together = re.sub(r"[│┃|\s]", "", told)
    for part in (r"\x1b]0;title\x07\x1b[2J\x9b1A\r\x08[boldred]x[/]:smile:", r"\u202edrow", "m[0]" * (count > 1)):
        assert part in together


def test_a_pipe_gets_answers_as_harmless_and_with_their_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    chat_screen.show(replies("one two " * 40 + HOSTILE))
    told = capsys.readouterr().out
    assert told.startswith("one two " * 40 + r"\x1b]0;title") and told.count("\n") == 3


def test_two_answers_stand_side_by_side_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    some = replies("left " * 30, "right")
    wide, narrow = (on_terminal(monkeypatch, some, width).splitlines() for width in (100, 79))
    assert any("left" in line and "right" in line for line in wide)
    assert not any("left" in line and "right" in line for line in narrow)
    assert max(map(len, wide)) <= 100 and max(map(len, narrow)) <= 79
    assert sum("KL 0.25" in line for line in wide) == 1 and sum("KL 0.25" in line for line in narrow) == 2


def test_long_words_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    told = on_terminal(monkeypatch, replies("a" * 300, "b"), 100)
    assert told.count("a") >= 300


def test_letters_that_need_joining_stay() -> None:
    text = "می‌خواهم 👩‍💻 全角　空白 שלום"
    assert chat_screen.plain(text).plain == text
