"""The loop of sampling: prompts -> answers with their log-probabilities, on the live model.

- Each prompt of a batch is read once; its answers continue from copies of its key-value cache. Rows that have ended
  leave the batch.
- A token is drawn by inverse CDF from one uniform number, which a counter-based generator makes from (seed, step,
  prompt, answer, position). So an answer does not depend on the batch it was drawn in, nor on the order of the prompts,
  and the first 4 of 8 answers are the 4 that `n=4` gives. Exact but for rounding: other batches give other last
  digits, which moves a draw that falls on the edge between two tokens; rare in float32, frequent in bf16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.batches import PerToken, Tokens, move
from trimtab.parallel import over_ranks
from trimtab.progress import progress_bar
from trimtab.records import Answer, Prompt
from trimtab.sampling.decoders import Decoder, Start, decoders
from trimtab.sampling.draws import Choice, Drawn, draw, row_key, uniforms
from trimtab.tokens import Row, decode, encode_prompts, pad
from trimtab.tokens import stop_ids as tokenizer_stop_ids

if TYPE_CHECKING:
    from trimtab.models import Policy

DROP_SHARE = 1 / 8
"""Share of a batch's rows that must have ended before the rest is copied together."""


@dataclass(frozen=True)
class Samples:
    """Answers to prompts: the `n` answers of a prompt are neighbouring rows, `P * n` rows in all.

    `tokens` are right-padded rows of prompt and answer, the response mask on every token that was drawn, the closing
    one included. `logprobs` are the drawn tokens' log-probabilities under the policy itself, `sampled_logprobs` under
    the distribution they were drawn from (repetition penalty, temperature, top-k, top-p and min-p applied); nats per
    token, zero outside the answers. `finished` says which answers ended by a stop token or a stop string rather than at
    `max_new_tokens`. `texts` end before what ended the answer; the tokens of a stop string stay in `tokens`.
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
    def answers(self) -> list[Answer]:
        """Every row's answer for a reward: its text, whether it ended, and the ids drawn."""
        rows = zip(self.texts, self.finished.tolist(), self.tokens.ids, self.tokens.response_mask, strict=True)
        return [Answer(text, finished, tuple(ids[drawn].tolist())) for text, finished, ids, drawn in rows]


@dataclass
class PartialAnswer:
    """One answer while it is written: its prompt's ids, the key of its uniform numbers, and what was drawn."""

    prompt: list[int]
    key: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finished: bool = False


Sampler = Callable[..., Samples]
"""`sample`, or what answers the same call."""


def sample(  # noqa: PLR0913 (what one may set about sampling, each by its name)
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int = 1,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    seed: int = 0,
    step: int = 0,
    batch_rows: int = 32,
    progress: bool = False,
) -> Samples:
    """Draw `n` answers to every prompt, at most `max_new_tokens` tokens each.

    An answer ends with the first token of `stop_ids` (the tokenizer's and the model's end tokens unless given) or with
    the token that completes one of the texts `stop`. `top_k=0`, `top_p=1` and `min_p=0` rule nothing out; temperature 0
    takes the most probable token. The draws are a function of `seed`, `step` (that of an online run, which asks the
    same prompts again), prompt and answer. ValueError for settings that mean nothing, and for an empty prompt with a
    tokenizer that has no beginning-of-sequence token.
    """
    choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty)
    check(prompts, n=n, max_new_tokens=max_new_tokens, batch_rows=batch_rows, step=step)
    ending = Ending.of(policy, stop, stop_ids)
    answers = blank_answers(policy, prompts, n, seed, step)
    bar = progress_bar("sample", len(answers)) if progress else nullcontext(lambda count: None)
    with policy.whole() as here, bar as advance:

        def written(own: Sequence[list[PartialAnswer]]) -> list[list[PartialAnswer]]:
            # Prompts of similar length together: little padding. A prompt's answers stay neighbours.
            by_length = sorted((answer for group in own for answer in group), key=lambda answer: len(answer.prompt))
            with torch.no_grad(), decoders(here) as start:
                for first in range(0, len(by_length), batch_rows):
                    batch = Decoding.start(here, start, by_length[first : first + batch_rows], choice)
                    write(batch, choice, max_new_tokens, ending)
                    advance(len(batch.all_answers))
            return list(own)

        groups = over_ranks(written, [answers[i : i + n] for i in range(0, len(answers), n)], meeting=here.is_split)
    return collect(policy, prompts, n, [answer for group in groups for answer in group], ending)


