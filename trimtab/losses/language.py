"""The loss of language modelling."""

from __future__ import annotations

import torch

from trimtab.batches import Mask, PerToken


def negative_log_likelihood(logprobs: PerToken, mask: Mask) -> PerToken:
    """Minus the log-probability of every token of the mask, zero elsewhere; nats per token.

    What stands outside the mask may be anything, infinities included: it reaches neither the value nor the gradient.
    """
    return -torch.where(mask, logprobs, 0)
