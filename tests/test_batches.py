"""Batches as containers: items, rows, micro-batches and the order of an epoch."""

import pytest
import torch

from tests import bigram
from trimtab.batches import Mean, batch_indices, batch_starts, epoch_order, move, rows_of, split


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_an_epoch_holds_every_item_once_and_no_single_leftover(size: int, batch_size: int) -> None:
    steps = len(batch_starts(size, batch_size))
    first = list(batch_indices(size, batch_size, seed=0, steps=steps))
    assert sorted(i for batch in first for i in batch) == list(range(size))
    assert all(len(batch) > 1 for batch in first) or batch_size == 1 or size == 1
    both = list(batch_indices(size, batch_size, seed=0, steps=2 * steps))
    assert both[:steps] == first
    assert sorted(i for batch in both[steps:] for i in batch) == list(range(size))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(epoch_order(30, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == tuple(epoch_order(30, seed=1, epoch=1))


def test_rows_of_items_with_different_counts() -> None:
    assert rows_of(torch.tensor([2, 0]), torch.tensor([2, 1, 3])).tolist() == [3, 4, 5, 0, 1]


@pytest.mark.parametrize("max_rows", [1, 2, 5, 6, 100])
def test_micro_batches_keep_items_whole_and_in_order(max_rows: int) -> None:
    batch = bigram.rankings()
    parts = list(split(batch, max_rows))
    assert torch.cat([part.sizes for part in parts]).tolist() == batch.sizes.tolist()
    assert all(len(part.tokens) <= max_rows or part.size == 1 for part in parts)
    assert sum(int(part.tokens.response_mask.sum()) for part in parts) == int(batch.tokens.response_mask.sum())


def test_selected_references_stay_with_their_tokens() -> None:
    batch = bigram.pairs()
    some = batch.select(torch.tensor([3, 1]))
    rows = [6, 7, 2, 3]
    assert torch.equal(some.logprobs.sum(-1), batch.logprobs[rows].sum(-1))
    assert torch.equal(some.logprobs != 0, some.tokens.response_mask)
    assert torch.equal(some.batch.margin, batch.batch.margin[[3, 1]])


def test_means_add_and_divide_once() -> None:
    values = torch.arange(7.0)
    parts = Mean.of(values[:2]) + Mean.of(values[2:])
    assert parts.item() == Mean.of(values).item() == 3.0
    assert (Mean.of(values) * 2.0).item() == 6.0
    assert torch.isnan(torch.tensor(Mean.of(values, torch.zeros(7)).item()))


def test_moving_keeps_everything() -> None:
    batch = bigram.pairs()
    moved = move(batch, "cpu")
    assert torch.equal(moved.logprobs, batch.logprobs) and torch.equal(moved.batch.weights, batch.batch.weights)
