"""Diversity: expectation-adjusted n-grams by hand and without a length bias, embeddings, collapse, the command."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from trimtab.builtin import tiny_policy
from trimtab.cli import main
from trimtab.evals.diversity import (
    distinct,
    distinct_ngrams,
    diversity,
    diversity_difference,
    embedding_diversity,
    leave_one_out,
    measures,
    words_of,
)
from trimtab.evals.embedder import load_embedder

WITH_SACREBLEU = pytest.mark.skipif(find_spec("sacrebleu") is None, reason="sacrebleu (extra `eval`) is not installed")


def test_adjusted_ngrams_by_hand() -> None:
    rows = words_of(["A b a.", "a c"])
    assert rows == [["a", "b", "a", "."], ["a", "c"]]
    # 4 different words of 6 and V = 10; 4 different pairs of 4, none across texts.
    assert distinct_ngrams(rows, 1, 10) == pytest.approx(4 / (10 * (1 - 0.9**6)))
    assert distinct_ngrams(rows, 2, 10) == pytest.approx(4 / (10 * (1 - 0.9**4)))
    assert math.isnan(distinct_ngrams(rows, 5, 10))
    by_n = [distinct_ngrams(rows, n, 10) for n in (1, 2, 3, 4)]
    assert distinct(rows, 10) == pytest.approx(sum(by_n) / 4)


def test_uniform_words_give_one_whatever_their_number() -> None:
    generator = np.random.default_rng(0)
    for count in (50, 500, 5000):
        words = [str(word) for word in generator.integers(1000, size=count)]
        assert distinct_ngrams([words], 1, 1000) == pytest.approx(1, abs=0.06)
    assert len(set(words)) / 5000 < 0.25, "the plain ratio falls with length"


def test_leaving_one_out_is_counting_again() -> None:
    rows = words_of(["a b c a", "b c d", "e", "a b c d e f"])
    for n in (1, 2, 3):
        literal = [distinct_ngrams(rows[:i] + rows[i + 1 :], n, 50) for i in range(4)]
        assert leave_one_out(rows, n, 50) == pytest.approx(literal)


def random_texts(generator: np.random.Generator, words: int, count: int) -> list[str]:
    return [" ".join(f"w{word}" for word in generator.integers(words, size=12)) for _ in range(count)]


def test_collapse_per_input_and_across_inputs_is_told_apart() -> None:
    generator = np.random.default_rng(1)
    free = [random_texts(generator, 3000, 8) for _ in range(40)]
    same_per_input = [[group[0]] * 8 for group in free]
    same_everywhere = [free[0] for _ in free]
    before, collapsed, mode = (diversity(groups) for groups in (free, same_per_input, same_everywhere))
    assert collapsed.per_input["distinct"].high < before.per_input["distinct"].low
    assert collapsed.across_inputs["distinct"].value == before.across_inputs["distinct"].value
    assert mode.across_inputs["distinct"].high < before.across_inputs["distinct"].low
    assert mode.per_input["distinct"].value > 0.9 * before.per_input["distinct"].value
    changed = diversity_difference(same_per_input, free, measures())
    assert changed["distinct"].high < 0
    again = diversity_difference([random_texts(generator, 3000, 8) for _ in range(40)], free, measures())
    assert again["distinct"].low < 0 < again["distinct"].high


def test_the_jackknife_covers_the_diversity_of_fresh_texts() -> None:
    truth = np.mean([diversity([[t] for t in drawn(seed)]).across_inputs["distinct_2"].value for seed in range(300)])
    found = [diversity([[t] for t in drawn(seed)]).across_inputs["distinct_2"] for seed in range(300, 500)]
    assert 0.88 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def drawn(seed: int) -> list[str]:
    """Texts whose words are few in some of them and many in others."""
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{word}" for word in generator.integers(int(generator.choice([5, 40])), size=15)) for _ in range(20)
    ]


def test_embedding_diversity_is_one_minus_the_mean_cosine() -> None:
    vectors = np.random.default_rng(2).normal(size=(6, 3)) * 5
    cosines = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for i, a in enumerate(vectors)
        for j, b in enumerate(vectors)
        if i != j
    ]
    assert embedding_diversity(vectors) == pytest.approx(1 - sum(cosines) / 30)
    assert embedding_diversity(np.array([[1.0, 0], [5, 0]])) == pytest.approx(0)
    assert embedding_diversity(np.array([[1.0, 0], [0, 2]])) == pytest.approx(1)


def test_an_embedder_averages_the_hidden_states_of_a_text(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save(tmp_path / "model")
    embed = load_embedder(str(tmp_path / "model"), device="cpu")
    vectors = embed(["One day", "a", ""])
    ids = policy.tokenizer("One day", return_tensors="pt").input_ids
    states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert vectors[0] == pytest.approx(states[0].mean(0).detach().numpy(), abs=1e-4)
    assert not vectors[2].any()
    found = diversity([["One day", "a"], ["b", "The cat"]], embed=embed)
    assert 0 < found.per_input["embedding"].value < 2 and found.across_inputs["embedding"].count == 2


@WITH_SACREBLEU
def test_self_bleu_of_repeated_and_of_unrelated_texts() -> None:
    same = diversity([["the cat sat on the mat"] * 3] * 2, bleu=True)
    assert same.per_input["self_bleu"].value == pytest.approx(100)
    other = diversity([["the cat sat on the mat", "no words of those here at all"]] * 2, bleu=True)
    assert other.per_input["self_bleu"].value < 10


@pytest.mark.skipif(find_spec("sacrebleu") is not None, reason="sacrebleu is installed")
def test_without_sacrebleu_the_message_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "diversity", "--data", "missing.jsonl", "--self-bleu"]) == 2
    assert "pip install '.[eval]'" in capsys.readouterr().err


def write(path: Path, groups: dict[str, list[str]]) -> str:
    rows = [{"prompt": prompt, "completion": text} for prompt, texts in groups.items() for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before.jsonl", {"a": ["one two three", "four five six"], "b": ["x y z", "u v w"]})
    after = write(tmp_path / "after.jsonl", {"a": ["one two three", "one two three"], "b": ["x y z", "x y z"]})
    assert main(["evaluate", "diversity", "--data", after, "--before", before, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["change"]["distinct"]["value"] < -0.4
    assert (found["inputs"], found["answers"]) == (2, 4)
    assert main(["evaluate", "diversity", "--data", after, "--max-words", "1"]) == 0
    assert "distinct_1" in capsys.readouterr().out
    uneven = write(tmp_path / "uneven.jsonl", {"a": ["one"]})
    assert main(["evaluate", "diversity", "--data", after, "--before", uneven]) == 2
    assert "as many of both" in capsys.readouterr().err
    assert main(["evaluate", "diversity", "--data", write(tmp_path / "one.jsonl", {"a": ["b"]})]) == 2
    assert "at least two answers" in capsys.readouterr().err
