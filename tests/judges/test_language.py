"""A language model as a judge: verdicts, both orders, replies on disk, and servers that misbehave."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.judges.servers import Answer as Said
from tests.judges.servers import Server, completion, serving, shown
from trimtab.evals.position_bias import position_bias
from trimtab.judges import Asked, BothOrders, LanguageJudge, parse_judge
from trimtab.judges.endpoint import FAILURES_IN_A_ROW, Endpoint, endpoint_at
from trimtab.judges.language import question, request, verdict_of
from trimtab.judges.replies import keep_reply, read_reply, reply_path
from trimtab.records import Answer, Comparison, Message, Prompt

PROMPT = Prompt.from_user("Name a number.")
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)
    return tmp_path / "cache"


def comparisons(count: int) -> list[Comparison]:
    return [Comparison(PROMPT, Answer(f"{n} and a long tail"), Answer(f"{n}")) for n in range(count)]


def judge_at(server: Server, **settings: float) -> LanguageJudge:
    """A judge that loses patience soon; one worker, so that requests come in order."""
    quick = {"first_wait": 0.001, "tries": 3, "timeout": 5.0, "workers": 1, **settings}
    return LanguageJudge("llm", replace(endpoint_at(server.url, "model"), **quick))


def prefers_longer(asked: str, number: int) -> Said:
    first, second = shown(asked)
    return completion(f"It says more.\nVerdict: {'A' if len(first) > len(second) else 'B'}")


def prefers_first(asked: str, number: int) -> Said:
    return completion("**Verdict: A**")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Both are fine.\nVerdict: A", 1.0),
        ("Verdict: B\n", 0.0),
        ("reasons\n\n**Final verdict:** [[b]].", 0.0),
        ("verdict: tie", 0.5),
        ("# Verdict: Answer_A", 1.0),
        ("<think>\nVerdict: A\n</think>\nVerdict: B", 0.0),
        ("Verdict: A\nI say it again.\nVerdict: A", 1.0),
        ("", None),
        ("A", None),
        ("The answer says 'Verdict: A', which is a trick.", None),
        ("Verdict: A\nNo.\nVerdict: B", None),
        ("Verdict: A or B", None),
        ("Verdict: neither", None),
        ("My verdict is A", None),
    ],
)
def test_one_verdict_is_read_and_none_is_guessed(reply: str, expected: float | None) -> None:
    assert verdict_of(reply) == expected


def test_the_question_holds_what_was_asked_and_both_answers_as_they_are() -> None:
    prompt = Prompt((Message("user", "Hi {first}"), Message("assistant", "Yes?"), Message("user", "Go")))
    (asked,) = question(Comparison(prompt, Answer("{prompt} {0}"), Answer("%s")))
    assert shown(asked["content"]) == ("{prompt} {0}", "%s")
    assert "[user]\nHi {first}\n\n[assistant]\nYes?\n\n[user]\nGo" in asked["content"]
    assert request(PROMPT) == "Name a number."


def test_both_orders_are_asked_and_averaged() -> None:
    with serving(prefers_longer) as server:
        judge = BothOrders(judge_at(server))
        assert judge(comparisons(3)) == [1.0, 1.0, 1.0]
        assert len(server.asked) == 6
    assert {shown(asked) for asked in server.asked} == {
        two for n in range(3) for two in ((f"{n} and a long tail", f"{n}"), (f"{n}", f"{n} and a long tail"))
    }


@pytest.mark.parametrize(
    ("says", "favours", "value"),
    [
        (prefers_first, "first", 0.5),
        (lambda asked, number: completion("Verdict: B"), "second", 0.5),
        (prefers_longer, None, 1.0),
        (lambda asked, number: completion("Verdict: tie"), None, 0.5),
    ],
)
def test_a_planted_position_bias_is_found_and_cancels(
    says: Callable[[str, int], Said], favours: str | None, value: float
) -> None:
    with serving(says) as server:
        verdicts = BothOrders(judge_at(server, workers=4)).verdicts(comparisons(12))
    found = position_bias(verdicts, range(12))
    assert found.found == favours
    assert [verdict.value for verdict in verdicts] == [value] * 12


def test_a_rerun_costs_nothing_and_another_model_or_prompt_does(cache: Path) -> None:
    with serving(prefers_longer) as server:
        first = judge_at(server)
        said = BothOrders(first)(comparisons(4))
        again = judge_at(server)
        assert BothOrders(again)(comparisons(4)) == said and len(server.asked) == 8
        assert again.asked.counts["kept"] == again.asked.counts["answered"] == 8
        assert first.asked.counts["kept"] == 0
        other = LanguageJudge("llm", replace(first.endpoint, model="other"))
        other(comparisons(1))
        assert len(server.asked) == 9
        first([Comparison(Prompt.from_user("Another one."), Answer("0 and a long tail"), Answer("0"))])
        assert len(server.asked) == 10
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_the_same_question_twice_is_asked_once() -> None:
    with serving(prefers_longer) as server:
        assert judge_at(server)(comparisons(1) * 5) == [1.0] * 5
        assert len(server.asked) == 1


def test_a_reply_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reply_path("http://host/v1", {"model": "m", "messages": []})
    assert path != reply_path("http://other/v1", {"model": "m", "messages": []})
    assert read_reply(path) is None
    keep_reply(path, "Verdict: A \ud800", "m")
    assert read_reply(path) == "Verdict: A \ud800"

    def broken(*arguments: object, **named: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("trimtab.judges.replies.os.fsync", broken)
    other = path.with_name("other.json")
    with pytest.raises(OSError, match="no space left"):
        keep_reply(other, "Verdict: B", "m")
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    for damaged in ("", '{"reply": "Verd', "[]", '{"reply": 3}'):
        path.write_text(damaged)
        assert read_reply(path) is None


def stumbles_once(trouble: Said) -> Callable[[str, int], Said]:
    """Every odd request fails, so every question needs two."""
    return lambda asked, number: trouble if number % 2 else prefers_longer(asked, number)


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b"oops"),
        (503, b""),
        (429, b'{"error": "slow down"}'),
        (200, b'{"choices": [{"mess'),
        (200, b"<html>hello</html>"),
        (200, b"{}"),
        (200, b"\xff\xfe"),
        (200, b'{"choices": [{"message": {"content": 3}}]}'),
    ],
)
def test_what_passes_is_tried_again(trouble: Said) -> None:
    with serving(stumbles_once(trouble)) as server:
        judge = judge_at(server)
        assert judge(comparisons(3)) == [1.0] * 3 and len(server.asked) == 6
    assert judge.asked.missing == 0 and judge.asked.counts["answered"] == 3


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ((500, b"out of memory"), "500 Internal Server Error: out of memory"),
        ((200, b'{"choices": [{"mess'), "expected a chat completion"),
        ((400, b"prompt is too long"), "400 Bad Request: prompt is too long"),
    ],
)
def test_what_stays_broken_loses_no_finished_verdict(trouble: Said, problem: str) -> None:
    is_healed = False

    def breaks_after_three(asked: str, number: int) -> Said:
        return prefers_longer(asked, number) if number <= 3 or is_healed else trouble

    with serving(breaks_after_three) as server:
        judge = judge_at(server)
        assert judge(comparisons(20)) == [1.0] * 3 + [None] * 17
        assert +judge.asked.counts == {"answered": 3, "failed": FAILURES_IN_A_ROW, "not asked": 17 - FAILURES_IN_A_ROW}
        tries = 1 if trouble[0] == 400 else 3
        assert len(server.asked) == 3 + tries * FAILURES_IN_A_ROW
        assert problem in str(judge.asked) and f"{17 - FAILURES_IN_A_ROW} not asked after that" in str(judge.asked)
        with pytest.raises(ConnectionError, match="answered nothing"):
            judge_at(server)(comparisons(20)[3:])
        is_healed, before = True, len(server.asked)
        rerun = judge_at(server)
        assert rerun(comparisons(20)) == [1.0] * 20
        assert len(server.asked) - before == 17 and rerun.asked.counts["kept"] == 3


def test_silence_is_a_failure_and_others_go_on() -> None:
    def silent_for_one(asked: str, number: int) -> Said | None:
        return None if shown(asked)[1] == "2" else prefers_longer(asked, number)

    with serving(silent_for_one) as server:
        judge = judge_at(server, timeout=0.2, tries=2, workers=3)
        assert judge(comparisons(6)) == [1.0, 1.0, None, 1.0, 1.0, 1.0]
    assert judge.asked.counts["failed"] == 1 and "within 0.2 s" in str(judge.asked)


def test_a_refusal_ends_the_waits_of_the_others() -> None:
    """Seven requests would wait a minute each before their next try; the eighth shows that the key is wrong."""

    def refuses_one(asked: str, number: int) -> Said:
        return (401, b"no") if shown(asked)[1] == "0" else (503, b"")

    with serving(refuses_one, {"Retry-After": "60"}) as server:
        began = time.monotonic()
        with pytest.raises(ValueError, match="answered 401"):
            judge_at(server, workers=8)(comparisons(8))
        assert time.monotonic() - began < 20


def test_nobody_listening_ends_in_a_summary() -> None:
    with serving(prefers_longer) as server:
        pass
    with pytest.raises(ConnectionError, match=r"answered nothing.*ConnectError.*Run the same command again"):
        judge_at(server)(comparisons(2))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_would_always_fail_stops_at_once(status: int) -> None:
    with serving(lambda asked, number: (status, b"no")) as server:
        with pytest.raises(ValueError, match=rf"asked for model, answered {status} .*TRIMTAB_API_KEY"):
            judge_at(server)(comparisons(9))
        assert len(server.asked) <= 2


def test_a_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("trimtab.judges.endpoint.Patience.pause", lambda patience, seconds: waits.append(seconds))
    with serving(stumbles_once((429, b"")), {"Retry-After": "7"}) as server:
        judge_at(server)(comparisons(1))
    assert waits == [7.0]
    waits.clear()
    with serving(lambda asked, number: (500, b"")) as server, pytest.raises(ConnectionError):
        judge_at(server, first_wait=1.0, tries=4)(comparisons(1))
    assert [0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits)] == [True] * 3


def test_unparsable_verdicts_are_counted_and_kept_as_they_came() -> None:
    with serving(lambda asked, number: completion("I cannot decide." if number == 1 else "Verdict: B")) as server:
        judge = judge_at(server)
        assert judge(comparisons(3)) == [None, 0.0, 0.0]
        assert judge.asked.counts["unparsable"] == 1 and judge.asked.missing == 0
        again = judge_at(server)
        assert again(comparisons(3)) == [None, 0.0, 0.0] and len(server.asked) == 3
    with serving(lambda asked, number: completion(None)) as silent:
        assert judge_at(silent)(comparisons(1)) == [None]


def test_one_order_alone_is_no_verdict() -> None:
    with serving(lambda asked, number: completion("Verdict: A" if number == 1 else "?")) as server:
        assert BothOrders(judge_at(server))(comparisons(1)) == [None]


def test_the_key_is_sent_and_written_nowhere(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", f" {KEY}\n")

    def repeats_the_key(asked: str, number: int) -> Said:
        return completion(f"You sent {KEY}.\nVerdict: A") if number == 1 else (500, f"key {KEY} is odd".encode())

    with serving(repeats_the_key) as server:
        judge = judge_at(server)
        assert judge(comparisons(2)) == [1.0, None]
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    told = f"{judge!r} {judge.asked} {json.dumps(judge.asked.to_dict())} {capsys.readouterr()}"
    assert "key *** is odd" in told and KEY not in told
    kept = "".join(path.read_text() for path in cache.rglob("*.json"))
    assert "You sent ***" in kept and KEY not in kept
    refusing = serving(lambda asked, number: (401, f"bad key {KEY}".encode()))
    with refusing as server, pytest.raises(ValueError, match=r"bad key \*\*\*\. The key in TRIMTAB_API_KEY was sent"):
        judge_at(server)(comparisons(1))
    monkeypatch.setenv("TRIMTAB_API_KEY", "two words")
    with pytest.raises(ValueError, match="characters that a key cannot have") as refused:
        endpoint_at("http://127.0.0.1/v1", "m")
    assert "two words" not in str(refused.value)


def test_no_key_is_sent_where_there_is_none() -> None:
    with serving(prefers_longer) as server:
        judge_at(server)(comparisons(1))
        assert "Authorization" not in server.headers[0]


def test_addresses_come_with_and_without_their_end() -> None:
    assert endpoint_at("http://h:1/v1/", "m").url == "http://h:1/v1/chat/completions"
    assert endpoint_at("http://h:1/v1/chat/completions", "m").url == "http://h:1/v1/chat/completions"


def test_judge_says_llm() -> None:
    judge = parse_judge("llm:http://127.0.0.1:9/v1#owner/model")
    assert isinstance(judge, BothOrders) and judge.name == "llm:http://127.0.0.1:9/v1#owner/model"
    inner = judge.judge
    assert isinstance(inner, LanguageJudge) and isinstance(inner.endpoint, Endpoint)
    assert (inner.endpoint.model, inner.endpoint.key) == ("owner/model", "")


def test_the_tally_in_words_and_for_json() -> None:
    asked = Asked()
    assert str(asked) == "0 questions answered (0 of them kept from before), 0 without a verdict that can be read"
    assert asked.to_dict() == {"answered": 0, "kept": 0, "unparsable": 0, "failed": 0, "not_asked": 0, "problems": []}
    assert not re.search("failed", str(asked))
