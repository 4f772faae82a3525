"""Texts -> vectors: the mean of the last hidden states of any transformer over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.batches import move
from trimtab.precision import choose_device
from trimtab.records import Prompt
from trimtab.tokens import Row, encode_prompts, pad, pad_id
from trimtab.weights import load_body, load_tokenizer


@dataclass(frozen=True)
class Embedder:
    """A transformer that reads texts, `max_length` tokens of each at most."""

    model: Any
    tokenizer: Any
    max_length: int = 512
    batch_rows: int = 32

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """One vector a text, `[N, D]`; an empty text is a row of zeros."""
        encoded = encode_prompts(self.tokenizer, [Prompt.from_text(text) for text in texts])
        rows = [ids[: self.max_length] for ids in encoded]
        found = np.zeros((len(rows), self.model.config.get_text_config().hidden_size))
        order = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_rows):
            chosen = order[start : start + self.batch_rows]
            tokens = pad([Row(rows[i], [False] * len(rows[i])) for i in chosen], pad_id(self.tokenizer))
            tokens = move(tokens, self.model.device)
            states = self.model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).last_hidden_state
            mask = tokens.attention_mask[..., None]
            means = (states.float() * mask).sum(1) / mask.sum(1)
            found[chosen] = means.double().cpu().numpy()
        return found


def load_embedder(source: str, *, device: str = "auto", trust_remote_code: bool = False) -> Embedder:
    """An embedder from a folder or hub id. ValueError or FileNotFoundError for what is no transformer."""
    network: Any = load_body(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return Embedder(network.eval().to(choose_device(device)), tokenizer)
