"""The transformer inside a model: run on rows, or on rows laid out in shared sequences; what predicts each token.

`predicting` is the one place where a token is looked up one position before it stands.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trimtab.attention import FOR_DEVICE, OWN, Attention, can_take_own, implementation_of, layout_masks, set_attention
from trimtab.batches import PerToken, Tokens, move
from trimtab.layout import Arrangement, Layout, arrange, lay_out, pair_price, positions_of
from trimtab.precision import Precision
from trimtab.projection import Head, States, TokenStatistics, head_of, log_distributions, logprobs_of, statistics_of
from trimtab.weights import score_head

T = TypeVar("T")

FLEX_PROBE = 200
"""Tokens of each row that FlexAttention is tried on: more than one of its blocks of 128."""
SHORT_PROBE = 9
FLOAT32 = Precision(None, "float32")
UNFIT = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What a transformer raises when it is given a mask that it was not written for."""


def predicting(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The next-token shift: row and column of the position that predicts each response token, in reading order."""
    assert not tokens.response_mask[:, :1].any(), "a row's first token has nothing that predicts it"
    rows, columns = tokens.response_mask.nonzero(as_tuple=True)
    return rows, columns - 1


def at_responses(tokens: Tokens, values: Tensor) -> PerToken:
    """One value per response token, in reading order, as `[B, T]`: zero elsewhere."""
    return values.new_zeros(tokens.ids.shape).masked_scatter(tokens.response_mask, values)


def takes_positions(body: nn.Module) -> bool:
    """Whether a transformer can be told the positions of its tokens; others find them from the mask or have none."""
    return "position_ids" in inspect.signature(body.forward).parameters


def run_rows(model: nn.Module, tokens: Tokens) -> Any:
    """A model's outputs on padded rows. Mask and positions are given, so padding on either side changes nothing."""
    positions = {"position_ids": positions_of(tokens.attention_mask)} if takes_positions(model) else {}
    return model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long(), use_cache=False, **positions)


def probe_tokens(network: PreTrainedModel, length: int = SHORT_PROBE) -> Tokens:
    """Two rows of random ids with one prompt of a third of `length`, the second padded on the left by two.

    No real id is the padding id, by which transformers' own classifiers find a row's end.
    """
    config = network.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id or 0
    prompt, padding = length // 3, 2
    ids = torch.randint(config.vocab_size - 1, (2, length), generator=generator)
    ids += ids >= pad
    ids[1, padding : padding + prompt] = ids[0, :prompt].clone()
    ids[1, :padding] = pad
    columns = torch.arange(length)
    attended = torch.stack([columns >= 0, columns >= padding])
    response = torch.stack([columns >= prompt, columns >= padding + prompt])
    return move(Tokens(ids, attended, response), network.device)


