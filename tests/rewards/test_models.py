"""Reward models and the implicit reward of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trimtab.batches import Tokens
from trimtab.builtin import tiny_policy
from trimtab.models import Policy, load_scalar
from trimtab.records import Answer, Demonstration, Prompt
from trimtab.rewards import ImplicitReward, ModelReward, every_score, parse_reward
from trimtab.rewards.implicit import implicit_source
from trimtab.tokens import encode_answer, pad, tokenize

TEXT = Prompt.from_text("A review: ", columns={"target": 3}, source="rows.jsonl:2")
CHAT = Prompt.from_user("Say something.", answer="yes", columns={"target": 4})


def texts(*answers: str) -> list[Answer]:
    return [Answer(text) for text in answers]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(dtype="float32", device="cpu")


@dataclass
class CharacterModel:
    """Stands in for a reward model: scores a row by the mean of its real ids."""

    tokenizer: Any
    pad_id: int
    device: torch.device
    is_split: bool = False

    def scores(self, tokens: Tokens) -> torch.Tensor:
        real = tokens.attention_mask.float()
        return (tokens.ids * real).sum(-1) / real.sum(-1)


def character_model(policy: Policy) -> CharacterModel:
    return CharacterModel(policy.tokenizer, policy.pad_id, policy.device)


def test_model_reward_keeps_order_and_ignores_batches(policy: Policy) -> None:
    model = character_model(policy)
    answers = ["a much longer answer than the others", "b", "", "medium one", "b"]
    scored = [ModelReward("m", model, batch_rows=rows)([TEXT] * 5, texts(*answers)) for rows in (1, 2, 5)]  # type: ignore[arg-type]
    expected = [
        float(model.scores(pad([encode_answer(policy.tokenizer, TEXT, answer)], policy.pad_id))[0])
        for answer in answers
    ]
    for values in scored:
        assert values == pytest.approx(expected, abs=1e-5)


def test_a_cut_answer_is_scored_without_a_closing_token_as_in_training(policy: Policy) -> None:
    model: Any = character_model(policy)
    cut, ended = Answer("some words", finished=False), Answer("some words")
    for prompt in (TEXT, CHAT):
        records = [Demonstration(prompt, "some words", finished=False), Demonstration(prompt, "some words")]
        rows = [item.rows[0] for item in tokenize(policy.tokenizer, records)]
        assert len(rows[0].ids) == len(rows[1].ids) - 1
        expected = [float(model.scores(pad([row], policy.pad_id))) for row in rows]
        assert expected[0] != expected[1]
        assert ModelReward("m", model)([prompt] * 2, [cut, ended]) == pytest.approx(expected, abs=1e-5)


def test_a_cut_answer_has_the_implicit_reward_of_its_own_tokens(policy: Policy) -> None:
    other = tiny_policy(seed=1, dtype="float32", device="cpu")
    answers = [Answer("some words", finished=False), Answer("some words")]
    cut, ended = every_score(ImplicitReward("i", other, policy, beta=1.0), [CHAT] * 2, answers)
    tokens = pad([encode_answer(policy.tokenizer, CHAT, "some words")], policy.pad_id)
    with torch.no_grad():
        per_token = (other.logprobs(tokens) - policy.logprobs(tokens))[0]
    assert ended == pytest.approx(float(per_token.sum()), abs=1e-5)
    assert cut == pytest.approx(float(per_token[:-1].sum()), abs=1e-5) and abs(cut - ended) > 1e-4


def test_overlong_answers_are_an_error_or_lose_their_prompt_but_are_never_left_out(policy: Policy) -> None:
    model: Any = character_model(policy)
    with pytest.raises(ValueError, match="--max-length"):
        ModelReward("m", model, max_length=8)([TEXT], texts("an answer of many tokens"))
    with pytest.raises(ValueError, match="every answer"):
        ModelReward("m", model, max_length=8, overlong="drop")([TEXT], texts("short"))
    answer = encode_answer(policy.tokenizer, TEXT, "yes")
    cut = ModelReward("m", model, max_length=len(answer.ids) - 2, overlong="truncate-prompt-left")([TEXT], texts("yes"))
    assert len(cut) == 1 and cut[0] != model.scores(pad([answer], policy.pad_id)).item()


def test_implicit_reward_is_beta_times_the_log_ratio(policy: Policy) -> None:
    other = tiny_policy(dtype="float32", device="cpu")
    assert ImplicitReward("i", policy, other, beta=0.5)([TEXT, CHAT], texts("a", "b")) == pytest.approx(
        [0, 0], abs=1e-6
    )
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    [value] = ImplicitReward("i", policy, other, beta=0.5)([TEXT], texts("some words"))
    tokens = pad([encode_answer(policy.tokenizer, TEXT, "some words")], policy.pad_id)
    ratio = policy.logprobs(tokens).sum() - other.logprobs(tokens).sum()
    assert value == pytest.approx(0.5 * float(ratio.detach()), abs=1e-5) and value != 0


def test_saved_reward_model_is_a_reward(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "start")
    trained = load_scalar(tmp_path / "start", new_head=True, dtype="float32", device="cpu")
    trained.save(tmp_path / "reward")
    reward = parse_reward(str(tmp_path / "reward"), dtype="float32", device="cpu")
    rows = [encode_answer(policy.tokenizer, prompt, answer) for prompt, answer in [(TEXT, "good"), (CHAT, "bad one")]]
    expected = [float(trained.scores(pad([row], policy.pad_id)).detach()) for row in rows]
    assert reward([TEXT, CHAT], texts("good", "bad one")) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="head"):
        parse_reward(str(tmp_path / "start"))


def test_run_of_a_policy_is_an_implicit_reward(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "start")
    tiny_policy(seed=1).save(tmp_path / "run" / "model")
    run = written_run(tmp_path / "run", model=str(tmp_path / "start"), loss="dpo", loss_args=["beta=0.25"])
    reward = parse_reward(f"implicit:{run}", dtype="float32", device="cpu")
    literal = ImplicitReward("literal", tiny_policy(seed=1), policy, beta=0.25)
    answers = texts("one", "two words")
    assert reward([TEXT, CHAT], answers) == pytest.approx(literal([TEXT, CHAT], answers), abs=1e-5)
    assert all(reward([TEXT, CHAT], answers))


def written_run(folder: Path, **config: Any) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder)


def test_implicit_reward_reads_the_run(tmp_path: Path) -> None:
    run = written_run(tmp_path, command="dpo", model="start", loss="ipo", loss_args=["tau=0.3", "average=false"])
    source = implicit_source(f"implicit:{run}")
    assert (source.policy, source.reference, source.beta) == (run, "start", 0.3)
    assert implicit_source(f"implicit:{run},beta=2,reference=other").reference == "other"
    assert implicit_source(f"implicit:{run},beta=2").beta == 2
    written_run(tmp_path, command="dpo", model="start", loss="dpo", loss_args=[], ref_model="another")
    assert (implicit_source(f"implicit:{run}").beta, implicit_source(f"implicit:{run}").reference) == (0.1, "another")


@pytest.mark.parametrize("loss", ["simpo", "ipo", "sft", "length_normalized_dpo"])
def test_a_policy_that_was_not_trained_on_sums_of_log_ratios_has_no_beta(tmp_path: Path, loss: str) -> None:
    run = written_run(tmp_path, command="dpo", model="start", **({} if loss == "sft" else {"loss": loss}), loss_args=[])
    with pytest.raises(ValueError, match="beta=1"):
        implicit_source(f"implicit:{run}")
    assert implicit_source(f"implicit:{run},beta=2").beta == 2


def test_without_a_reference_the_likelihood_is_the_reward(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    source = implicit_source(f"implicit:{tmp_path / 'model'},reference=none")
    assert (source.reference, source.beta) == (None, 1.0)
    reward = parse_reward(f"implicit:{tmp_path / 'model'},reference=none,beta=2", dtype="float32", device="cpu")
    prompt, answer = Prompt.from_text("One"), Answer(" day", finished=False)
    with_reference = parse_reward(f"implicit:{tmp_path / 'model'},reference=tiny,beta=2", dtype="float32", device="cpu")
    assert with_reference([prompt], [answer])[0] == pytest.approx(0, abs=1e-5)
    row = encode_answer(policy.tokenizer, prompt, " day")
    ids = torch.tensor([row.ids[:-1]])  # nobody ended the answer
    with torch.no_grad():
        logs = policy.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert reward([prompt], [answer])[0] == pytest.approx(2 * float(logs[-4:].sum()), rel=1e-4)


def test_implicit_reward_without_what_it_needs(tmp_path: Path) -> None:
    run = written_run(tmp_path, command="sft", model="start")
    with pytest.raises(ValueError, match="beta=1"):
        implicit_source(f"implicit:{run}")
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="reference=MODEL"):
        implicit_source(f"implicit:{run}")
    with pytest.raises(FileNotFoundError, match="no run directory"):
        implicit_source(f"implicit:{run}/missing")
    with pytest.raises(ValueError, match="positive number"):
        implicit_source(f"implicit:{run},reference=a,beta=-1")
    with pytest.raises(ValueError, match="of the form"):
        implicit_source(f"implicit:{run},gamma=1")
