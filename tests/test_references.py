"""References on the tiny model: stored and live agree, DPO starts at ln 2, and a moving reference moves."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimtab.batches import Referenced
from trimtab.builtin import tiny_policy
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES, PREFERENCE_LOSSES
from trimtab.losses.reward import REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.models import Policy, load_policy, load_scalar
from trimtab.objectives import DemonstrationObjective, FeedbackObjective, PreferenceObjective, RewardObjective
from trimtab.recipes import training
from trimtab.recipes.dpo import Dpo
from trimtab.recipes.options import DataOptions, ModelOptions, RunOptions
from trimtab.records import Demonstration, Feedback, Preference, Prompt
from trimtab.references import LiveReference, NoReference, blend, moving, scoring_batches, store
from trimtab.tokens import demonstration_batch, encode, encode_feedback, feedback_batch, pair_batch

PROMPTS = [Prompt.from_user(f"Question {i}{'?' * i}") for i in range(4)]
PAIRS = [Preference(prompt, f"yes {i}" * (i + 1), "no") for i, prompt in enumerate(PROMPTS)]
DPO = PreferenceObjective(combine(ALL_LOSSES, "dpo"))


@pytest.fixture
def policy() -> Policy:
    return load_policy("tiny", dtype="float32", device="cpu")


def pairs_of(policy: Policy) -> tuple[list[Any], Any]:
    items, _ = encode(policy.tokenizer, PAIRS, max_length=400)
    return items, pair_batch(items, policy.pad_id)


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_stored_and_live_references_agree(policy: Policy, max_rows: int) -> None:
    items, batch = pairs_of(policy)
    stored = store(policy.reference(), items, pad_id=policy.pad_id, max_rows=max_rows).attach(batch, range(4))
    live = LiveReference(policy.reference(), max_rows).attach(batch, range(4))
    assert (stored.logprobs - live.logprobs).abs().max() < 1e-5
    assert torch.equal(stored.logprobs != 0, batch.tokens.response_mask)


def test_a_stored_reference_follows_the_items_of_the_batch(policy: Policy) -> None:
    items, _ = pairs_of(policy)
    stored = store(policy.reference(), items, pad_id=policy.pad_id, max_rows=8)
    batch = pair_batch([items[2], items[0]], policy.pad_id)
    expected = LiveReference(policy.reference(), 8).attach(batch, [2, 0])
    assert torch.allclose(stored.attach(batch, [2, 0]).logprobs, expected.logprobs, atol=1e-5)


def test_only_the_items_that_a_run_draws_are_stored(policy: Policy) -> None:
    items, _ = pairs_of(policy)
    everything = store(policy.reference(), items, pad_id=policy.pad_id, max_rows=8)
    some = store(policy.reference(), items, pad_id=policy.pad_id, max_rows=8, wanted=[3, 1])
    assert sorted(some.logprobs) == [1, 3]
    assert torch.allclose(some.logprobs[3][0], everything.logprobs[3][0], atol=1e-5)


def test_the_order_of_items_with_one_prompt_length_is_that_of_the_window(policy: Policy) -> None:
    """So that a window's values do not depend on where its items stand in the data."""
    items, _ = pairs_of(policy)
    equal = [items[0], items[0], items[0]]
    assert list(scoring_batches(equal, [2, 0, 1], 4)) == [[2, 0], [1]]
    assert list(scoring_batches(items, [3, 1, 2], 100)) == [[1, 2, 3]]


def test_a_stored_reference_needs_no_copy_of_the_policy() -> None:
    model, run = ModelOptions("tiny", "float32", "cpu"), RunOptions("out")
    config = Dpo(model=model, data=DataOptions("pairs"), run=run)
    for rank in (0, 2):
        policy = tiny_policy(lora_rank=rank)
        scorer = training.reference_of(policy, config, needed=True)
        assert scorer.policy is policy and not scorer.adapter_is_on
        live = training.reference_of(policy, replace(config, reference="live"), needed=True)
        assert (live.policy is policy) == bool(rank), "a live one must not follow the training"


