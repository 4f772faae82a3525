"""Keys and values: attention to shared prompts and own tokens is attention to the whole row."""

from __future__ import annotations

import pytest
import torch

from trimtab.sampling.key_values import CACHE_BLOCK, KeyValues, blocked, causal, with_room

HEADS, GROUP, WIDTH, SCALE = 2, 3, 4, 0.7
GENERATOR = torch.Generator().manual_seed(0)


def parts(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values of some rows."""
    sizes = (HEADS * GROUP, HEADS, HEADS)
    queries, keys, values = (torch.randn(rows, columns, size, WIDTH, generator=GENERATOR) for size in sizes)
    return queries, keys, values


def literal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one token's heads `[H, W]` to `[T, K, W]`, head by head, in float64."""
    found = []
    for head in range(HEADS * GROUP):
        shares = (keys[:, head // GROUP].double() @ query[head].double() * SCALE).softmax(0)
        found.append(shares @ values[:, head // GROUP].double())
    return torch.cat(found)


@pytest.mark.parametrize("prompt_of", [[0, 0, 1, 2], [2, 0, 2, 2, 1], [1], [0, 1, 2, 0, 1, 2]])
def test_shared_attention_is_that_of_each_row_alone(prompt_of: list[int]) -> None:
    attended = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    key_values = KeyValues(attended)
    prompts = [parts(3, 5) for _ in range(2)]
    for layer, (queries, keys, values) in enumerate(prompts):
        found = key_values.read_prompts(layer, queries, keys, values, SCALE)
        for row, column in attended.nonzero().tolist():
            seen = attended[row] & (torch.arange(5) <= column)
            expected = literal(queries[row, column], keys[row, seen], values[row, seen])
            torch.testing.assert_close(found[row, column].double(), expected, atol=1e-6, rtol=1e-6)
    key_values.continue_from(torch.tensor(prompt_of))
    histories = [[(keys[p, attended[p]], values[p, attended[p]]) for p in prompt_of] for _, keys, values in prompts]
    for step in range(CACHE_BLOCK + 3):
        if step in (2, CACHE_BLOCK) and len(histories[0]) > 1:
            # The first row leaves, and the others change places.
            rows = torch.arange(len(histories[0]) - 1, 0, -1)
            key_values.keep(rows)
            histories = [[history[row] for row in rows.tolist()] for history in histories]
        key_values.next_column()
        for layer, history in enumerate(histories):
            queries, keys, values = parts(len(history), 1)
            found = key_values.read_token(layer, queries, keys, values, SCALE)
            for row, (before_keys, before_values) in enumerate(history):
                history[row] = torch.cat([before_keys, keys[row]]), torch.cat([before_values, values[row]])
                expected = literal(queries[row, 0], *history[row])
                torch.testing.assert_close(found[row, 0].double(), expected, atol=1e-5, rtol=1e-5)


def test_prompts_that_nobody_continues_are_forgotten() -> None:
    key_values = KeyValues(torch.ones(3, 5, dtype=torch.bool))
    key_values.read_prompts(0, *parts(3, 5), SCALE)
    key_values.continue_from(torch.tensor([0, 1, 1, 2]))
    key_values.keep(torch.tensor([1, 3]))
    assert key_values.prompts[0][0].shape == (2 * HEADS, 5, WIDTH) and key_values.prompt_of.tolist() == [0, 1]
    key_values.keep(torch.tensor([1]))
    assert key_values.prompts[0][0].shape == (HEADS, 5, WIDTH) and key_values.own[0][0].shape[0] == HEADS


def test_siblings_share_a_product() -> None:
    key_values = KeyValues(torch.ones(2, 5, dtype=torch.bool))
    key_values.read_prompts(0, *parts(2, 5), SCALE)
    key_values.continue_from(torch.tensor([0, 0, 0, 1]))
    # Three seats at each of two prompts and two heads; two of the second prompt's are empty.
    assert len(key_values.seats) == 2 * HEADS * 3 and len(key_values.seat_of.unique()) == 4 * HEADS


def test_room_grows_by_blocks_and_keeps_what_it_holds() -> None:
    states = torch.randn(3, 5, 2)
    room = with_room(states, CACHE_BLOCK + 1)
    assert room.shape == (3, 2 * CACHE_BLOCK, 2)
    assert torch.equal(room[:, :5], states) and not room[:, 5:].any()


def test_masks_by_hand() -> None:
    assert blocked(torch.tensor([True, False]), torch.float32).tolist() == [float("-inf"), 0.0]
    seen = causal(torch.tensor([[False, True, True]]))[0, 0]
    assert seen.tolist() == [[True, False, False], [False, True, False], [False, True, True]]
