"""Policies and reward models: load, score, save.

`Policy.logprobs` is the one place where log-probabilities are made. Log-probabilities and scores are float32, whatever
the body computes in, and depend on a row's own tokens only: neighbours and the side and amount of padding do not
matter.

Dropout is off for good: models stay in eval mode, and nothing else in them depends on the mode.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab import parallel
from trimtab.batches import PerSequence, PerToken, Tokens, move
from trimtab.bodies import Body, LanguageModel, ScalarForward, at_responses, probe_tokens
from trimtab.memory import layers_of
from trimtab.precision import Precision, choose_device, choose_dtype
from trimtab.progress import console
from trimtab.projection import (
    ComparedStatistics,
    Measure,
    States,
    TokenStatistics,
    divergence_from,
    entropy,
    log_distributions,
    measured,
)
from trimtab.tokens import pad_id
from trimtab.weights import (
    Source,
    add_lora,
    classifier_from,
    has_reward_head,
    load_classifier,
    load_language_model,
    load_tokenizer,
    merged_state,
    reset_head,
    resolve,
    score_head,
    write_model,
)

T = TypeVar("T")

__all__ = [
    "ComparedStatistics",
    "FrozenPolicy",
    "Policy",
    "Precision",
    "ScalarModel",
    "Scorer",
    "TokenStatistics",
    "choose_device",
    "choose_dtype",
    "load_policy",
    "load_scalar",
    "load_tokenizer",
    "make_policy",
    "make_scalar",
    "merged_state",
    "resolve",
]


class Scorer(Protocol):
    """Log-probabilities of the response tokens of rows, nats per token, zero elsewhere."""

    @property
    def device(self) -> torch.device: ...

    def logprobs(self, tokens: Tokens) -> PerToken: ...


# ---- Policy


class Policy:
    """A causal language model that is trained, with its tokenizer.

    `model` is the transformers model itself (with LoRA, its linear layers carry the adapter); `adapter` is peft's view
    of it. Every call that takes `Tokens` moves them to the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arithmetic: Precision,
        adapter: PeftModel | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.arithmetic = arithmetic
        self.adapter = adapter
        self.module = LanguageModel(model)
        self.blank: Blank | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def precision(self) -> AbstractContextManager[object]:
        """Where calls of `model` compute as `logprobs` does: bf16 autocast or nothing."""
        return self.arithmetic.context(self.device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights with their names, tied ones once."""
        return self.model.named_parameters()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights that training changes: all, or the adapter's."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def body(self) -> Body:
        """The transformer under the head, which decides how rows are run."""
        return self.module.body

    def logprobs(self, tokens: Tokens) -> PerToken:
        """Log-probabilities of the response tokens, in nats, with gradient; zero elsewhere."""
        tokens = move(tokens, self.device)
        return at_responses(tokens, self.module(tokens, self.arithmetic, whole=False))

    def statistics(self, tokens: Tokens) -> TokenStatistics:
        """Log-probabilities with gradient, and entropy and squares of the distributions, `[B, T]`; zero elsewhere."""
        tokens = move(tokens, self.device)
        found = self.module(tokens, self.arithmetic, whole=True)
        return TokenStatistics(
            *(at_responses(tokens, values) for values in (found.logprobs, found.log_sum_squares, found.entropy))
        )

    def compare(self, tokens: Tokens, reference: Policy | FrozenPolicy) -> ComparedStatistics:
        """Log-probabilities with gradient, entropy, and KL to the reference, `[B, T]`; zero outside the responses.

        One pass of each body. KL(policy || reference) is of the next-token distribution at each response token and
        exact over the whole vocabulary, which both models must share; it has no gradient.
        """
        return ComparedStatistics(*self._compared(tokens, reference, (entropy,)))

    @torch.no_grad()
    def kl(self, tokens: Tokens, reference: Policy | FrozenPolicy) -> PerToken:
        """The KL of `compare` alone, without gradient.

        Summed over a row sampled from the policy it is an unbiased estimate of the KL of whole sequences.
        """
        return self._compared(tokens, reference, ())[1]

    def _compared(
        self, tokens: Tokens, reference: Policy | FrozenPolicy, measures: Sequence[Measure]
    ) -> list[PerToken]:
        """Log-probabilities, the measures, and the divergence from the reference."""
        tokens = move(tokens, self.device)

        def both() -> tuple[Tensor, ...]:
            every = (*measures, self._divergence(tokens, reference))
            targets, fast = tokens.ids[tokens.response_mask], self.arithmetic.autocast is not None
            return measured(self.module.tempered_head, self.states(tokens), targets, every, fast=fast)

        found = run_together((self.module, reference.module), both)
        return [at_responses(tokens, values) for values in found]

    @staticmethod
    @torch.no_grad()
    def _divergence(tokens: Tokens, reference: Policy | FrozenPolicy) -> Measure:
        states = reference.states(move(tokens, reference.device))
        return divergence_from(lambda rows: reference.log_distributions(states[rows]).detach())

    def states(self, tokens: Tokens) -> States:
        """What predicts each response token, `[N, D]`. Of split weights only inside `module.run`."""
        with self.precision():
            return self.module.states(tokens)

    def log_distributions(self, states: States) -> Tensor:
        """The log-probabilities of the whole vocabulary that some states predict, `[N, V]`."""
        return log_distributions(self.module.tempered_head, states, fast=self.arithmetic.autocast is not None)

    def reference(self) -> FrozenPolicy:
        """What the policy is compared with: the model without its adapter, else a frozen copy of it as it is now.

        Without an adapter, ask before the first step.
        """
        return FrozenPolicy(self, without_adapter=True) if self.adapter else self.frozen()

    def frozen(self) -> FrozenPolicy:
        """A copy of the policy as it is now, adapter included; later steps do not change it."""
        adapter = copy.deepcopy(self.adapter)
        model = network_of(adapter) if adapter else copy.deepcopy(self.model)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        copied = Policy(model, self.tokenizer, self.arithmetic, adapter)
        copied.body.arrangement = self.body.arrangement
        copied.module.temperature = self.module.temperature
        return FrozenPolicy(copied)

    def split_weights(self) -> None:
        """Split the weights over all ranks, once; see `parallel.split_weights`. Copies must have been made before."""
        self.blank = self.blank or split(self)

    @property
    def is_split(self) -> bool:
        """Whether its weights are split over the ranks, so that all of them run it together."""
        return self.blank is not None

    @contextmanager
    def whole(self) -> Iterator[Policy]:
        """The policy with all its weights here, as long as this is open: itself, or where they are split a copy.

        Where some rank has no room for a copy, it stays split.
        """
        # Sampling makes copies of its own in bf16.
        copies = 1.5 if self.arithmetic.autocast else 1.0
        if self.blank is None:
            yield self
            return
        if not parallel.has_room(self.model, self.device, copies=copies):
            say_apart()
            yield self
            return
        with filled(self, everywhere=True) as network:
            arithmetic = replace(self.arithmetic, keeps_copies=True)
            copied = Policy(network, self.tokenizer, arithmetic, self.blank.adapter)
            copied.module.temperature = self.module.temperature
            yield copied

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a standard model folder, adapter merged in; the policy itself stays as it is, to the last bit.

        Weights are float32 unless `dtype` is given. All ranks call it, and the first one writes.
        """
        with filled(self, everywhere=False) as network:
            if parallel.is_first():
                write_model(Path(path), network, self.tokenizer, dtype=dtype)


class FrozenPolicy:
    """A policy that only looks: log-probabilities without gradient, with its adapter switched off if asked."""

    def __init__(self, policy: Policy, *, without_adapter: bool = False) -> None:
        self.policy = policy
        self.without_adapter = without_adapter

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    @property
    def module(self) -> LanguageModel:
        return self.policy.module

    def split_weights(self) -> None:
        """As `Policy.split_weights`."""
        self.policy.split_weights()

    @property
    def adapter_is_on(self) -> bool:
        """Whether an adapter takes part in what it computes."""
        return self.policy.adapter is not None and not self.without_adapter

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.tokenizer

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def pad_id(self) -> int:
        return self.policy.pad_id

    @contextmanager
    def _still(self) -> Iterator[None]:
        adapter = self.policy.adapter if self.without_adapter else None
        with torch.no_grad(), adapter.disable_adapter() if adapter else nullcontext():
            yield

    def logprobs(self, tokens: Tokens) -> PerToken:
        """Log-probabilities of the response tokens, in nats; zero elsewhere."""
        with self._still():
            return self.policy.logprobs(tokens)

    def states(self, tokens: Tokens) -> States:
        """What predicts each response token, `[N, D]`."""
        with self._still():
            return self.policy.states(tokens)

    def log_distributions(self, states: States) -> Tensor:
        """The log-probabilities of the whole vocabulary that some states predict, `[N, V]`."""
        with self._still():
            return self.policy.log_distributions(states)


def network_of(adapter: PeftModel) -> PreTrainedModel:
    """The transformers model that an adapter was put into."""
    network = adapter.get_base_model()
    assert isinstance(network, PreTrainedModel)
    return network


# ---- ScalarModel


def last_columns(tokens: Tokens) -> Tensor:
    """The column of each row's last real token, found by the mask."""
    return tokens.attention_mask.shape[1] - 1 - tokens.attention_mask.flip(-1).int().argmax(-1)


class ScalarModel:
    """A model with one number as its output: a reward model, which scores answers, or a critic.

    `model` is a standard `AutoModelForSequenceClassification` with one label, and `save` writes one.

    transformers' own forward finds a row's end as the last id that is not `config.pad_token_id`, so where padding is
    the end-of-sequence token it would score the token before. Another special token is made the padding then; of a
    tokenizer that has no other (GPT-2's), the saved model scores differently there, and `save` says so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arithmetic: Precision,
        adapter: PeftModel | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.arithmetic = arithmetic
        self.adapter = adapter
        self.module = ScalarForward(model)
        self.blank: Blank | None = None
        give_own_padding(tokenizer)
        model.config.get_text_config().pad_token_id = self.pad_id
        self._check_agreement()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def body(self) -> Body:
        """The transformer under the head, which decides how rows are run."""
        return self.module.body

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights with their names, tied ones once."""
        return self.model.named_parameters()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights that training changes: all, or the adapter's and the head's."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def values(self, tokens: Tokens) -> PerToken:
        """The output at each real token, after reading that token; zero at padding."""
        tokens = move(tokens, self.device)
        return torch.where(tokens.attention_mask, self.module(tokens, self.arithmetic), 0.0)

    def scores(self, tokens: Tokens) -> PerSequence:
        """The output at each row's last real token."""
        tokens = move(tokens, self.device)
        values = self.module(tokens, self.arithmetic)
        return values.gather(1, last_columns(tokens)[:, None])[:, 0]

    def split_weights(self) -> None:
        """Split the weights over all ranks, once; see `parallel.split_weights`."""
        self.blank = self.blank or split(self)

    @property
    def is_split(self) -> bool:
        """As `Policy.is_split`."""
        return self.blank is not None

    @torch.no_grad()
    def scale_by(self, factor: float) -> None:
        """Multiply all scores by `factor`, inside the head's weight.

        Standard heads have no bias, so a normalization can set the scores' standard deviation but not their mean;
        only differences of scores mean something anyway.
        """
        score_head(self.model).weight.mul_(factor)

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a standard sequence classifier, adapter merged in; the model itself stays as it is, to the last bit.

        All ranks call it, and the first one writes.
        """
        if self.pad_id == self.tokenizer.eos_token_id:
            warnings.warn(
                "padding is the end-of-sequence token and the tokenizer has no other special token: outside trimtab, "
                "transformers will score each answer without its last token",
                stacklevel=2,
            )
        with filled(self, everywhere=False) as network:
            if parallel.is_first():
                write_model(Path(path), network, self.tokenizer, dtype=dtype)

    @torch.no_grad()
    def _check_agreement(self) -> None:
        """Refuse a family whose own forward gives other scores than ours for a row without padding."""
        tokens = probe_tokens(self.model).select(torch.tensor([0], device=self.device))
        found = self.module(tokens, Precision(None, "probe"))[:, -1]
        expected = self.model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).logits[:, 0]
        if not torch.allclose(found, expected.float(), rtol=1e-3, atol=1e-4):
            raise ValueError(f"{type(self.model).__name__} computes its scores in a way that is not known here.")


def give_own_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer a padding token that no answer ends with, if it has a special token to spare."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    spare = spare_token(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token if spare is None else spare


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that ends no answer: named for padding, else the unknown token, else one no template uses."""
    used = (tokenizer.eos_token, tokenizer.bos_token)
    template = str(tokenizer.chat_template or "")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in used and token not in template]
    unknown = [token for token in free if token == tokenizer.unk_token]
    padding = [token for token in free if "pad" in token.lower()]
    return next(iter([*padding, *unknown, *free]), None)


