"""Which of the policy's fresh answers are learned from: pairs and bests by hand, exact tokens, laziness."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bigram import Bigram
from trimtab.builtin import tiny_policy
from trimtab.judges import JudgedReward, RuleJudge
from trimtab.layout import find_groups
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES
from trimtab.models import Policy
from trimtab.objectives import DemonstrationObjective, FreshObjective, PreferenceObjective
from trimtab.records import Prompt
from trimtab.rewards import RuleReward
from trimtab.rollouts import Stages
from trimtab.run import Run
from trimtab.sampling import Samples, sample
from trimtab.selection import (
    Drawn,
    above,
    best,
    best_and_worst,
    chosen_demonstrations,
    chosen_pairs,
    fresh_batches,
    rollout,
    select,
)
from trimtab.tokens import Row, encode_prompts, pad

PROMPTS = tuple(Prompt.from_text(text) for text in ("one", "two", "three"))
FIRST_IDS = {"one": [1, 2], "two": [3], "three": [4, 5, 1]}


def by_text(worth: dict[str, float | None]) -> RuleReward:
    return RuleReward("worth", lambda prompt, answer: worth[answer.text])


def samples_of(texts: Sequence[str], n: int, finished: Sequence[bool] | None = None) -> Samples:
    """Answers whose tokens are 1 to 5 for the letters a to e, each closed by 0."""
    rows = []
    for i, text in enumerate(texts):
        prompt, answer = FIRST_IDS[PROMPTS[i // n].text], [" abcde".index(letter) for letter in text] + [0]
        rows.append(Row(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    tokens = pad(rows, 0)
    logprobs = torch.where(tokens.response_mask, -0.5, 0.0)
    ended = torch.tensor([True] * len(texts) if finished is None else list(finished))
    return Samples(PROMPTS[: len(texts) // n], n, tokens, logprobs, logprobs, list(texts), ended)


def stages_for(drawn: Callable[[int], Samples], reward: Any, reference: Any = None) -> Stages:
    """Stages that hand out given answers; the reference is a bigram."""
    model = reference or Bigram(7)
    return Stages(
        draw=lambda prompts, n, *, step: drawn(step),
        greedy=lambda prompts: drawn(0),
        reward=reward,
        reference=model.logprobs,
        policy=model.logprobs,
        max_rows=4,
    )


# ---- Choosing


@pytest.mark.parametrize(
    ("scores", "pair", "kept", "good"),
    [
        ([1.0, 3.0], ((1, 0), ""), ((1,), ""), ((1,), "")),
        ([2.0, 2.0], ((), "tied"), ((), "tied"), ((), "below")),
        ([3.0, 3.0], ((), "tied"), ((), "tied"), ((0, 1), "")),
        ([None, 3.0], ((), "unscored"), ((), "unscored"), ((1,), "")),
        ([None, None], ((), "unscored"), ((), "unscored"), ((), "unscored")),
        ([0.0, -1.0, 4.0, 2.5], ((2, 1), ""), ((2,), ""), ((2, 3), "")),
        ([5.0, 1.0, 5.0, 1.0], ((0, 1), ""), ((0,), ""), ((0, 2), "")),
        ([None, 1.0, 1.0, None], ((), "tied"), ((), "tied"), ((), "below")),
        ([None, 1.0, None, 7.0], ((3, 1), ""), ((3,), ""), ((3,), "")),
        ([-3.0, None, -2.0, -2.5], ((2, 0), ""), ((2,), ""), ((), "below")),
    ],
)
def test_choices_by_hand(scores: list[float | None], pair: Any, kept: Any, good: Any) -> None:
    assert best_and_worst(scores) == pair
    assert best(scores) == kept
    assert above(scores, threshold=2.0) == good


def test_an_answer_at_the_threshold_is_not_above_it() -> None:
    assert above([0.0, -1.0], threshold=0.0).places == () and above([0.0, -1.0], threshold=-1.0).places == (0,)


def test_groups_are_neighbours_and_what_is_missed_is_counted() -> None:
    scores = [1.0, 2.0, 3.0, 3.0, None, 1.0, 5.0, 4.0]
    selection = select(scores, 2, best_and_worst)
    assert selection.rows == [1, 0, 6, 7] and selection.kept == 2
    assert selection.missed == {"tied": 1, "unscored": 1}
    wide = select(scores, 4, best_and_worst)
    assert wide.rows == [2, 0, 6, 5] and wide.kept == 2 and not wide.missed


# ---- Batches


def one_rollout(texts: Sequence[str], n: int, reward: Any, finished: Sequence[bool] | None = None, **how: Any) -> Drawn:
    stages = stages_for(lambda step: samples_of(texts, n, finished), reward)
    return rollout(1, PROMPTS[: len(texts) // n], stages, best_and_worst, group_size=n, **how)


def test_pairs_are_the_tokens_drawn_with_their_reference() -> None:
    reward = by_text({"a": 1.0, "abc": 2.0, "dd": 4.0, "e": -1.0, "bbbb": None, "c": 0.0})
    drawn = one_rollout(["a", "abc", "dd", "e", "bbbb", "c"], 2, reward)
    assert drawn.selection.rows == [1, 0, 2, 3] and drawn.selection.missed == {"unscored": 1}
    pairs = chosen_pairs(drawn.rollouts, drawn.selection.rows)
    # Prompt, letters, the closing 0, and padding, which is 0 as well.
    assert pairs.tokens.ids.tolist() == [
        [1, 2, 1, 2, 3, 0],
        [1, 2, 1, 0, 0, 0],
        [3, 4, 4, 0, 0, 0],
        [3, 5, 0, 0, 0, 0],
    ]
    assert pairs.tokens.response_mask.sum(-1).tolist() == [4, 2, 3, 2]
    assert pairs.batch.margin.tolist() == [1.0, 5.0]
    assert pairs.batch.weights.tolist() == pairs.batch.confidence.tolist() == [1.0, 1.0]
    assert torch.allclose(pairs.logprobs, Bigram(7).logprobs(pairs.tokens), atol=1e-6)
    assert (pairs.logprobs != 0).sum() == 11
    without = chosen_pairs(drawn.rollouts, drawn.selection.rows, with_reference=False)
    assert not without.logprobs.any() and without.logprobs.shape == pairs.logprobs.shape


def test_the_two_answers_of_a_pair_share_their_prompt() -> None:
    reward = by_text({"a": 1.0, "b": 0.0, "c": 2.0, "d": 3.0, "e": 9.0, "ee": 5.0})
    drawn = one_rollout(["a", "b", "c", "d", "e", "ee"], 2, reward)
    pairs = chosen_pairs(drawn.rollouts, drawn.selection.rows)
    assert find_groups(pairs.tokens, share=True).number.tolist() == [0, 0, 1, 1, 2, 2]


def test_demonstrations_are_the_tokens_drawn() -> None:
    reward = by_text({"a": 1.0, "abc": 2.0, "dd": 4.0, "e": -1.0})
    drawn = one_rollout(["a", "abc", "dd", "e"], 2, reward)
    shown = chosen_demonstrations(drawn.rollouts, [1, 2])
    assert shown.tokens.ids.tolist() == [[1, 2, 1, 2, 3, 0], [3, 4, 4, 0, 0, 0]]
    assert shown.tokens.response_mask.sum(-1).tolist() == [4, 3] and shown.weights.tolist() == [1.0, 1.0]


def test_an_answer_that_was_cut_has_its_own_score_if_that_is_asked_for() -> None:
    reward = by_text({"a": 1.0, "b": 5.0, "c": None, "d": 2.0})
    cut = [True, False, False, True]
    assert one_rollout(["a", "b", "c", "d"], 2, reward, cut).selection.rows == [1, 0]
    drawn = one_rollout(["a", "b", "c", "d"], 2, reward, cut, unfinished_score=0.0)
    assert drawn.selection.rows == [0, 1] and drawn.selection.missed == {"unscored": 1}
    assert list(drawn.scored.rewards) == [1.0, 5.0, None, 2.0], "what is told stays the reward"


def learner_on(model: Any, objective: Any, *, lr: float, micro_batch_rows: int = 64) -> Learner:
    optimizer = make_optimizer(model.trainable_parameters(), lr=lr, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    return Learner(model, FreshObjective(objective), optimizer, schedule, micro_batch_rows)


@pytest.mark.parametrize("loss", ["dpo", "aot", "wpo", "dpo+0.5*aot"])
def test_figures_and_gradient_do_not_depend_on_micro_batches(loss: str) -> None:
    texts = ["a", "abc", "dd", "e", "bb", "c"]
    worth: dict[str, float | None] = {text: float(len(text)) for text in texts}
    batches = fresh_batches(
        iter([PROMPTS]),
        stages_for(lambda step: samples_of(texts, 2), by_text(worth)),
        best_and_worst,
        chosen_pairs,
        group_size=2,
    )
    batch, found = next(batches), {}
    for rows in (64, 4, 2):
        model = Bigram(1)
        figures = learner_on(model, PreferenceObjective(combine(ALL_LOSSES, loss)), lr=0.0, micro_batch_rows=rows).step(
            batch
        )
        assert model.logits.grad is not None
        found[rows] = (figures, model.logits.grad.clone())
    for rows in (4, 2):
        assert found[rows][0] == pytest.approx(found[64][0], rel=1e-5, abs=1e-6)
        assert torch.allclose(found[rows][1], found[64][1], atol=1e-6)
    figures = found[64][0]
    assert figures["reward"] == pytest.approx(10 / 6) and figures["kept"] == pytest.approx(1)
    assert figures["length"] == pytest.approx(16 / 6) and figures["unfinished"] == 0
    assert figures["entropy"] == pytest.approx(0.5)


def test_figures_are_about_everything_drawn() -> None:
    """The mean reward counts ties and leaves out answers without a score; KL counts them all."""
    reward = by_text({"a": 1.0, "abc": 2.0, "dd": 4.0, "e": 4.0, "bb": None, "c": 6.0})
    stages = stages_for(lambda step: samples_of(["a", "abc", "dd", "e", "bb", "c"], 2), reward)
    batch = next(fresh_batches(iter([PROMPTS]), stages, best_and_worst, chosen_pairs, group_size=2))
    assert batch.size == 1 and len(batch.tokens) == 2
    figures = {name: mean.item() for name, mean in batch.figures.items()}
    assert figures["reward"] == pytest.approx(17 / 5) and figures["kept"] == pytest.approx(1 / 3)
    tokens = samples_of(["a", "abc", "dd", "e", "bb", "c"], 2).tokens
    expected = (-0.5 * tokens.response_mask.sum() - Bigram(7).logprobs(tokens).sum()) / 6
    assert figures["kl"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_judge_makes_pairs_and_no_reward() -> None:
    judged = JudgedReward(RuleJudge("rule:length", RuleReward("length", lambda prompt, answer: len(answer.text))))
    stages = stages_for(lambda step: samples_of(["a", "abc", "dd", "ee", "bb", "c"], 2), judged)
    batch = next(fresh_batches(iter([PROMPTS]), stages, best_and_worst, chosen_pairs, group_size=2))
    assert batch.tokens.response_mask.sum(-1).tolist() == [4, 2, 3, 2]
    assert "reward" not in batch.figures and batch.figures["kept"].item() == pytest.approx(2 / 3)


def test_rollouts_without_a_preference_are_passed_over_and_counted() -> None:
    rounds = [["a", "a"], ["a", "abc"], ["dd", "dd"], ["e", "a"]]
    worth: dict[str, float | None] = {"a": 1.0, "abc": 2.0, "dd": 4.0, "e": None}
    told: list[Drawn] = []

    def batches(count: int) -> list[Any]:
        stages = stages_for(lambda step: samples_of(rounds[step], 2), by_text(worth))
        asked = iter([PROMPTS[:1]] * count)
        return list(fresh_batches(asked, stages, best_and_worst, chosen_pairs, group_size=2, watch=told.append))

    assert [batch.size for batch in batches(4)] == [1]
    assert [dict(drawn.selection.missed) for drawn in told] == [{"tied": 1}, {}, {"tied": 1}, {"unscored": 1}]
    assert [drawn.number for drawn in told] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="worth left nothing to learn from in any rollout: of all prompts, 1 tied"):
        batches(1)


# ---- On a policy


def live_stages(policy: Policy, reward: Any, watch: Callable[[], None] = lambda: None, tokens: int = 6) -> Stages:
    reference = policy.reference()

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        watch()
        return sample(policy, prompts, n, max_new_tokens=tokens, seed=step)

    return Stages(
        draw=draw,
        greedy=lambda prompts: sample(policy, prompts, max_new_tokens=tokens, temperature=0.0),
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        max_rows=4,
    )


BYTES = RuleReward("bytes", lambda prompt, answer: float(sum(answer.ids)))


def test_every_draw_sees_the_policy_as_the_last_step_left_it(tmp_path: Path) -> None:
    """In the loop of every run, the k-th draw comes after k steps, no earlier and no later."""
    policy = tiny_policy(0)
    learner = learner_on(policy, PreferenceObjective(combine(ALL_LOSSES, "dpo")), lr=1e-2)
    versions: list[tuple[int, float]] = []

    def weights() -> float:
        return sum(weight.double().sum().item() for weight in policy.trainable_parameters())

    stages = live_stages(policy, BYTES, lambda: versions.append((learner.schedule.last_epoch, weights())))
    batches = fresh_batches(itertools.repeat(PROMPTS), stages, best_and_worst, chosen_pairs, group_size=2)
    Run.create(tmp_path / "run", config={}, seed=0).train(learner, batches, steps=4)
    assert [steps for steps, _ in versions] == [0, 1, 2, 3]
    assert len({total for _, total in versions}) == 4, "every draw had other weights"


@pytest.mark.parametrize("loss", ["dpo", "aot", "robust"])
def test_the_first_loss_is_ln_2(loss: str) -> None:
    policy = tiny_policy(0)
    learner = learner_on(policy, PreferenceObjective(combine(ALL_LOSSES, loss)), lr=0.0)
    batches = fresh_batches(iter([PROMPTS]), live_stages(policy, BYTES), best_and_worst, chosen_pairs, group_size=2)
    figures = learner.step(next(batches))
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["margin"] == pytest.approx(0, abs=1e-5) and figures["kl"] == pytest.approx(0, abs=1e-4)
    assert figures["chosen_logprob"] < 0


def test_training_sees_the_ids_drawn_and_not_the_text_again() -> None:
    """A random byte model writes bytes that are no text, so that tokenizing its texts gives other ids."""
    policy, told = tiny_policy(0), []
    stages = live_stages(policy, BYTES, tokens=12)
    batches = fresh_batches(iter([PROMPTS]), stages, best_and_worst, chosen_pairs, group_size=4, watch=told.append)
    batch, samples = next(batches), told[0].scored.samples
    drawn = [answer.ids for answer in samples.answers]
    again = encode_prompts(policy.tokenizer, [Prompt.from_text(text) for text in samples.texts])
    assert any(list(ids) != encoded for ids, encoded in zip(drawn, again, strict=True)), "texts that do not survive"
    trained = [
        tuple(ids[mask].tolist()) for ids, mask in zip(batch.tokens.ids, batch.tokens.response_mask, strict=True)
    ]
    assert trained == [drawn[row] for row in told[0].selection.rows] and len(trained) == 6
    for pair, (chosen, rejected) in enumerate(zip(trained[::2], trained[1::2], strict=True)):
        group = drawn[4 * pair : 4 * pair + 4]
        assert sum(chosen) == max(map(sum, group)) and sum(rejected) == min(map(sum, group))


def test_raft_is_sft_on_the_best() -> None:
    """The step's loss is the negative log-likelihood per token of the best answers, under the policy as it is."""
    policy, told = tiny_policy(0), []
    batches = fresh_batches(
        iter([PROMPTS]), live_stages(policy, BYTES), best, chosen_demonstrations, group_size=4, watch=told.append
    )
    figures = learner_on(policy, DemonstrationObjective(), lr=0.0).step(next(batches))
    samples, rows = told[0].scored.samples, list(told[0].selection.rows)
    assert [row // 4 for row in rows] == [0, 1, 2]
    expected = -samples.logprobs[rows].sum() / samples.tokens.response_mask[rows].sum()
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-4)
