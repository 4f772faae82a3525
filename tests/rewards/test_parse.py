"""What `--reward` and `--reward-weights` may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trimtab.records import Answer, Prompt
from trimtab.rewards import Mixture, parse_reward, parse_rewards
from trimtab.rewards.parse import members

PROMPT = Prompt.from_text("?", answer="good")
GOOD = [Answer("good")]  # length 4, sentiment 0.4404, exact match 1


def test_one_reward_is_itself_and_several_are_added() -> None:
    assert parse_rewards(["length"])([PROMPT], GOOD) == [4.0]
    assert not isinstance(parse_rewards(["length"]), Mixture)
    assert parse_rewards(["length"], [0.5])([PROMPT], GOOD) == [2.0]
    assert parse_rewards(["length", "exact-match"])([PROMPT], GOOD) == [5.0]
    assert parse_rewards(["length", "exact-match"], [-1, 3])([PROMPT], GOOD) == [-1.0]


def test_ensembles_by_name() -> None:
    assert parse_reward("ensemble:mean(length,exact-match)")([PROMPT], GOOD) == [2.5]
    assert parse_reward("ensemble:min(length, exact-match)")([PROMPT], GOOD) == [1.0]
    # mean 2.5, variance 2.25
    assert parse_reward("ensemble:uwo(length,exact-match)")([PROMPT], GOOD) == [2.5 - 0.5 * 2.25]
    assert parse_reward("ensemble:uwo:lambda=1(length,exact-match)")([PROMPT], GOOD) == [0.25]


def test_ensembles_inside_ensembles_and_sums() -> None:
    # min(4, mean(4, 1)) = 2.5, and 2 * 2.5 - 4 = 1
    nested = "ensemble:min(length,ensemble:mean(length,exact-match))"
    assert parse_reward(nested)([PROMPT], GOOD) == [2.5]
    assert parse_reward(nested).name == nested
    assert parse_rewards([nested, "length"], [2, -1])([PROMPT], GOOD) == [1.0]


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        ("a,b", ["a", "b"]),
        (" a , b/c ", ["a", "b/c"]),
        ("ensemble:min(a,b),c", ["ensemble:min(a,b)", "c"]),
        ("implicit:run,reference=m,beta=2,c", ["implicit:run,reference=m,beta=2", "c"]),
        ("implicit:run,implicit:other,beta=2", ["implicit:run", "implicit:other,beta=2"]),
        ("a,beta=2", ["a", "beta=2"]),
        ("", [""]),
    ],
)
def test_members_are_divided_at_commas_of_their_own_level(inner: str, names: list[str]) -> None:
    assert members("text", inner) == names


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("sentimnt", ValueError, "Did you mean sentiment"),
        ("", ValueError, "no reward was given"),
        ("./missing", FileNotFoundError, "no folder ./missing"),
        ("py:json", ValueError, "of the form py:package.module:function"),
        ("py:no_such_module_here:f", ValueError, "no module no_such_module_here"),
        ("py:no_such_package_here.module:f", ValueError, "no module no_such_package_here"),
        ("py:json:no_such_function", ValueError, "no function no_such_function"),
        ("implcit:run", ValueError, "Did you mean implicit"),
        ("ensmble:mean(length,sentiment)", ValueError, "Did you mean ensemble"),
        ("ensemble:mean", ValueError, "of the form ensemble:"),
        ("ensemble:mean(length", ValueError, "of the form ensemble:"),
        ("ensemble:mean(length,sentiment))", ValueError, "parentheses do not match"),
        ("ensemble:mean(length)(sentiment)", ValueError, "parentheses do not match"),
        ("ensemble:mean(length,)", ValueError, "no reward was given"),
        ("ensemble:mean(length,sentimnt)", ValueError, "Did you mean sentiment"),
        ("ensemble:mean(length,length)", ValueError, "length is given 2 times"),
        ("ensemble:mean(length)", ValueError, "at least two rewards"),
        ("ensemble:median(length,sentiment)", ValueError, "mean, min, uwo"),
        ("ensemble:mean:lambda=1(length,sentiment)", ValueError, "ensemble:mean has no lambda"),
        ("ensemble:uwo:lambda=a(length,sentiment)", ValueError, "lambda must be a number"),
        ("ensemble:uwo:lambda=-1(length,sentiment)", ValueError, "at least 0"),
    ],
)
def test_unknown_rewards_say_what_is_allowed(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_reward(text)


@pytest.mark.parametrize(
    ("texts", "weights", "message"),
    [
        ([], [], "no reward was given"),
        (["length", "sentiment"], [1.0], "1 numbers for 2 rewards"),
        (["length"], [0.0], "other than 0"),
        (["length", "length"], [], "given 2 times"),
    ],
)
def test_weights_and_rewards_that_do_not_fit(texts: list[str], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rewards(texts, weights)


def test_everything_is_understood_before_a_model_is_loaded(tmp_path: Path) -> None:
    # The folder holds no model, so that loading it first would say something else.
    for texts in ([str(tmp_path), "sentimnt"], [f"ensemble:mean({tmp_path},sentimnt)"]):
        with pytest.raises(ValueError, match="Did you mean sentiment"):
            parse_rewards(texts)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"command": "sft", "model": "start"}))
    with pytest.raises(ValueError, match="beta=1"):
        parse_rewards([str(tmp_path), f"implicit:{tmp_path}"])