class Body(nn.Module):
    """A transformer without its head, which runs rows as they are or laid out in shared sequences.

    `arrangement` says how rows may be laid out; None runs them as they are. Prompts are shared unless the family
    cannot. `why` says in words which attention runs layouts.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.arrangement = Arrangement() if self.can_lay_out else None
        self.why = "the family's own attention, by default"

    @property
    def attention(self) -> str:
        """What runs layouts: "flex", "blocked", or the name of transformers' implementation."""
        implementation = implementation_of(self.network)
        return next((own for own, name in OWN.items() if name == implementation), implementation)

    def layout(self, tokens: Tokens) -> Layout | None:
        """How these rows are run; None for as they are."""
        if self.arrangement is None:
            return None
        if self.attention == "flex":
            return lay_out(tokens, share=self.arrangement.share)
        return arrange(tokens, self.arrangement, pair_price(self.network.config.get_text_config().hidden_size))

    def forward(self, tokens: Tokens, layout: Layout | None) -> Tensor:
        """Hidden states of the rows, `[B, T, D]`, or of the layout's sequences, `[S, L, D]`."""
        transformer = self.network.base_model
        if layout is None:
            return run_rows(transformer, tokens).last_hidden_state
        masks = layout_masks(self.network, layout)
        inputs = {"input_ids": layout.ids, "attention_mask": masks, "position_ids": layout.positions}
        return transformer(**inputs, use_cache=False).last_hidden_state

    def at(self, tokens: Tokens, rows: Tensor, columns: Tensor) -> States:
        """Hidden states of some tokens, `[N, D]`, whatever the layout."""
        layout = self.layout(tokens)
        states = self(tokens, layout)
        return states[rows, columns] if layout is None else states.flatten(0, 1)[layout.place[rows, columns]]

    def use_layout(
        self,
        *,
        share: bool = True,
        capacity: int = 0,
        attention: Attention = "auto",
        precision: Precision = FLOAT32,
    ) -> None:
        """Share prompts or not, fill sequences up to `capacity` tokens (0: see `Arrangement`).

        Without both, rows run as they are.

        `attention` runs layouts: "auto" is FlexAttention on CUDA and blocks of queries on CPUs, if they give what the
        family's own attention gives on some random tokens in `precision`. FlexAttention puts all rows into one
        sequence, whatever the capacity.

        ValueError for what the family, the device or the other arguments do not allow.
        """
        lays_out = share or capacity > 0
        name = type(self.network).__name__
        if attention not in get_args(Attention):
            raise ValueError(f"attention {attention}: allowed are {', '.join(get_args(Attention))}.")
        if attention != "auto" and not lays_out:
            raise ValueError(f"attention {attention} has no effect on rows as they are: share prompts or pack as well.")
        if lays_out and not self.can_lay_out:
            raise ValueError(f"{name} cannot run several rows in one sequence; leave packing and prompt sharing off.")
        if attention == "sdpa" and self.attention not in ("sdpa", *OWN):
            raise ValueError(f"attention sdpa: {name} runs its own, {self.attention}. Use attention auto.")
        self._choose_attention(attention if lays_out else "sdpa", precision)
        self.arrangement = Arrangement(share, capacity) if lays_out else None

    def _choose_attention(self, attention: Attention, precision: Precision) -> None:
        device = self.network.device.type
        own = FOR_DEVICE.get(device) if attention == "auto" else attention if attention in OWN else None
        problem = self.why_not(own, precision) if own else None
        if problem and attention in OWN:
            raise ValueError(f"attention {attention}: {problem}. Use attention auto.")
        set_attention(self.network, None if problem else own)
        asked = "as asked" if attention != "auto" else problem or f"chosen for {device}"
        self.why = f"{self.attention} attention, {asked}"

    def why_not(self, own: str, precision: Precision) -> str | None:
        """What keeps this model from one of our attentions; None if it runs and agrees, gradients included."""
        device = self.network.device.type
        if not can_take_own(self.network):
            return f"{type(self.network).__name__} does not leave its attention to transformers' sdpa"
        if own == "flex" and self.trains and device == "cpu":
            return "FlexAttention has no backward pass on CPUs"
        if own == "blocked" and device != "cpu":
            return f"blocks of queries are for CPUs, and this is {device}"
        return self.disagrees(own, precision)

    @property
    def trains(self) -> bool:
        """Whether any weight has a gradient."""
        return any(parameter.requires_grad for parameter in self.network.parameters())

    def disagrees(self, own: str, precision: Precision) -> str | None:
        """How one of our attentions differs from the family's, which is set afterwards; None if it agrees.

        On random rows; for FlexAttention, of more than one of its blocks.
        """
        longest = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        length = FLEX_PROBE if own == "flex" else SHORT_PROBE
        tokens = probe_tokens(self.network, min(length, longest or length))
        layout = lay_out(tokens, share=True)
        set_attention(self.network, None)
        with precision.context(self.network.device):
            expected = probe(self, tokens, layout, as_rows=True)
            try:
                set_attention(self.network, own)
                found = probe(self, tokens, layout, as_rows=False)
            except UNFIT as error:  # a compiler's errors are RuntimeErrors; the run says why it goes without
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                return f"{own} attention failed on this {self.network.device.type} ({reason})"
            finally:
                set_attention(self.network, None)
        tolerance = 5e-2 if precision.autocast else 1e-3
        agrees = all(relative_error(*pair) < tolerance for pair in zip(found, expected, strict=True))
        return None if agrees else f"{own} attention gives other states or gradients than the model's own attention"

    @cached_property
    @torch.no_grad()
    def can_lay_out(self) -> bool:
        """Whether two rows that share a sequence and a prompt get the states they get apart, on a few random tokens."""
        if not takes_positions(self.network.base_model):
            return False
        tokens = probe_tokens(self.network)
        layout = lay_out(tokens, share=True)
        try:
            found = self(tokens, layout).flatten(0, 1)[layout.place]
        except UNFIT:
            return False  # the family takes no mask of this shape; rows as they are, are always right
        expected = self(tokens, None)
        return torch.allclose(found[tokens.attention_mask], expected[tokens.attention_mask], rtol=1e-4, atol=1e-4)