@pytest.mark.parametrize("reference", ["stored", "live"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_dpo_starts_at_ln_2(reference: str, lora_rank: int) -> None:
    policy = load_policy("tiny", dtype="float32", device="cpu", lora_rank=lora_rank)
    items, batch = pairs_of(policy)
    scorer = policy.reference()
    attach = (
        store(scorer, items, pad_id=policy.pad_id, max_rows=8) if reference == "stored" else LiveReference(scorer, 8)
    )
    attached = attach.attach(batch, range(4))
    loss, metrics = DPO.loss(DPO.outputs(policy, attached), attached)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-5)
    assert policy.kl(batch.tokens, scorer).abs().max() < 1e-6


def test_no_reference_is_zero(policy: Policy) -> None:
    items, batch = pairs_of(policy)
    assert not NoReference().attach(batch, range(len(items))).logprobs.any()


def test_blend_is_the_weighted_mean_of_weights(policy: Policy) -> None:
    reference = policy.frozen()
    start = [parameter.clone() for parameter in reference.model.parameters()]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1)
    blend(reference.model, policy.model, 0.25)
    for before, after in zip(start, reference.model.parameters(), strict=True):
        assert torch.allclose(after, before + 0.25, atol=1e-6)


def test_a_moving_reference_is_updated_before_every_nth_batch_is_drawn() -> None:
    events: list[str] = []

    def draw() -> Any:
        for i in range(5):
            events.append(f"draw {i}")
            yield i

    for step in moving(draw(), lambda alpha: events.append(f"update {alpha}"), alpha=0.5, every=2):
        events.append(f"step {step}")
    drawn = [f"{kind} {i}" for i in range(5) for kind in ("draw", "step")]
    assert events[: 2 * 2] == drawn[:4]
    assert [event for event in events if event.startswith("update")] == ["update 0.5", "update 0.5"]
    assert events.index("update 0.5") < events.index("draw 2") < events.index("step 2")


def learner_of(model: Any, objective: Any, rows: int) -> Learner:
    optimizer = make_optimizer(model.trainable_parameters(), lr=0.0, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    return Learner(model, objective, optimizer, schedule, micro_batch_rows=rows, max_grad_norm=0)


def case(name: str) -> tuple[Any, Any, Any]:
    """A model, an objective and a batch of each command."""
    if name == "reward":
        model = load_scalar("tiny", new_head=True, dtype="float32", device="cpu")
        return model, RewardObjective(combine(REWARD_LOSSES, "bradley_terry")), pairs_of(model)[1]
    policy = load_policy("tiny", dtype="float32", device="cpu", lora_rank=4 if name == "lora" else 0)
    if name == "sft":
        records = [Demonstration(pair.prompt, pair.chosen) for pair in PAIRS]
        items, _ = encode(policy.tokenizer, records, max_length=400)
        return policy, DemonstrationObjective(), demonstration_batch(items, policy.pad_id)
    if name == "kto":
        records = [Feedback(pair.prompt, pair.chosen, i % 2 == 0) for i, pair in enumerate(PAIRS)]
        items, _ = encode_feedback(policy.tokenizer, records, seed=0, max_length=400)
        objective, batch = FeedbackObjective(combine(UNPAIRED_LOSSES, "kto")), feedback_batch(items, policy.pad_id)
    else:
        loss = name if name in PREFERENCE_LOSSES else "dpo"
        objective, batch = PreferenceObjective(combine(ALL_LOSSES, loss)), pairs_of(policy)[1]
    with torch.no_grad():
        logprobs = tiny_policy(seed=1).logprobs(batch.tokens)
    return policy, objective, Referenced(batch, logprobs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "lora", "aot", "ipo", "orpo", "kto"])
def test_a_transformers_gradient_does_not_depend_on_micro_batches_or_layout(name: str, share: bool) -> None:
    gradients = []
    for rows in (8, 4, 2):
        model, objective, batch = case(name)
        model.body.use_layout(share=share and rows != 2)
        learner = learner_of(model, objective, rows)
        learner.step(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-4
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).abs().max() < 1e-6 * max(1, gradients[0].abs().max().item())
