"""The loss of language modelling."""

import torch

from trimtab.losses.language import negative_log_likelihood


def test_minus_the_log_probability_inside_the_mask_and_zero_outside():
    logprobs = torch.tensor([[-9.0, -0.5, -2.0], [-9.0, -1.5, -7.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    expected = torch.tensor([[0.0, 0.5, 2.0], [0.0, 1.5, 0.0]])
    assert torch.equal(negative_log_likelihood(logprobs, mask), expected)


def test_infinities_outside_the_mask_reach_neither_value_nor_gradient():
    logprobs = torch.tensor([[-torch.inf, -0.5, torch.nan]], requires_grad=True)
    losses = negative_log_likelihood(logprobs, torch.tensor([[False, True, False]]))
    losses.sum().backward()
    assert losses.tolist() == [[0.0, 0.5, 0.0]]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -1.0, 0.0]]