# ---- Split weights


class Blank(NamedTuple):
    """A copy of a network without its weights, in which those of the split one can be put together."""

    model: PreTrainedModel
    adapter: PeftModel | None


def split(model: Policy | ScalarModel) -> Blank:
    """Split a model's weights over the ranks; what their copies are put together in."""
    own = {id(weight): nn.Parameter(weight.new_empty(0), weight.requires_grad) for weight in model.model.parameters()}
    adapter = copy.deepcopy(model.adapter, dict(own))
    network = network_of(adapter) if adapter else copy.deepcopy(model.model, dict(own))
    parallel.split_weights(model.module, layers_of(model.model), model.device)
    # Else a pass would put the whole model together in bf16.
    model.arithmetic = replace(model.arithmetic, keeps_copies=False)
    return Blank(network, adapter)


@cache
def say_apart() -> None:
    """Say once why sampling takes long."""
    console.print("no room to put the policy together on every device: sampling with split weights, which is slower")


@contextmanager
def filled(model: Policy | ScalarModel, *, everywhere: bool) -> Iterator[PreTrainedModel]:
    """A model's network with all its weights, as long as this is open: on every rank, or for use on the first alone."""
    if model.blank is None:
        yield model.model
        return
    parallel.fill(model.blank.model, model.model, everywhere=everywhere)
    yield model.blank.model
    parallel.empty(model.blank.model)


