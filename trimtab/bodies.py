"""The transformer inside a model: run on rows, or on rows laid out in shared sequences; what predicts each token.

`predicting` is the one place where a token is looked up one position before it stands.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from trimtab.batches import PerToken, Tokens, move
from trimtab.layout import Arrangement, Layout, arrange, lay_out
from trimtab.precision import Precision
from trimtab.projection import Head, States, TokenStatistics, head_of, log_distributions, logprobs_of, statistics_of
from trimtab.weights import score_head


def predicting(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The next-token shift: row and column of the position that predicts each response token, in reading order."""
    assert not tokens.response_mask[:, :1].any(), "a row's first token has nothing that predicts it"
    rows, columns = tokens.response_mask.nonzero(as_tuple=True)
    return rows, columns - 1


def at_responses(tokens: Tokens, values: Tensor) -> PerToken:
    """One value per response token, in reading order, as `[B, T]`: zero elsewhere."""
    return values.new_zeros(tokens.ids.shape).masked_scatter(tokens.response_mask, values)


def positions_of(tokens: Tokens) -> Tensor:
    """Each real token's number in its row, from 0, whichever side the padding is on."""
    return (tokens.attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def takes_positions(body: nn.Module) -> bool:
    """Whether a transformer can be told the positions of its tokens; others find them from the mask or have none."""
    return "position_ids" in inspect.signature(body.forward).parameters


def run_rows(model: nn.Module, tokens: Tokens) -> Any:
    """A model's outputs on padded rows. Mask and positions are given, so padding on either side changes nothing."""
    positions = {"position_ids": positions_of(tokens)} if takes_positions(model) else {}
    return model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long(), use_cache=False, **positions)


def layout_masks(config: PreTrainedConfig, layout: Layout) -> Tensor | dict[str, Tensor]:
    """A layout's attention mask, narrowed to the window of layers that slide; one per kind of layer if they differ."""
    mask = layout.mask()
    window = getattr(config, "sliding_window", None)
    near = mask
    if window:
        distance = layout.positions[:, None, :, None] - layout.positions[:, None, None, :]
        near = mask & (distance < window)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"no mask is known for layers of kind {', '.join(sorted(unknown))}")
    masks = {kind: near if kind == "sliding_attention" else mask for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def probe_tokens(network: PreTrainedModel) -> Tokens:
    """Two short rows of random ids with one prompt, one padded on the left; the last tokens of each are its response.

    No real id is the padding id, by which transformers' own classifiers find a row's end.
    """
    config = network.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id or 0
    ids = torch.randint(config.vocab_size - 1, (2, 9), generator=generator)
    ids += ids >= pad
    ids[1, 2:5] = ids[0, :3].clone()
    ids[1, :2] = pad
    columns = torch.arange(9)
    attended = torch.stack([columns >= 0, columns >= 2])
    response = torch.stack([columns >= 3, columns >= 5])
    return move(Tokens(ids, attended, response), network.device)


class Body(nn.Module):
    """A transformer without its head, which runs rows as they are or laid out in shared sequences.

    `arrangement` says how rows may be laid out; None runs them as they are. Prompts are shared unless the family
    cannot.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.arrangement = Arrangement() if self.can_lay_out else None

    def layout(self, tokens: Tokens) -> Layout | None:
        """How these rows are run; None for as they are."""
        return arrange(tokens, self.arrangement) if self.arrangement else None

    def forward(self, tokens: Tokens, layout: Layout | None) -> Tensor:
        """Hidden states of the rows, `[B, T, D]`, or of the layout's sequences, `[S, L, D]`."""
        transformer = self.network.base_model
        if layout is None:
            return run_rows(transformer, tokens).last_hidden_state
        masks = layout_masks(self.network.config.get_text_config(), layout)
        inputs = {"input_ids": layout.ids, "attention_mask": masks, "position_ids": layout.positions}
        return transformer(**inputs, use_cache=False).last_hidden_state

    def at(self, tokens: Tokens, rows: Tensor, columns: Tensor) -> States:
        """Hidden states of some tokens, `[N, D]`, whatever the layout."""
        layout = self.layout(tokens)
        states = self(tokens, layout)
        return states[rows, columns] if layout is None else states.flatten(0, 1)[layout.place[rows, columns]]

    def use_layout(self, *, share: bool = True, capacity: int = 0) -> None:
        """Share prompts or not, fill sequences up to `capacity` tokens; neither runs rows as they are.

        ValueError for a family that gives other results then.
        """
        if (share or capacity) and not self.can_lay_out:
            name = type(self.network).__name__
            raise ValueError(f"{name} cannot run several rows in one sequence; leave packing and prompt sharing off.")
        self.arrangement = Arrangement(share, capacity) if share or capacity else None

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
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return False  # the family takes no mask of this shape; rows as they are, are always right
        expected = self(tokens, None)
        return torch.allclose(found[tokens.attention_mask], expected[tokens.attention_mask], rtol=1e-4, atol=1e-4)


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