def check(prompts: Sequence[Prompt], *, n: int, max_new_tokens: int, batch_rows: int, step: int) -> None:
    """ValueError for the first setting that means nothing."""
    if not prompts:
        raise ValueError("there is nothing to sample from: no prompts were given")
    for name, count in {"n": n, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: at least 1 is needed")
    if step < 0:
        raise ValueError(f"step is {step}: give the number of a step, from 0")


def blank_answers(policy: Policy, prompts: Sequence[Prompt], n: int, seed: int, step: int) -> list[PartialAnswer]:
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
        answers += [PartialAnswer(ids, row_key(seed, ids, first + i, step)) for i in range(n)]
    return answers


# ---- Where answers end


@dataclass(frozen=True)
class Ending:
    """What ends an answer: tokens, and texts."""

    ids: frozenset[int]
    texts: tuple[str, ...]
    read: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, policy: Policy, texts: Sequence[str], ids: Collection[int] | None) -> Ending:
        """ValueError for a text that no answer can hold."""
        for text in texts:
            if not text:
                raise ValueError("a stop text is empty: give a text that may stand in an answer")
            if text in policy.tokenizer.all_special_tokens:
                raise ValueError(f"stop text {text!r} is a special token, which texts leave out: give its id instead")
        config = getattr(policy.model, "generation_config", None)
        default = tokenizer_stop_ids(policy.tokenizer, getattr(config, "eos_token_id", None))
        chosen = default if ids is None else frozenset(ids)
        return cls(chosen, tuple(texts), lambda drawn: decode(policy.tokenizer, drawn))

    def ends(self, drawn: Sequence[int]) -> bool:
        """Whether an answer's last token ends it."""
        if drawn[-1] in self.ids:
            return True
        written = self.read(drawn) if self.texts else ""
        return any(text in written for text in self.texts)

    def text(self, drawn: Sequence[int]) -> str:
        """An answer's text before what ended it."""
        whole = self.read(drawn[:-1] if drawn[-1] in self.ids else drawn)
        return whole[: min((whole.index(text) for text in self.texts if text in whole), default=len(whole))]


# ---- The loop


def write(batch: Decoding, choice: Choice, max_new_tokens: int, ending: Ending) -> None:
    """Write one batch of answers to their ends."""
    for position in range(max_new_tokens):
        drawn = draw(batch.logits, choice, uniforms(batch.keys, position), batch.seen)
        batch.record(drawn, ending)
        ended = sum(answer.finished for answer in batch.answers)
        if ended == len(batch.answers) or position + 1 == max_new_tokens:
            break
        if ended >= DROP_SHARE * len(batch.answers):
            drawn = batch.drop_finished(drawn)
        batch.step(drawn.ids)


class Decoding:
    """A batch of answers being written: what has been read of them, and their next tokens' logits.

    `seen` marks the tokens that stand in prompt or answer, `[B, V]`, where the choice looks back. `answers` are those
    still in the batch.
    """

    def __init__(
        self,
        answers: list[PartialAnswer],
        decoder: Decoder,
        logits: Float[Tensor, "B V"],
        seen: Bool[Tensor, "B V"] | None,
    ) -> None:
        self.all_answers = self.answers = answers
        self.keys = np.array([answer.key for answer in answers], dtype=np.uint64)
        self.decoder = decoder
        self.logits = logits
        self.seen = seen

    @classmethod
    def start(cls, policy: Policy, start: Start, answers: list[PartialAnswer], choice: Choice) -> Decoding:
        """Read each different prompt once, then continue from copies of what was read."""
        prompts = list(dict.fromkeys(tuple(answer.prompt) for answer in answers))
        places = {prompt: place for place, prompt in enumerate(prompts)}
        rows = torch.tensor([places[tuple(answer.prompt)] for answer in answers], device=policy.device)
        tokens = pad([Row(list(ids), [False] * len(ids)) for ids in prompts], policy.pad_id, side="left")
        decoder, logits = start(move(tokens, policy.device), rows)
        return cls(answers, decoder, logits, marked(answers, logits) if choice.looks_back else None)

    def record(self, drawn: Drawn, ending: Ending) -> None:
        """Append what was drawn to the answers that have not ended."""
        columns = (drawn.ids.tolist(), drawn.logprobs.tolist(), drawn.sampled_logprobs.tolist())
        for answer, token, logprob, sampled_logprob in zip(self.answers, *columns, strict=True):
            if not answer.finished:
                answer.ids.append(token)
                answer.logprobs.append(logprob)
                answer.sampled_logprobs.append(sampled_logprob)
                answer.finished = ending.ends(answer.ids)

    def drop_finished(self, drawn: Drawn) -> Drawn:
        """Let the answers that have ended leave the batch; what was drawn for the rest."""
        alive = [i for i, answer in enumerate(self.answers) if not answer.finished]
        self.answers = [self.answers[i] for i in alive]
        self.keys = self.keys[alive]
        rows = torch.tensor(alive, device=drawn.ids.device)
        self.seen = self.seen[rows] if self.seen is not None else None
        self.decoder.keep(rows)
        return drawn.select(rows)

    def step(self, ids: Int[Tensor, " B"]) -> None:
        """Read one more token a row."""
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        self.logits = self.decoder.step(ids)


def marked(answers: Sequence[PartialAnswer], logits: Float[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
    """Which tokens stand in each answer's prompt."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, answer in zip(seen, answers, strict=True):
        row[answer.prompt] = True
    return seen


# ---- Samples


def collect(
    policy: Policy, prompts: Sequence[Prompt], n: int, answers: Sequence[PartialAnswer], ending: Ending
) -> Samples:
    """The written answers as padded rows and as texts."""
    rows = [Row(a.prompt + a.ids, [False] * len(a.prompt) + [True] * len(a.ids)) for a in answers]
    tokens = pad(rows, policy.pad_id)
    return Samples(
        prompts=tuple(prompts),
        n=n,
        tokens=tokens,
        logprobs=per_token(tokens, [a.logprobs for a in answers]),
        sampled_logprobs=per_token(tokens, [a.sampled_logprobs for a in answers]),
        texts=[ending.text(a.ids) for a in answers],
        finished=torch.tensor([a.finished for a in answers]),
    )


def per_token(tokens: Tokens, values: Sequence[Sequence[float]]) -> PerToken:
    """One value per response token as `[B, T]`, zero elsewhere."""
    flat = torch.tensor([value for row in values for value in row])
    return torch.zeros(tokens.ids.shape).masked_scatter(tokens.response_mask, flat)
