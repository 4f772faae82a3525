"""References on the tiny model: stored and live agree, DPO starts at ln 2, and a moving reference moves."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimtab.builtin import tiny_policy
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES
from trimtab.models import Policy, load_policy
from trimtab.objectives import PreferenceObjective
from trimtab.recipes import training
from trimtab.recipes.dpo import Dpo
from trimtab.recipes.options import DataOptions, ModelOptions, RunOptions
from trimtab.records import Preference, Prompt
from trimtab.references import LiveReference, NoReference, blend, moving, scoring_batches, store
from trimtab.tokens import encode, pair_batch

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
