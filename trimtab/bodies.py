"""The transformer inside a model: run on rows, or on rows laid out in shared sequences; what predicts each token.

`predicting` is the one place where a token is looked up one position before it stands.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trimtab.batches import PerToken, Tokens, move
from trimtab.layout import Layout, lay_out
from trimtab.precision import Precision
from trimtab.projection import Head, States, TokenStatistics, head_of, log_distributions, logprobs_of, statistics_of


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


def run_body(body: nn.Module, tokens: Tokens) -> Any:
    """A transformer's outputs on some rows. Mask and positions are given, so padding on either side changes nothing."""
    positions = {"position_ids": positions_of(tokens)} if takes_positions(body) else {}
    return body(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long(), use_cache=False, **positions)


def layout_masks(config: PreTrainedConfig, layout: Layout) -> Tensor | dict[str, Tensor]:
    """A layout's attention mask, narrowed to the window of layers that slide; one per kind of layer if they differ."""
    mask = layout.mask()
    window = getattr(config, "sliding_window", None)
    near = mask
    if window:
        distance = layout.positions[:, None, :, None] - layout.positions[:, None, None, :]
        near = mask & (distance < window)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
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


class LanguageModel(nn.Module):
    """The thin module around a causal language model: its `forward` runs the body and projects what is asked for.

    `projects` is false where the head is not known; then all logits are computed and most thrown away.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self.share, self.capacity = False, 0
        self.projects = False
        self.projects = head_of(network) is not None and self._head_agrees()
        if not self.projects:
            name = type(network).__name__
            warnings.warn(f"{name}: its head is not known here, so every step computes all logits.", stacklevel=2)

    @property
    def head(self) -> Head | None:
        """How states become logits; None if states are logits."""
        return head_of(self.network) if self.projects else None

    def forward(self, tokens: Tokens, precision: Precision, *, whole: bool) -> Tensor | TokenStatistics:
        """Log-probabilities of the response tokens `[N]`, or their statistics if `whole`."""
        with precision.context(tokens.ids.device):
            states = self.states(tokens)
        statistic = statistics_of if whole else logprobs_of
        return statistic(self.head, states, tokens.ids[tokens.response_mask], fast=precision.autocast is not None)

    def states(self, tokens: Tokens) -> States:
        """What predicts each response token, `[N, D]` in reading order: hidden states, or logits without a head."""
        if self.share or self.capacity:
            return self._states_laid_out(tokens)
        if not self.projects:
            return run_body(self.network, tokens).logits[predicting(tokens)]
        return run_body(self.network.base_model, tokens).last_hidden_state[predicting(tokens)]

    def _states_laid_out(self, tokens: Tokens) -> States:
        layout = lay_out(tokens, share=self.share, capacity=self.capacity)
        outputs = self.network.base_model(
            input_ids=layout.ids,
            attention_mask=layout_masks(self.network.config.get_text_config(), layout),
            position_ids=layout.positions,
            use_cache=False,
        )
        return outputs.last_hidden_state.flatten(0, 1)[layout.place[predicting(tokens)]]

    def use_layout(self, *, share: bool, capacity: int) -> None:
        """Run rows laid out from now on; ValueError, and rows as before, if that gives this model other results."""
        before = self.share, self.capacity
        self.share, self.capacity = share, capacity
        if not (self.projects and takes_positions(self.network.base_model) and self._layout_agrees()):
            self.share, self.capacity = before
            name = type(self.network).__name__
            raise ValueError(f"{name} cannot run several rows in one sequence; leave packing and prompt sharing off.")

    @torch.no_grad()
    def _head_agrees(self) -> bool:
        """Whether projecting hidden states gives the model's own logits, on a few random tokens."""
        tokens = probe_tokens(self.network)
        expected = torch.log_softmax(self.states(tokens).float(), -1)
        self.projects = True
        found = log_distributions(self.head, self.states(tokens), fast=False)
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def _layout_agrees(self) -> bool:
        tokens = probe_tokens(self.network)
        expected = run_body(self.network.base_model, tokens).last_hidden_state[predicting(tokens)]
        shared = lay_out(tokens, share=self.share, capacity=2 * tokens.ids.shape[1])
        assert shared.ids.shape[0] == 1, "the probe must put both rows into one sequence"
        kept, self.capacity = self.capacity, 2 * tokens.ids.shape[1]
        found = self.states(tokens)
        self.capacity = kept
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
