"""Choosing a token: from logits to one token a row, by inverse CDF and a counter-based number.

A draw is a function of (seed, step, prompt, answer, position) and of that row's logits; the rows beside it do not
matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

CDF_BLOCK = 256
"""Tokens whose probabilities are summed first, so that a draw looks at V / 256 sums and then at 256 probabilities."""

NUCLEUS_TOKENS = 1024
"""Tokens among which top-p looks first; sorting a vocabulary of 49,152 takes eight times as long."""


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: repetition penalty first, then temperature, top-k, top-p and min-p.

    Temperature 0 is the most probable token. 0 for `top_k` and `min_p`, 1 for the others, change nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """ValueError for the first setting that means nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: give 0 (most probable token) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give the number of tokens to keep, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a share above 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: give a share from 0 (keeps all tokens) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: give a positive number, 1 for none")
        if self.temperature == 0 and self.rules_out:
            raise ValueError(
                "temperature 0 takes the most probable token, so top_k, top_p and min_p have no effect: leave them out"
            )

    @property
    def rules_out(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the policy's own distribution."""
        return self.temperature == 1 and not self.rules_out and not self.looks_back

    @property
    def looks_back(self) -> bool:
        """Whether a token's chance depends on whether it stands in the prompt or the answer already."""
        return self.repetition_penalty != 1

    def shape(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"] | None = None) -> Float[Tensor, "B V"]:
        """The logits of the distribution to draw from; -inf where a token is ruled out.

        `seen` marks the tokens of the prompt and of the answer so far; only a repetition penalty asks for it.
        """
        if self.looks_back:
            assert seen is not None, "a repetition penalty needs to know the tokens before"
            logits = penalize(logits, seen, self.repetition_penalty)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return keep_min_p(logits, self.min_p) if self.min_p else logits


@dataclass(frozen=True)
class Drawn:
    """One drawn token a row, `[B]` each: its id and its log-probability before and after shaping, in nats."""

    ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    sampled_logprobs: Float[Tensor, " B"]

    def select(self, rows: Int[Tensor, " R"]) -> Drawn:
        """Some of the rows."""
        return Drawn(self.ids[rows], self.logprobs[rows], self.sampled_logprobs[rows])


def draw(
    logits: Float[Tensor, "B V"],
    choice: Choice,
    uniform: Float[Tensor, " B"],
    seen: Bool[Tensor, "B V"] | None = None,
) -> Drawn:
    """One token a row: the most probable one at temperature 0, else the one at `uniform` of the CDF."""
    shaped = choice.shape(logits, seen)
    if choice.temperature == 0:
        ids = shaped.argmax(-1)
        return Drawn(ids, logprobs_of(logits, logits.softmax(-1), ids), torch.zeros_like(logits[:, 0]))
    probability = shaped.softmax(-1)
    ids = inverse_cdf(probability, uniform.to(logits.device))
    sampled = logprobs_of(shaped, probability, ids)
    return Drawn(ids, sampled if choice.is_plain else logprobs_of(logits, logits.softmax(-1), ids), sampled)


def logprobs_of(
    logits: Float[Tensor, "B V"], probability: Float[Tensor, "B V"], ids: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The log-probability of one token a row, in nats, where `probability` is the logits' softmax.

    The most probable token gives the normalizer: its probability is at least 1 / V, so its logarithm is exact, and a
    token whose probability rounds to zero still has a log-probability.
    """
    return picked(logits, ids) - logits.amax(-1) + probability.amax(-1).log()


def picked(values: Float[Tensor, "B V"], ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The value of one token a row."""
    return values.gather(-1, ids[:, None])[:, 0]


def inverse_cdf(weights: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first token whose cumulative weight exceeds `uniform` times the total; never one of weight 0.

    In two steps, over sums of blocks and then inside one block, with the sums over blocks in float64: much less work
    than a cumulative sum over the vocabulary, and far more exact than one in float32.
    """
    rows, vocabulary = weights.shape
    missing = -vocabulary % CDF_BLOCK
    filled = (torch.nn.functional.pad(weights, (0, missing)) if missing else weights).view(rows, -1, CDF_BLOCK)
    blocks = filled.sum(-1).double().cumsum(-1)
    target = uniform.double() * blocks[:, -1]
    block = first_above(blocks, target)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = filled[torch.arange(rows, device=weights.device), block].double().cumsum(-1)
    return block * CDF_BLOCK + first_above(inside, target - before)


def first_above(cumulative: Float[Tensor, "B K"], target: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first index whose cumulative value exceeds the target, at most the last one at which the value rises.

    Rounding may leave a target at the very end of the range; the bound keeps it from landing behind all weight.
    """
    last_rise = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum((cumulative <= target[:, None]).sum(-1), last_rise)


# ---- Shaping a distribution


def penalize(logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float) -> Float[Tensor, "B V"]:
    """Repetition penalty (Keskar et al. 2019, section 4.1): seen tokens' logits divided by it.

    Negative logits are multiplied instead, as everywhere in practice: dividing them would make the token more probable.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Rules out every token less probable than the k-th; tokens as probable as the k-th all stay."""
    kth = logits.topk(min(k, logits.shape[-1]), -1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_min_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Min-p (Nguyen et al. 2024, section 3): rules out tokens less probable than `p` times the most probable one."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def keep_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Nucleus sampling (Holtzman et al. 2020, section 3.1): the fewest most probable tokens that reach probability p.

    Tokens as probable as the last of them all stay.
    """
    normalizer = logits.double().logsumexp(-1, keepdim=True)
    lowest, enough = lowest_in_nucleus(logits.topk(min(NUCLEUS_TOKENS, logits.shape[-1]), -1).values, normalizer, p)
    if not enough.all():
        rest = ~enough
        ranked = logits[rest].sort(-1, descending=True).values
        lowest[rest] = lowest_in_nucleus(ranked, normalizer[rest], p)[0]
    return logits.masked_fill(logits < lowest[:, None], float("-inf"))


def lowest_in_nucleus(
    ranked: Float[Tensor, "B K"], normalizer: Float[Tensor, "B 1"], p: float
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """The logit of the first of the ranked tokens at which their probability reaches `p`, and whether it does."""
    probability = (ranked.double() - normalizer).exp()
    needed = (probability.cumsum(-1) - probability < p).sum(-1)
    return picked(ranked, needed - 1), probability.sum(-1) >= p


# ---- Uniform numbers


def row_key(seed: int, prompt: Sequence[int], sample_index: int, step: int = 0) -> int:
    """The 64-bit key of one answer's uniform numbers: a hash of seed, step, prompt and the answer's number."""
    words = np.array([seed & (2**64 - 1), sample_index, *prompt], dtype=np.uint64)
    salt = step.to_bytes(16, "little")
    return int.from_bytes(hashlib.blake2b(words.astype("<u8").tobytes(), digest_size=8, salt=salt).digest(), "little")


def uniforms(keys: NDArray[np.uint64], position: int) -> Float[Tensor, " B"]:
    """One number in [0, 1) a key: the `position`-th of SplitMix64 (Steele, Lea, Flood 2014) started at that key."""
    state = keys + np.uint64((position + 1) * 0x9E3779B97F4A7C15 % 2**64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    # The upper 53 bits fill a float64's mantissa, so 1 itself is never reached.
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
