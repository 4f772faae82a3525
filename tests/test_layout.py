"""The layout without a model: what each token sees must not depend on how rows were laid out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from trimtab.batches import Tokens
from trimtab.layout import Arrangement, Layout, arrange, cost, even_bins, fill_bins, find_groups, lay_out, pair_price


def make_tokens(rows: list[tuple[list[int], list[int]]], *, left: bool = False) -> Tokens:
    """Rows of (prompt ids, answer ids), padded on one side."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, real, answered = [], [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        parts = [(prompt + answer, 1), ([0] * padding, 0)]
        ordered = parts[::-1] if left else parts
        ids.append([i for values, _ in ordered for i in values])
        real.append([bool(mark) for values, mark in ordered for _ in values])
        marks = [False] * len(prompt) + [True] * len(answer)
        answered.append([False] * padding + marks if left else marks + [False] * padding)
    return Tokens(torch.tensor(ids), torch.tensor(real), torch.tensor(answered))


def seen(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A fingerprint of the (id, position) pairs that each place sees: a sum of pseudo-random numbers of them."""
    marks = torch.sin(ids.double() * 12.9898 + positions.double() * 78.233) * 43758.5453
    marks = marks - marks.floor()
    return (mask[:, 0].double() @ marks[..., None])[..., 0]


def by_rows(tokens: Tokens) -> torch.Tensor:
    """The same fingerprint, each row alone."""
    causal = torch.ones(tokens.ids.shape[1], tokens.ids.shape[1], dtype=torch.bool).tril()
    mask = tokens.attention_mask[:, None, None, :] & causal
    positions = (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return seen(tokens.ids, positions, mask)


def through(tokens: Tokens, layout: Layout) -> torch.Tensor:
    """The fingerprint in the sequences, brought back to rows."""
    return seen(layout.ids, layout.positions, layout.mask()).flatten()[layout.place]


PAIR = [([5, 6, 7], [1, 2]), ([5, 6, 7], [3]), ([8], [1, 2, 3]), ([8], [4])]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("capacity", [0, 100])
def test_every_token_sees_its_own_row_only(left: bool, share: bool, capacity: int) -> None:
    tokens = make_tokens(PAIR, left=left)
    layout = lay_out(tokens, share=share, capacity=capacity)
    real = tokens.attention_mask
    assert torch.allclose(through(tokens, layout)[real], by_rows(tokens)[real])
    assert torch.equal(layout.ids.flatten()[layout.place][real], tokens.ids[real])


def test_sharing_runs_the_prompt_once() -> None:
    tokens = make_tokens(PAIR)
    shared = lay_out(tokens, share=True, capacity=100)
    # 3 + 2 + 1 tokens for the first pair and 1 + 3 + 1 for the second.
    assert shared.ids.shape == (1, 11)
    assert (lay_out(tokens, share=False).ids != 0).sum() == 15


def test_hand_layout_of_a_pair() -> None:
    layout = lay_out(make_tokens(PAIR[:2]), share=True)
    assert layout.ids.tolist() == [[5, 6, 7, 1, 2, 3]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert layout.until.tolist() == [[5, 5, 5, 4, 4, 5]]
    assert layout.mask()[0, 0, 5].tolist() == [True, True, True, False, False, True]
    assert layout.mask(window=2)[0, 0, 5].tolist() == [False, False, True, False, False, True]


def test_prompts_that_differ_are_not_shared() -> None:
    tokens = make_tokens([([5, 6], [1]), ([5, 7], [1]), ([5], [6, 1])])
    assert find_groups(tokens, share=True).shared.tolist() == [0, 0, 0]


def test_rows_that_are_not_neighbours_are_not_shared() -> None:
    tokens = make_tokens([([5], [1]), ([6], [1]), ([5], [2])])
    assert find_groups(tokens, share=True).number.tolist() == [0, 1, 2]


@pytest.mark.parametrize("price", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("capacity", [0, 3, 10])
def test_bins_hold_everything_once_within_capacity(price: float, capacity: int) -> None:
    lengths = [5, 9, 3, 4, 2]
    bins = fill_bins(lengths, capacity, price)
    assert sorted(item for members in bins for item in members) == [0, 1, 2, 3, 4]
    if capacity:
        assert all(sum(lengths[item] for item in members) <= max(capacity, 9) for members in bins)


def test_bins_worked_by_hand() -> None:
    """Of 5, 9, 3, 4, 2: one bin holds 23, two 11 and 12, three 9, 7 and 7."""
    lengths = [5, 9, 3, 4, 2]
    assert even_bins(lengths, 2) == [[1, 2], [0, 3, 4]]
    assert even_bins(lengths, 3) == [[1], [0, 4], [3, 2]]
    assert [len(fill_bins(lengths, 0, price)) for price in (0.0, 0.02, 0.1)] == [1, 2, 3]
    # 23 (1 + 0.02 * 23) = 33.6; 24 (1 + 0.02 * 12) = 29.8; 27 (1 + 0.02 * 9) = 31.9
    assert cost((1, 23), 0.02) == pytest.approx(33.58)
    assert len(fill_bins(lengths, 11, 0.0)) == 3, "12 do not fit"


def test_rows_without_an_answer_are_not_shared() -> None:
    tokens = make_tokens([([5, 6], []), ([5, 6], []), ([5, 6], [1])])
    assert find_groups(tokens, share=True).shared.tolist() == [0, 0, 0]


def test_padding_sees_itself_only() -> None:
    layout = lay_out(make_tokens([([5, 6], [1, 2]), ([7], [1])]), share=True, capacity=4)
    assert layout.ids.tolist() == [[5, 6, 1, 2], [7, 1, 0, 0]]
    assert layout.mask()[1, 0, 2:].tolist() == [[False, False, True, False], [False, False, False, True]]


# ---- What a layout costs


def test_costs_worked_by_hand() -> None:
    """Width 64: a pair costs 4 / (6 * 64) = 1/96 token. Two rows of 48 tokens: 96 tokens and 2 * 48^2 / 96 = 48."""
    assert pair_price(64) == pytest.approx(1 / 96)
    assert cost((2, 48), 1 / 96) == pytest.approx(96 + 48)
    assert cost((1, 64), 0.0) == 64


@pytest.mark.parametrize(
    ("prompt", "answer", "answers", "width", "shares"),
    [
        (40, 10, 2, 576, True),  # 60 tokens for 100
        (4, 40, 2, 576, False),  # 84 tokens for 88: too few saved
        (40, 40, 8, 100_000, True),  # 360 tokens for 640, and attention costs next to nothing
        (40, 40, 8, 32, False),  # the same: 360 pairs a token cost 7.5, 80 in rows 1.7
    ],
)
def test_prompts_are_shared_where_that_is_cheaper(
    prompt: int, answer: int, answers: int, width: int, shares: bool
) -> None:
    tokens = make_tokens([([5] * prompt, [1 + i] * answer) for i in range(answers)])
    layout = arrange(tokens, Arrangement(), pair_price(width))
    assert (layout is not None) == shares
    explicit = arrange(tokens, Arrangement(capacity=1), pair_price(width))
    assert explicit is not None, "packing that is asked for is done"


# ---- Any rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=4),
            st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_any_rows_any_layout(
    items: list[tuple[list[int], list[list[int]]]], share: bool, capacity: int, price: float
) -> None:
    tokens = make_tokens([(prompt, answer) for prompt, answers in items for answer in answers])
    layout = lay_out(tokens, share=share, capacity=capacity, pair_price=price)
    real = tokens.attention_mask
    assert torch.allclose(through(tokens, layout)[real], by_rows(tokens)[real])
    assert one_definition(layout, window=None)
    assert one_definition(layout, window=2)


def one_definition(layout: Layout, window: int | None) -> bool:
    """Whether the mask that FlexAttention evaluates is the dense one."""
    sequences, length = layout.ids.shape
    return torch.equal(create_mask(layout.mask_mod(window), sequences, 1, length, length, "cpu"), layout.mask(window))
