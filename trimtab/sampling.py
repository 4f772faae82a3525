"""Sampling: prompts -> answers with their log-probabilities, by an own decode loop on the live model.

- Each prompt of a batch is read once; its answers continue from copies of its key-value cache. Rows that have ended
  leave the batch.
- A token is drawn by inverse CDF from one uniform number, which a counter-based generator makes from (seed, prompt,
  answer, position). So an answer does not depend on the batch it was drawn in, nor on the order of the prompts, and
  the first 4 of 8 answers are the 4 that `n=4` gives. Exact but for rounding: other batches give other last
  digits, which moves a draw that falls on the edge between two tokens; rare in float32, frequent in bf16.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from trimtab import records
from trimtab.batches import PerToken, Tokens
from trimtab.progress import progress_bar
from trimtab.projection import log_distributions
from trimtab.records import Prompt
from trimtab.tokens import Row, decode, encode_prompts, pad
from trimtab.tokens import stop_ids as tokenizer_stop_ids

if TYPE_CHECKING:
    from trimtab.models import Policy

CDF_BLOCK = 256
"""Tokens whose probabilities are summed first, so that a draw looks at V / 256 sums and then at 256 probabilities."""

NUCLEUS_TOKENS = 1024
"""Tokens among which top-p looks first; sorting a vocabulary of 49,152 takes eight times as long."""

CACHE_BLOCK = 64
"""Tokens by which the cache of keys and values grows; appending by concatenation would copy it at every token."""

DROP_SHARE = 1 / 8
"""Share of a batch's rows that must have ended before the rest is copied together."""


@dataclass(frozen=True)
class Samples:
    """Answers to prompts: the `n` answers of a prompt are neighbouring rows, `P * n` rows in all.

    `tokens` are right-padded rows of prompt and answer, the response mask on every token that was drawn, the closing
    one included. `logprobs` are the drawn tokens' log-probabilities under the policy itself, `sampled_logprobs` under
    the distribution they were drawn from (temperature, top-k and top-p applied); nats per token, zero outside the
    answers. `finished` says which answers ended by a stop token rather than at `max_new_tokens`.
    """

    prompts: tuple[Prompt, ...]
    n: int
    tokens: Tokens
    logprobs: PerToken
    sampled_logprobs: PerToken
    texts: list[str]
    finished: Bool[Tensor, " B"]

    @property
    def row_prompts(self) -> list[Prompt]:
        """The prompt of every row, `P * n`."""
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    @property
    def answers(self) -> list[records.Answer]:
        """Every row's answer for a reward: its text, whether it ended, and the ids drawn."""
        rows = zip(self.texts, self.finished.tolist(), self.tokens.ids, self.tokens.response_mask, strict=True)
        return [records.Answer(text, finished, tuple(ids[drawn].tolist())) for text, finished, ids, drawn in rows]


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: temperature first, then top-k, then top-p. Temperature 0 is the most probable token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the policy's own distribution."""
        return self.temperature == 1 and not self.top_k and self.top_p == 1

    def shape(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits of the distribution to draw from; -inf where a token is ruled out."""
        logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        return keep_top_p(logits, self.top_p) if self.top_p < 1 else logits


@dataclass
class Answer:
    """One answer while it is written: its prompt's ids, the key of its uniform numbers, and what was drawn."""

    prompt: list[int]
    key: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int = 1,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int = 32,
    stop_ids: Collection[int] | None = None,
    progress: bool = False,
) -> Samples:
    """Draw `n` answers to every prompt, at most `max_new_tokens` tokens each.

    An answer ends with the first token of `stop_ids` (the tokenizer's and the model's end tokens unless given).
    `top_k=0` and `top_p=1` rule nothing out. ValueError for settings that mean nothing, and for an empty prompt with a
    tokenizer that has no beginning-of-sequence token.
    """
    choice = Choice(temperature, top_k, top_p)
    check(choice, prompts, n=n, max_new_tokens=max_new_tokens, batch_rows=batch_rows)
    answers = blank_answers(policy, prompts, n, seed)
    stop = default_stop_ids(policy) if stop_ids is None else frozenset(stop_ids)
    # Prompts of similar length together: little padding. Answers of one prompt stay neighbours (the sort is stable).
    by_length = sorted(answers, key=lambda answer: len(answer.prompt))
    bar = progress_bar("sample", len(answers)) if progress else nullcontext(lambda count: None)
    with torch.no_grad(), weights_cast_once(policy), bar as advance:
        for start in range(0, len(by_length), batch_rows):
            write(policy, by_length[start : start + batch_rows], choice, max_new_tokens, stop, advance)
    return collect(policy, prompts, n, answers, stop)