def run_together(modules: Sequence[LanguageModel], task: Callable[[], T]) -> T:
    """`task()` while the weights of all these modules are here; a module may be named twice."""
    for module in dict.fromkeys(modules):
        task = partial(module.run, task)
    return task()


# ---- Loading


def load_policy(
    source: Source,
    *,
    dtype: str = "auto",
    device: str = "auto",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Policy:
    """A policy from a hub id, folder, run, adapter or built-in name; `lora_rank` > 0 trains an adapter on top.

    An adapter's weights are merged into its base in float32 first, so its reference is base and adapter together.
    Raises ValueError or FileNotFoundError for what is no language model in safetensors.
    """
    network = load_language_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return make_policy(
        network, tokenizer, dtype=dtype, device=device, lora_rank=lora_rank, lora_alpha=lora_alpha, seed=seed
    )


def make_policy(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "auto",
    device: str = "auto",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    seed: int = 0,
) -> Policy:
    """A policy of a model in memory, which it takes over; `seed` draws the adapter."""
    arithmetic = _settle(network, dtype, device)
    adapter = _adapter(network, network.get_output_embeddings(), lora_rank, lora_alpha, seed)
    return Policy(network, tokenizer, arithmetic, adapter)


def load_scalar(
    source: Source,
    *,
    new_head: bool,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    trust_remote_code: bool = False,
) -> ScalarModel:
    """A reward model or critic: a trained one, or with `new_head` any model under a head drawn from `seed`.

    Raises ValueError if a trained one is asked for and `source` has no reward head.
    """
    network = (
        _new_classifier(source, seed, trust_remote_code)
        if new_head
        else load_classifier(source, trust_remote_code=trust_remote_code)
    )
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return make_scalar(
        network, tokenizer, dtype=dtype, device=device, lora_rank=lora_rank, lora_alpha=lora_alpha, seed=seed
    )


def make_scalar(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "auto",
    device: str = "auto",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    seed: int = 0,
) -> ScalarModel:
    """A reward model of a sequence classifier in memory, which it takes over; `seed` draws the adapter."""
    arithmetic = _settle(network, dtype, device)
    head = score_head(network)
    adapter = _adapter(network, head, lora_rank, lora_alpha, seed)
    head.requires_grad_(True)
    return ScalarModel(network, tokenizer, arithmetic, adapter)


def _new_classifier(source: Source, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    if not has_reward_head(source, trust_remote_code=trust_remote_code):
        return classifier_from(load_language_model(source, trust_remote_code=trust_remote_code), seed=seed)
    classifier = load_classifier(source, trust_remote_code=trust_remote_code)
    reset_head(classifier, seed=seed)
    return classifier


def _settle(network: PreTrainedModel, dtype: str, device: str) -> Precision:
    """Move a model to its device and choose its arithmetic."""
    place = choose_device(device)
    network.to(place)  # pyright: ignore[reportArgumentType] (its annotation forgets devices)
    embedding = network.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        # With it, torch drops the gradient of that id's embedding, and padding may be the end-of-sequence token.
        embedding.padding_idx = None
    return choose_dtype(dtype, place)


def _adapter(
    network: PreTrainedModel, head: nn.Module | None, rank: int, alpha: float | None, seed: int
) -> PeftModel | None:
    if rank < 0:
        raise ValueError(f"--lora-rank {rank}: 0 trains all weights, a positive rank trains an adapter.")
    if not rank:
        if alpha is not None:
            raise ValueError(f"--lora-alpha {alpha} has no effect without --lora-rank.")
        return None
    return add_lora(network, head, rank=rank, alpha=alpha, seed=seed)