def probe(body: Body, tokens: Tokens, layout: Layout, *, as_rows: bool) -> list[Tensor]:
    """States of the rows' tokens; of a model that trains, also a gradient at the embeddings, `[S, L, D]`."""
    real = tokens.attention_mask
    with torch.set_grad_enabled(body.trains), embedded(body.network) as entered:
        states = body(tokens, None if as_rows else layout)
        rows = (states if as_rows else states.flatten(0, 1)[layout.place])[real].float()
        if not body.trains:
            return [rows]
        # Any fixed function of the states; their squares would not do, since a norm stands before them.
        total = (rows * torch.arange(rows.numel(), device=rows.device).view_as(rows).cos()).sum()
        gradient = torch.autograd.grad(total, entered[0])[0].float()
    if as_rows:
        places = gradient.new_zeros(layout.ids.numel(), gradient.shape[-1])
        gradient = places.index_add(0, layout.place[real], gradient[real]).view(*layout.ids.shape, -1)
    return [rows.detach(), gradient]


@contextmanager
def embedded(network: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The outputs of the input embeddings while this is open, which gradients can be taken at."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        wants = torch.is_grad_enabled() and not output.requires_grad
        found.append(output.requires_grad_() if wants else output)
        return found[-1]

    handle = network.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a token's vector, in units of the mean length of those vectors."""
    return ((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean()).item()


class LanguageModel(nn.Module):
    """The thin module around a causal language model: its `forward` runs the body and projects what is asked for.

    `projects` is false where the head is not known; then all logits are computed and most thrown away. `temperature`
    divides the logits of all log-probabilities that are made here; what is drawn by `sample` has a temperature of its
    own.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.body = Body(network)
        self.temperature = 1.0
        self.projects = False
        self.projects = head_of(network) is not None and self._head_agrees()
        if not self.projects:
            name = type(network).__name__
            warnings.warn(f"{name}: its head is not known here, so every step computes all logits.", stacklevel=2)

    @property
    def head(self) -> Head | None:
        """How states become the model's own logits; None if states are logits."""
        return head_of(self.network) if self.projects else None

    @property
    def tempered_head(self) -> Head | None:
        """How states become logits at the temperature."""
        head = self.head
        return head.tempered(self.temperature) if head and self.temperature != 1 else head

    def forward(self, tokens: Tokens, precision: Precision, *, whole: bool) -> Tensor | TokenStatistics:
        """Log-probabilities of the response tokens `[N]`, or their statistics if `whole`."""
        with precision.context(tokens.ids.device):
            states = self.states(tokens)
        statistic = statistics_of if whole else logprobs_of
        fast = precision.autocast is not None
        return statistic(self.tempered_head, states, tokens.ids[tokens.response_mask], fast=fast)

    def run(self, task: Callable[[], T]) -> T:
        """`task()`; where weights are split over ranks, they are together for it (see `parallel.split_weights`)."""
        return task()

    def states(self, tokens: Tokens) -> States:
        """What predicts each response token, `[N, D]` in reading order: hidden states, or without a head logits at the
        temperature.
        """
        rows, columns = predicting(tokens)
        if self.projects:
            return self.body.at(tokens, rows, columns)
        return run_rows(self.network, tokens).logits[rows, columns] / self.temperature

    @torch.no_grad()
    def _head_agrees(self) -> bool:
        """Whether projecting hidden states gives the model's own logits, on a few random tokens."""
        tokens = probe_tokens(self.network)
        expected = torch.log_softmax(self.states(tokens).float(), -1)
        self.projects = True
        found = log_distributions(self.head, self.states(tokens), fast=False)
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


class ScalarForward(nn.Module):
    """The thin module around a sequence classifier of one label: one float32 number at every position."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.body = Body(network)

    def forward(self, tokens: Tokens, precision: Precision) -> PerToken:
        layout = self.body.layout(tokens)
        with precision.context(tokens.ids.device):
            states = self.body(tokens, layout)
        weight = score_head(self.network).weight
        values = F.linear(states.to(weight.dtype), weight)[..., 0]
        return values if layout is None else values.flatten()[layout.place]

    def run(self, task: Callable[[], T]) -> T:
        """As `LanguageModel.run`."""
        return task()