def check(choice: Choice, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int, batch_rows: int) -> None:
    """ValueError for the first setting that means nothing."""
    if not prompts:
        raise ValueError("there is nothing to sample from: no prompts were given")
    for name, count in {"n": n, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: at least 1 is needed")
    if not 0 <= choice.temperature < float("inf"):
        raise ValueError(f"temperature is {choice.temperature}: give 0 (most probable token) or a positive number")
    if choice.top_k < 0:
        raise ValueError(f"top_k is {choice.top_k}: give the number of tokens to keep, or 0 to keep all")
    if not 0 < choice.top_p <= 1:
        raise ValueError(f"top_p is {choice.top_p}: give a share above 0 and at most 1 (1 keeps all tokens)")
    if choice.temperature == 0 and (choice.top_k or choice.top_p < 1):
        raise ValueError(
            "temperature 0 takes the most probable token, so top_k and top_p have no effect: leave them out"
        )


def blank_answers(policy: Policy, prompts: Sequence[Prompt], n: int, seed: int) -> list[Answer]:
    """Every answer to write, prompt by prompt."""
    encoded = encode_prompts(policy.tokenizer, prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(
                f"{prompt.source or 'a prompt'} is empty and the tokenizer has no beginning-of-sequence "
                "token, so the model would have nothing to read: give a prompt with some text"
            )
    seen: Counter[tuple[int, ...]] = Counter()
    answers = []
    for ids in encoded:
        # A prompt that is asked twice gets other answers the second time.
        first = n * seen[tuple(ids)]
        seen[tuple(ids)] += 1
        answers += [Answer(ids, row_key(seed, ids, first + i)) for i in range(n)]
    return answers


def default_stop_ids(policy: Policy) -> frozenset[int]:
    """The ids that end an answer of this policy."""
    config = getattr(policy.model, "generation_config", None)
    return tokenizer_stop_ids(policy.tokenizer, getattr(config, "eos_token_id", None))


@contextmanager
def weights_cast_once(policy: Policy) -> Iterator[None]:
    """The policy's precision, with the copies of the weights that it computes with made once and not at every step.

    Autocast keeps a copy until the outermost context ends, and only of a weight that requires a gradient; so the frozen
    weights under an adapter say that they do for a while. Run it without gradients.
    """
    frozen = [weight for weight in policy.model.parameters() if not weight.requires_grad and weight.is_floating_point()]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with policy.precision():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


# ---- The loop


def write(
    policy: Policy,
    answers: list[Answer],
    choice: Choice,
    max_new_tokens: int,
    stop: frozenset[int],
    advance: Callable[..., None],
) -> None:
    """Write one batch of answers to their ends."""
    batch = Decoding.start(policy, answers)
    for position in range(max_new_tokens):
        drawn = draw(batch.logprobs, choice, uniforms(batch.keys, position))
        batch.record(drawn, stop)
        ended = sum(answer.finished for answer in batch.answers)
        if ended == len(batch.answers) or position + 1 == max_new_tokens:
            break
        if ended >= DROP_SHARE * len(batch.answers):
            drawn = batch.drop_finished(drawn)
        batch.step(drawn.ids)
    advance(len(answers))


@dataclass(frozen=True)
class Drawn:
    """One drawn token a row, `[B]` each: its id and its log-probability before and after shaping (see `Samples`)."""

    ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    sampled_logprobs: Float[Tensor, " B"]


class Decoding:
    """A batch of answers being written: their cache, what of it is padding, and the next tokens' log-probabilities."""

    def __init__(self, policy: Policy, answers: list[Answer], cache: Cache, mask: Tensor, logprobs: Tensor) -> None:
        self.policy = policy
        self.answers = answers
        self.keys = np.array([answer.key for answer in answers], dtype=np.uint64)
        self.cache = cache
        self.mask = mask
        self.logprobs = logprobs

    @classmethod
    def start(cls, policy: Policy, answers: list[Answer]) -> Decoding:
        """Read each different prompt once, then continue from copies of its cache."""
        places = {tuple(answer.prompt): 0 for answer in answers}
        places = {prompt: place for place, prompt in enumerate(places)}
        tokens = pad([Row(list(ids), [False] * len(ids)) for ids in places], policy.pad_id, side="left")
        ids, mask = tokens.ids.to(policy.device), tokens.attention_mask.to(policy.device)
        cache = DynamicCache(config=policy.model.config)
        logprobs = next_logprobs(policy, ids, mask, cache)
        rows = torch.tensor([places[tuple(answer.prompt)] for answer in answers], device=policy.device)
        take_rows(cache, rows)
        cache.layers = [GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cls(policy, answers, cache, mask[rows], logprobs[rows])

    def record(self, drawn: Drawn, stop: frozenset[int]) -> None:
        """Append what was drawn to the answers that have not ended."""
        columns = (drawn.ids.tolist(), drawn.logprobs.tolist(), drawn.sampled_logprobs.tolist())
        for answer, token, logprob, sampled_logprob in zip(self.answers, *columns, strict=True):
            if not answer.finished:
                answer.ids.append(token)
                answer.logprobs.append(logprob)
                answer.sampled_logprobs.append(sampled_logprob)
                answer.finished = token in stop

    def drop_finished(self, drawn: Drawn) -> Drawn:
        """Let the answers that have ended leave the batch; what was drawn for the rest."""
        alive = [i for i, answer in enumerate(self.answers) if not answer.finished]
        self.answers = [self.answers[i] for i in alive]
        self.keys = self.keys[alive]
        rows = torch.tensor(alive, device=self.mask.device)
        self.mask = self.mask[rows]
        take_rows(self.cache, rows)
        return Drawn(drawn.ids[rows], drawn.logprobs[rows], drawn.sampled_logprobs[rows])

    def step(self, ids: Int[Tensor, " B"]) -> None:
        """Read one more token a row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        self.logprobs = next_logprobs(self.policy, ids[:, None], self.mask, self.cache)


def next_logprobs(policy: Policy, ids: Tensor, mask: Tensor, cache: Cache) -> Float[Tensor, "B V"]:
    """The log-probabilities of every token after the last of `ids`, float32, at temperature 1.

    `mask` covers what the cache holds and then `ids`; padding is on the left.
    """
    body = policy.model.base_model if policy.module.projects else policy.model
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": cache}
    if "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    outputs = body(**inputs, use_cache=True)
    states = outputs.last_hidden_state if policy.module.projects else outputs.logits
    # The model's own distribution, whatever temperature the policy's log-probabilities are made at.
    return log_distributions(policy.module.head, states[:, -1], fast=policy.arithmetic.autocast is not None)


def take_rows(cache: Cache, rows: Int[Tensor, " R"]) -> None:
    """Make `rows` of the cache its rows: some of them, or some several times."""
    cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType] (its annotation asks for a legacy tensor type)


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values `[B, heads, T, width]` in memory that grows by blocks."""

    is_sliding = False
    is_croppable = False

    @classmethod
    def of(cls, layer: Any) -> GrowingLayer:
        """The same contents with room behind them."""
        growing = cls()
        growing.lazy_initialization(layer.keys, layer.values)
        growing.update(layer.keys, layer.values)
        return growing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.length = 0
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = with_room(self.keys, self.length), with_room(self.values, self.length)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under the name that earlier versions of transformers ask for."""
        return -1


def with_room(states: Tensor, length: int) -> Tensor:
    """A copy with at least `length` columns, whole blocks of them."""
    rows, heads, held, width = states.shape
    room = states.new_zeros(rows, heads, (length + CACHE_BLOCK - 1) // CACHE_BLOCK * CACHE_BLOCK, width)
    room[:, :, :held] = states
    return room


# ---- Choosing a token


def draw(logprobs: Float[Tensor, "B V"], choice: Choice, uniform: Float[Tensor, " B"]) -> Drawn:
    """One token a row: the most probable one at temperature 0, else the one at `uniform` of the CDF."""
    if choice.temperature == 0:
        ids = logprobs.argmax(-1)
        return Drawn(ids, picked(logprobs, ids), torch.zeros_like(logprobs[:, 0]))
    shaped = logprobs if choice.is_plain else choice.shape(logprobs).log_softmax(-1)
    ids = inverse_cdf(shaped.exp(), uniform.to(logprobs.device))
    return Drawn(ids, picked(logprobs, ids), picked(shaped, ids))


def picked(values: Float[Tensor, "B V"], ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The value of one token a row."""
    return values.gather(-1, ids[:, None])[:, 0]


def inverse_cdf(weights: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first token whose cumulative weight exceeds `uniform` times the total; never one of weight 0.

    In two steps, over sums of blocks and then inside one block, with the sums in float64: much less work than a
    cumulative sum over the vocabulary, and far more exact than one in float32.
    """
    rows, vocabulary = weights.shape
    filled = torch.nn.functional.pad(weights, (0, -vocabulary % CDF_BLOCK)).view(rows, -1, CDF_BLOCK)
    blocks = filled.sum(-1, dtype=torch.float64).cumsum(-1)
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


def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Rules out every token less probable than the k-th; tokens as probable as the k-th all stay."""
    kth = logits.topk(min(k, logits.shape[-1]), -1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


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


def row_key(seed: int, prompt: Sequence[int], sample_index: int) -> int:
    """The 64-bit key of one answer's uniform numbers: a hash of the seed, the prompt's ids and the answer's number."""
    words = np.array([seed & (2**64 - 1), sample_index, *prompt], dtype=np.uint64)
    return int.from_bytes(hashlib.blake2b(words.astype("<u8").tobytes(), digest_size=8).digest(), "little")


def uniforms(keys: NDArray[np.uint64], position: int) -> Float[Tensor, " B"]:
    """One number in [0, 1) a key: the `position`-th of SplitMix64 (Steele, Lea, Flood 2014) started at that key."""
    state = keys + np.uint64((position + 1) * 0x9E3779B97F4A7C15 % 2**64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    # The upper 53 bits fill a float64's mantissa, so 1 itself is never reached.
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


# ---- Samples


def collect(
    policy: Policy, prompts: Sequence[Prompt], n: int, answers: Sequence[Answer], stop: frozenset[int]
) -> Samples:
    """The written answers as padded rows and as texts."""
    rows = [Row(a.prompt + a.ids, [False] * len(a.prompt) + [True] * len(a.ids)) for a in answers]
    tokens = pad(rows, policy.pad_id)
    texts = [decode(policy.tokenizer, a.ids[:-1] if a.ids[-1] in stop else a.ids) for a in answers]
    return Samples(
        prompts=tuple(prompts),
        n=n,
        tokens=tokens,
        logprobs=per_token(tokens, [a.logprobs for a in answers]),
        sampled_logprobs=per_token(tokens, [a.sampled_logprobs for a in answers]),
        texts=texts,
        finished=torch.tensor([a.finished for a in answers]),
    )


def per_token(tokens: Tokens, values: Sequence[Sequence[float]]) -> PerToken:
    """One value per response token as `[B, T]`, zero elsewhere."""
    flat = torch.tensor([value for row in values for value in row])
    return torch.zeros(tokens.ids.shape).masked_scatter(tokens.response_mask, flat)
