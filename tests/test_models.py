"""Policies and reward models: what they compute does not depend on how rows are laid out, stored or loaded."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from trimtab import precision
from trimtab.batches import Tokens
from trimtab.bodies import predicting, run_rows
from trimtab.builtin import byte_tokenizer, tiny, tiny_policy
from trimtab.models import (
    Policy,
    ScalarModel,
    choose_device,
    choose_dtype,
    load_policy,
    load_scalar,
    make_policy,
    make_scalar,
    resolve,
    spare_token,
)
from trimtab.projection import CHUNK_ROWS, Head, divergence_from, log_distributions, logprobs_of, statistics_of
from trimtab.weights import classifier_from, load_tokenizer

PAD, END = 256, 258
FLOAT32 = {"dtype": "float32", "device": "cpu"}


def tokens_of(rows: list[list[int]], prompts: list[int], *, side: str = "right", extra: int = 0) -> Tokens:
    """Rows padded on one side, the first `prompts[i]` tokens of row i its prompt."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), PAD)
    attended, response = (
        torch.zeros(len(rows), width, dtype=torch.bool),
        torch.zeros(len(rows), width, dtype=torch.bool),
    )
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        attended[i, start : start + len(row)] = True
        response[i, start + prompt : start + len(row)] = True
    return Tokens(ids, attended, response)


def random_tokens(seed: int = 0, vocabulary: int = 256, **options) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (9, 5, 12, 7)]
    return tokens_of(rows, [4, 2, 6, 1], **options)


def literal_logprobs(network: PreTrainedModel, tokens: Tokens) -> list[list[float]]:
    """Response tokens' log-probabilities, row by row without padding, from the model's own full logits."""
    found = []
    with torch.no_grad():
        for ids, attended, response in zip(tokens.ids, tokens.attention_mask, tokens.response_mask, strict=True):
            row, wanted = ids[attended], response[attended]
            logits = network(input_ids=row[None]).logits[0].double()
            found.append([logits[t - 1].log_softmax(-1)[row[t]].item() for t in range(len(row)) if wanted[t]])
    return found


def by_row(values: Tensor, tokens: Tokens) -> list[list[float]]:
    return [row[mask].tolist() for row, mask in zip(values.detach(), tokens.response_mask, strict=True)]


def assert_close(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert torch.allclose(
        torch.tensor([x for row in found for x in row], dtype=torch.float64),
        torch.tensor([x for row in expected for x in row], dtype=torch.float64),
        atol=tolerance,
        rtol=0,
    )


@torch.no_grad()
def nudge(parameters: list[torch.nn.Parameter], size: float = 0.05) -> None:
    """Move weights a little, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


# ---- The projection


HEADS = {
    "plain": (1.0, None, False),
    "scaled": (0.25, None, False),
    "capped": (1.0, 3.0, False),
    "all": (2.0, 5.0, True),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
def test_projection_value_and_gradient_equal_a_literal_float64_version(kind: str, temperature: float) -> None:
    scale, cap, has_bias = HEADS[kind]
    torch.manual_seed(0)
    count = CHUNK_ROWS + 3
    states = torch.randn(count, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets, pull = torch.randint(11, (count,)), torch.randn(count, dtype=torch.float64)
    logits = states @ weight.T * scale if bias is None else (states @ weight.T + bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = (logits / temperature).log_softmax(-1)[torch.arange(count), targets]
    found = logprobs_of(Head(weight, bias, scale, cap).tempered(temperature), states, targets, fast=False)
    leaves = [leaf for leaf in (states, weight, bias) if leaf is not None]
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found @ pull, leaves), torch.autograd.grad(expected @ pull, leaves), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_statistics_of_a_distribution_worked_by_hand() -> None:
    """p = (1/2, 1/4, 1/4): entropy 1.5 ln 2, sum of squares 3/8."""
    head = Head(torch.tensor([[math.log(2)], [0.0], [0.0]]))
    found = statistics_of(head, torch.ones(1, 1), torch.tensor([0]), fast=False)
    assert found.logprobs.item() == pytest.approx(math.log(0.5))
    assert found.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert found.log_sum_squares.item() == pytest.approx(math.log(3 / 8))


def test_statistics_allow_impossible_tokens() -> None:
    found = statistics_of(None, torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]), fast=False)
    assert (found.logprobs.item(), found.entropy.item(), found.log_sum_squares.item()) == (0.0, 0.0, 0.0)


def test_float32_products_stay_within_float32_noise_or_bf16_factors() -> None:
    torch.manual_seed(0)
    head, states = Head(torch.randn(50, 64) / 8), torch.randn(5, 64)
    exact = torch.log_softmax(states.double() @ head.weight.double().T, -1)
    with torch.autocast("cpu", torch.bfloat16):
        careful, fast = (log_distributions(head, states, fast=choice) for choice in (False, True))
    assert careful.dtype == fast.dtype == torch.float32
    assert (careful - exact).abs().max() < 1e-5
    assert (fast - exact).abs().max() < 2e-2
    assert torch.equal(log_distributions(head, states, fast=False), careful), "the fast mode must not outlive its call"


# ---- Log-probabilities


def config_of(family: str, **more) -> transformers.PreTrainedConfig:
    common = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    special: dict[str, dict] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
        "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
        "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
        "mistral": {"sliding_window": 4},
    }
    dropped = {"gpt2": ("head_dim",), "opt": ("head_dim", "intermediate_size", "num_key_value_heads")}
    kept = {key: value for key, value in common.items() if key not in dropped.get(family, ())}
    return transformers.AutoConfig.for_model(family, **{**kept, **special.get(family, {}), **more})


def network_of(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)


FAMILIES = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "opt", "olmo2"),
    *("cohere", "granite"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_their_own_full_forward(family: str) -> None:
    policy = make_policy(network_of(family), byte_tokenizer(), **FLOAT32)
    assert policy.module.projects, "the head of this family must be known"
    for side in ("right", "left"):
        tokens = random_tokens(side=side, extra=2)
        assert_close(by_row(policy.logprobs(tokens), tokens), literal_logprobs(policy.model, tokens))


# Families that the grid of `test_layout_grid.py` leaves out.
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "phi", "opt", "olmo2", "cohere", "granite"])
def test_layouts_change_nothing(family: str) -> None:
    policy = make_policy(network_of(family), byte_tokenizer(), **FLOAT32)
    shared = [5, 6, 7, 8, 9, 10]
    tokens = tokens_of([[*shared, 1, 2, END], [*shared, 3, END], [7, 1, END], [7, 4, 5, END]], [6, 6, 1, 1], extra=1)
    expected = policy.logprobs(tokens)
    for options in ({"share": True}, {"capacity": 16}, {"share": True, "capacity": 32}):
        policy.body.use_layout(**options)
        assert torch.allclose(policy.logprobs(tokens), expected, atol=1e-5)


def test_layout_is_refused_where_positions_cannot_be_given() -> None:
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    policy = make_policy(transformers.BloomForCausalLM(config), byte_tokenizer(), **FLOAT32)
    with pytest.raises(ValueError, match="BloomForCausalLM cannot run several rows in one sequence"):
        policy.body.use_layout(capacity=64)
    tokens = random_tokens(extra=2)
    assert_close(by_row(policy.logprobs(tokens), tokens), literal_logprobs(policy.model, tokens))


def test_unknown_head_falls_back_to_all_logits_and_says_so() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            outputs = super().forward(*arguments, **options)
            outputs.logits = outputs.logits * 2
            return outputs

    network, tokenizer = tiny()
    network.__class__ = Doubled
    with pytest.warns(UserWarning, match="every step computes all logits"):
        policy = make_policy(network, tokenizer, **FLOAT32)
    tokens = random_tokens()
    assert_close(by_row(policy.logprobs(tokens), tokens), literal_logprobs(network, tokens))
    assert policy.statistics(tokens).entropy.sum() > 0


def test_the_shift_happens_once_and_zero_is_outside_the_responses() -> None:
    tokens = tokens_of([[1, 2, 3, 4], [5, 6]], [2, 1])
    rows, columns = predicting(tokens)
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1], [1, 2, 0])
    logprobs = tiny_policy().logprobs(tokens)
    assert logprobs.shape == (2, 4)
    assert ((logprobs != 0) == tokens.response_mask).all()


def test_padding_order_and_neighbours_do_not_matter() -> None:
    policy = tiny_policy()
    reference = by_row(policy.logprobs(random_tokens()), random_tokens())
    for options in ({"side": "left"}, {"extra": 5}, {"side": "left", "extra": 5}):
        tokens = random_tokens(**options)
        assert_close(by_row(policy.logprobs(tokens), tokens), reference)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = random_tokens().select(order)
    assert_close(by_row(policy.logprobs(shuffled), shuffled), [reference[i] for i in order])
    alone = [random_tokens().select(torch.tensor([i])) for i in range(4)]
    assert_close([by_row(policy.logprobs(row), row)[0] for row in alone], reference)


def test_rows_without_a_response_score_zero_and_keep_a_graph() -> None:
    policy = tiny_policy()
    logprobs = policy.logprobs(tokens_of([[1, 2, 3]], [3]))
    assert logprobs.tolist() == [[0.0, 0.0, 0.0]]
    logprobs.sum().backward()


def test_left_padding_keeps_gradients_finite() -> None:
    policy = tiny_policy()
    policy.logprobs(random_tokens(side="left", extra=3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.trainable_parameters())


def test_an_end_token_that_is_also_padding_is_learned_from() -> None:
    """With `padding_idx` torch would drop this gradient."""
    network, tokenizer = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.config.pad_token_id = END
        network = type(network)(network.config)
    policy = make_policy(network, tokenizer, **FLOAT32)
    policy.logprobs(tokens_of([[1, END, 2, 3]], [2])).sum().backward()
    gradient = policy.model.get_input_embeddings().weight.grad
    assert gradient[END].abs().sum() > 0
    assert gradient[PAD].abs().sum() == 0, "an id that does not occur"


def test_bf16_is_close_to_float32_and_float32_after_the_body() -> None:
    tokens = random_tokens()
    exact, rounded = (make_policy(*tiny(), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    found = rounded.logprobs(tokens)
    assert found.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in rounded.trainable_parameters())
    difference = (found - exact.logprobs(tokens)).abs().max()
    assert 1e-5 < difference < 0.1


def test_statistics_equal_the_full_distributions() -> None:
    policy, tokens = tiny_policy(), random_tokens()
    found = policy.statistics(tokens)
    whole = policy.log_distributions(policy.states(tokens)).double().detach()
    at = tokens.response_mask
    assert torch.allclose(found.logprobs, policy.logprobs(tokens), atol=1e-6)
    assert torch.allclose(found.entropy[at].double(), -(whole.exp() * whole).sum(-1), atol=1e-5)
    assert torch.allclose(found.log_sum_squares[at].double(), whole.exp().square().sum(-1).log(), atol=1e-5)
    assert found.logprobs.requires_grad
    assert not found.entropy.requires_grad
    assert (found.entropy[~at] == 0).all()


# ---- Temperature


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("projects", [True, False])
def test_log_probabilities_at_a_temperature_are_of_logits_divided_by_it(lora_rank: int, projects: bool) -> None:
    policy, tokens = tiny_policy(lora_rank=lora_rank), random_tokens()
    plain = policy.logprobs(tokens).detach()
    policy.module.projects = projects
    nudge(policy.trainable_parameters())
    policy.module.temperature = 0.6
    found, reference = policy.logprobs(tokens), policy.reference()
    whole = policy.log_distributions(policy.states(tokens)).detach()
    logits = run_rows(policy.model, tokens).logits[predicting(tokens)].double() / 0.6
    torch.testing.assert_close(whole.double(), logits.log_softmax(-1), atol=1e-5, rtol=0)
    picked = logits.log_softmax(-1).gather(1, tokens.ids[tokens.response_mask][:, None])[:, 0]
    torch.testing.assert_close(found[tokens.response_mask].double(), picked, atol=1e-5, rtol=0)
    assert policy.statistics(tokens).logprobs[tokens.response_mask].tolist() == pytest.approx(picked.tolist(), abs=1e-5)
    start = reference.logprobs(tokens)
    if lora_rank:  # the base, at the same temperature
        assert not torch.allclose(start, plain, atol=0.1) and not torch.allclose(start, found, atol=0.1)
    else:
        torch.testing.assert_close(start, found, atol=1e-5, rtol=0)
        assert policy.kl(tokens, reference).abs().max() < 1e-6


# ---- References


def save_adapter(policy: Policy, folder: Path) -> None:
    """An adapter alone, in peft's form."""
    assert policy.adapter is not None
    policy.adapter.save_pretrained(str(folder))


def policies(tmp_path: Path) -> dict[str, Policy]:
    """One policy for every way of loading."""
    base, sft = tmp_path / "base", tmp_path / "sft"
    tiny_policy().save(base)
    trained = load_policy(base, lora_rank=2, **FLOAT32)
    nudge(trained.trainable_parameters())
    trained.save(tmp_path / "merged")
    save_adapter(trained, sft)
    return {
        "full": load_policy(base, **FLOAT32),
        "lora": load_policy(base, lora_rank=4, **FLOAT32),
        "lora on an sft adapter": load_policy(sft, lora_rank=4, **FLOAT32),
        "full on an sft adapter": load_policy(sft, **FLOAT32),
        "merged": load_policy(tmp_path / "merged", **FLOAT32),
        "lora in bf16": load_policy(sft, lora_rank=4, dtype="bfloat16", device="cpu"),
    }


def test_kl_to_the_reference_is_zero_at_the_start_and_not_later(tmp_path: Path) -> None:
    tokens = random_tokens()
    for name, policy in policies(tmp_path).items():
        reference = policy.reference()
        before = reference.logprobs(tokens)
        assert not before.requires_grad, name
        assert policy.kl(tokens, reference).abs().max() == 0, name
        assert torch.equal(before, policy.logprobs(tokens)), name
        nudge(policy.trainable_parameters())
        assert torch.equal(reference.logprobs(tokens), before), name
        kl = policy.kl(tokens, reference)
        assert kl[tokens.response_mask].min() > 0, name
        assert (kl[~tokens.response_mask] == 0).all(), name
        assert policy.logprobs(tokens).requires_grad, name


def test_without_lora_all_weights_train_and_with_it_only_the_adapter(tmp_path: Path) -> None:
    for name, policy in policies(tmp_path).items():
        adapted = "lora" in name
        assert all(
            p.requires_grad == ((adapted and ".lora_" in n) or not adapted) for n, p in policy.model.named_parameters()
        )
        assert bool(policy.adapter) == adapted, name


def test_every_way_of_loading_an_sft_adapter_gives_the_same_policy(tmp_path: Path) -> None:
    tokens, loaded = random_tokens(), policies(tmp_path)
    merged = loaded["merged"].logprobs(tokens)
    assert (merged - loaded["full"].logprobs(tokens)).abs().max() > 1e-2
    for name in ("lora on an sft adapter", "full on an sft adapter"):
        assert torch.allclose(loaded[name].logprobs(tokens), merged, atol=1e-5), name


def test_one_pass_gives_logprobs_entropy_and_kl() -> None:
    policy, tokens = tiny_policy(lora_rank=2), random_tokens()
    nudge(policy.trainable_parameters())
    reference = policy.reference()
    expected, statistics, kl = policy.logprobs(tokens), policy.statistics(tokens), policy.kl(tokens, reference)
    runs = []
    policy.body.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = policy.compare(tokens, reference)
    assert sorted(runs) == [False, True], "the reference without gradient, the policy with it"
    assert torch.equal(found.logprobs, expected)
    assert torch.equal(found.entropy, statistics.entropy)
    assert torch.equal(found.kl, kl) and kl.max() > 0
    assert not found.kl.requires_grad and not found.entropy.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(found.logprobs.sum(), policy.trainable_parameters()),
        torch.autograd.grad(expected.sum(), policy.trainable_parameters()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


class MostDistributions(TorchDispatchMode):
    """Remembers the most rows of a tensor over the vocabulary that was made in its context."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor) and value.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, value.shape[0])
        return made


def test_no_more_than_a_chunk_of_distributions_exists_at_a_time() -> None:
    policy, other = tiny_policy(), tiny_policy(seed=1).frozen()
    rows = torch.randint(256, (4, 200), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = tokens_of(rows, [2] * 4)
    assert tokens.response_mask.sum() > 3 * CHUNK_ROWS
    with MostDistributions(259) as most:
        policy.compare(tokens, other).logprobs.sum().backward()
    assert most.rows == CHUNK_ROWS


def test_kl_allows_impossible_tokens() -> None:
    """p = (1, 0) against q = (1/2, 1/2) and against itself; q = (0, 1) rules out what p does."""
    p = torch.tensor([[0.0, -torch.inf]] * 3)
    q = torch.tensor([[math.log(0.5)] * 2, [0.0, -torch.inf], [-torch.inf, 0.0]])
    assert divergence_from(lambda rows: q[rows])(p, slice(0, 3)).tolist() == pytest.approx([math.log(2), 0, math.inf])
    tiny = torch.tensor([[0.0, -200.0]])  # whose second probability is 0 as a number
    assert divergence_from(lambda rows: q[1:2])(tiny, slice(0, 1)).item() == 0


def test_kl_equals_its_definition() -> None:
    policy, tokens = tiny_policy(), random_tokens()
    other = tiny_policy(seed=1).frozen()
    p, q = (model.log_distributions(model.states(tokens)).double() for model in (policy, other))
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(policy.kl(tokens, other)[tokens.response_mask].double(), expected, atol=1e-5)


def test_a_frozen_copy_keeps_the_adapter_on(tmp_path: Path) -> None:
    policy, tokens = tiny_policy(lora_rank=2), random_tokens()
    nudge(policy.trainable_parameters())
    frozen, before = policy.frozen(), policy.logprobs(tokens)
    nudge(policy.trainable_parameters())
    assert torch.equal(frozen.logprobs(tokens), before)
    assert not torch.allclose(policy.reference().logprobs(tokens), before)


# ---- Saving


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("rank", [0, 2])
def test_saved_policies_load_everywhere_and_training_goes_on(tmp_path: Path, family: str, rank: int) -> None:
    policy, tokens = make_policy(network_of(family), byte_tokenizer(), lora_rank=rank, **FLOAT32), random_tokens()
    nudge(policy.trainable_parameters())
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    policy.save(tmp_path / "model")
    policy.save(tmp_path / "model")
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    expected = policy.logprobs(tokens)
    loaded = load_policy(tmp_path / "model", **FLOAT32)
    assert torch.allclose(loaded.logprobs(tokens), expected, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_close(literal_logprobs(plain, tokens), by_row(expected, tokens))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == policy.tokenizer.chat_template
    assert (tmp_path / "model" / "generation_config.json").exists()


def test_a_policy_on_top_of_an_adapter_is_saved_whole(tmp_path: Path) -> None:
    tokens = random_tokens()
    for name, policy in policies(tmp_path).items():
        nudge(policy.trainable_parameters())
        policy.save(tmp_path / "out" / name)
        loaded = load_policy(tmp_path / "out" / name, dtype="bfloat16" if "bf16" in name else "float32", device="cpu")
        tolerance = 0.1 if "bf16" in name else 1e-5
        assert torch.allclose(loaded.logprobs(tokens), policy.logprobs(tokens), atol=tolerance), name


def test_weights_are_saved_in_the_type_asked_for(tmp_path: Path) -> None:
    policy = tiny_policy(lora_rank=2)
    policy.save(tmp_path / "float32")
    policy.save(tmp_path / "bfloat16", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
        assert json.loads((folder / "config.json").read_text())["dtype"] == folder.name
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_lora_leaves_the_head_and_the_base_alone() -> None:
    policy = tiny_policy(lora_rank=3)
    names = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_" in name and "lm_head" not in name for name in names)
    assert len(names) == 2 * 7 * 2, "two factors for seven linear layers in each of two blocks"
    layer = policy.model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 2.0  # alpha / rank, alpha being twice the rank


def test_only_a_model_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other things than a model"):
        tiny_policy().save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


# ---- Reward models


def scorer(rank: int = 0, seed: int = 0, family: str = "llama") -> ScalarModel:
    classifier = classifier_from(network_of(family), seed=seed)
    model = make_scalar(classifier, byte_tokenizer(), lora_rank=rank, **FLOAT32)
    nudge(model.trainable_parameters())
    return model


def reward_rows() -> list[list[int]]:
    return [[1, 2, 3, END], [4, END, 5, 6, 7, END], [8, END]]


@pytest.mark.parametrize(
    ("family", "rank"), [("llama", 0), ("llama", 2), ("gpt2", 0), ("gpt2", 2), ("qwen3", 0), ("opt", 0)]
)
def test_scores_survive_reload_padding_and_neighbours(tmp_path: Path, family: str, rank: int) -> None:
    model = scorer(rank, family=family)
    model.scale_by(3.0)
    rows, prompts = reward_rows(), [1, 1, 1]
    expected = model.scores(tokens_of(rows, prompts)).detach()
    assert expected.std() > 1e-2
    model.save(tmp_path / "model")
    loaded = load_scalar(tmp_path / "model", new_head=False, **FLOAT32)
    for scored in (model, loaded):
        for options in ({}, {"side": "left"}, {"extra": 4}, {"side": "left", "extra": 4}):
            assert torch.allclose(scored.scores(tokens_of(rows, prompts, **options)), expected, atol=1e-5)
        alone = torch.cat([scored.scores(tokens_of([row], [1])) for row in rows])
        assert torch.allclose(alone, expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokens = tokens_of(rows, prompts, extra=2)
    found = plain(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).logits[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == plain.config.pad_token_id == PAD


def test_padding_that_is_the_end_token_is_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_scalar(classifier_from(network_of("llama"), seed=0), tokenizer, **FLOAT32)
    nudge(model.trainable_parameters())
    assert model.pad_id == PAD
    tokens = tokens_of(reward_rows(), [1, 1, 1])
    expected = model.scores(tokens)
    ends = Tokens(torch.where(tokens.attention_mask, tokens.ids, END), tokens.attention_mask, tokens.response_mask)
    assert torch.allclose(model.scores(ends), expected, atol=1e-6)
    model.save(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[*row, *[loaded.pad_token_id] * (6 - len(row))] for row in reward_rows()])
    found = plain(input_ids=ids, attention_mask=tokens.attention_mask.long()).logits[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_tokenizer_without_a_spare_token_keeps_its_padding_and_says_so(tmp_path: Path) -> None:
    vocabulary = Tokenizer(tokenizer_models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<|endoftext|>")
    assert spare_token(tokenizer) is None
    model = make_scalar(classifier_from(network_of("llama"), seed=0), tokenizer, **FLOAT32)
    assert model.pad_id == tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="without its last token"):
        model.save(tmp_path / "model")


def test_a_family_without_known_scores_is_refused() -> None:
    class Shifted(transformers.LlamaForSequenceClassification):
        def forward(self, *arguments, **options):
            outputs = super().forward(*arguments, **options)
            outputs.logits = outputs.logits + 1
            return outputs

    classifier = classifier_from(network_of("llama"), seed=0)
    classifier.__class__ = Shifted
    with pytest.raises(ValueError, match="Shifted computes its scores in a way"):
        make_scalar(classifier, byte_tokenizer(), **FLOAT32)


def test_values_are_given_at_every_real_token_and_end_in_the_score() -> None:
    model = scorer()
    tokens = tokens_of(reward_rows(), [1, 1, 1], extra=2)
    values = model.values(tokens)
    assert (values[~tokens.attention_mask] == 0).all()
    assert torch.equal(values[torch.arange(3), torch.tensor([3, 5, 1])], model.scores(tokens))
    prefix = tokens_of([[4, END, 5]], [1])
    assert torch.allclose(model.scores(prefix)[0], values[1, 2], atol=1e-5)


def test_new_heads_start_near_zero_and_follow_the_seed(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path / "base")
    tokens = random_tokens()
    first, again, other = (load_scalar(tmp_path / "base", new_head=True, seed=s, **FLOAT32) for s in (0, 0, 1))
    assert first.scores(tokens).abs().max() < 0.5
    assert torch.equal(first.scores(tokens), again.scores(tokens))
    assert not torch.allclose(first.scores(tokens), other.scores(tokens))
    trained = scorer()
    trained.save(tmp_path / "reward")
    fresh = load_scalar(tmp_path / "reward", new_head=True, **FLOAT32)
    assert not torch.allclose(fresh.scores(tokens), trained.scores(tokens))


def test_scale_by_is_linear_and_saved(tmp_path: Path) -> None:
    model, tokens = scorer(), random_tokens()
    before = model.scores(tokens).detach()
    model.scale_by(-0.5)
    assert torch.allclose(model.scores(tokens), -0.5 * before, atol=1e-6)


def test_reward_lora_trains_the_head_as_well() -> None:
    names = [name for name, parameter in scorer(rank=2).model.named_parameters() if parameter.requires_grad]
    assert "score.weight" in names
    assert all(".lora_" in name or name == "score.weight" for name in names)


def test_a_model_without_a_reward_head_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no reward head\. Train one with `trimtab reward"):
        load_scalar(tmp_path / "base", new_head=False)


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    scorer().save(tmp_path / "reward")
    with pytest.raises(ValueError, match="is a reward model; a language model is needed"):
        load_policy(tmp_path / "reward")


def test_classifiers_of_several_labels_are_refused(tmp_path: Path) -> None:
    scorer().save(tmp_path / "reward")
    config = tmp_path / "reward" / "config.json"
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **labels}))
    with pytest.raises(ValueError, match="classifies into 2 labels"):
        load_scalar(tmp_path / "reward", new_head=False)


def test_a_checkpoint_whose_head_is_missing_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    scorer().save(tmp_path / "reward")
    weights = tmp_path / "reward" / "model.safetensors"
    state = {key: value for key, value in load_file(weights).items() if key != "score.weight"}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of LlamaForSequenceClassification: score\.weight"):
        load_scalar(tmp_path / "reward", new_head=False)


def test_an_adapter_of_a_classifier_in_the_ecosystems_form_is_loaded(tmp_path: Path) -> None:
    """Adapter and head on a language model, as peft's SEQ_CLS saves them."""
    from peft import LoraConfig, get_peft_model

    base = tiny_policy()
    base.save(tmp_path / "base")
    classifier = classifier_from(load_policy(tmp_path / "base", **FLOAT32).model, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(classifier, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    nudge([parameter for parameter in adapted.parameters() if parameter.requires_grad])
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = tokens_of(reward_rows(), [1, 1, 1])
    expected = adapted(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).logits[:, 0]
    found = load_scalar(tmp_path / "adapter", new_head=False, **FLOAT32).scores(tokens)
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="is a reward model"):
        load_policy(tmp_path / "adapter")


# ---- What a name means


def test_names_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    for source in (tmp_path / "nowhere", "./nowhere", "~/nowhere-at-all", "a/b/c", f"{tmp_path}/nowhere"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            resolve(source)
    with pytest.raises(FileNotFoundError, match="no final model yet"):
        resolve(tmp_path / "run")
    with pytest.raises(ValueError, match="is a file"):
        resolve(str(tmp_path / "file.txt"))
    with pytest.raises(ValueError, match="holds no model"):
        resolve(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        resolve("no such model!")


def test_names_that_mean_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_policy().save(run / "model")
    (run / "config.yaml").write_text("")
    assert resolve(str(run)) == run / "model"
    assert resolve(str(run / "model")) == run / "model"
    assert resolve("organisation/model") == "organisation/model"


def test_a_hub_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"organisation/no-such-model could not be loaded.*hub reachable"):
        load_policy("organisation/no-such-model")


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, and loading these can run code"):
        load_policy(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="there are none"):
        load_policy(tmp_path / "model")


def test_adapters_in_other_formats_or_without_a_base_are_refused(tmp_path: Path) -> None:
    save_adapter(tiny_policy(lora_rank=2), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({**entries, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it adapts"):
        load_policy(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only adapter_model\.bin, and loading"):
        load_policy(tmp_path / "adapter")


def test_remote_code_needs_the_flag(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    entries = {**json.loads(config.read_text()), "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    config.write_text(json.dumps(entries))
    (tmp_path / "model" / "own.py").write_text("raise SystemError('this must not run')")
    with pytest.raises(ValueError, match=r"its own Python code.*--trust-remote-code"):
        load_policy(tmp_path / "model")


def test_lora_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="--lora-alpha 8 has no effect"):
        tiny_policy(lora_alpha=8)
    with pytest.raises(ValueError, match="--lora-rank -1"):
        tiny_policy(lora_rank=-1)


def test_tokenizer_of_an_adapter_is_its_bases(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save(tmp_path / "base")
    save_adapter(load_policy(tmp_path / "base", lora_rank=2, **FLOAT32), tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").chat_template == policy.tokenizer.chat_template


# ---- Arithmetic


def test_choose_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu).autocast is None
    assert choose_dtype("bfloat16", cpu).autocast is torch.bfloat16
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert choose_dtype("auto", cpu).autocast is torch.bfloat16
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert choose_dtype("auto", cpu).autocast is None
    with pytest.raises(ValueError, match="--dtype float16: allowed are auto, float32, bfloat16"):
        choose_dtype("float16", cpu)


def test_bf16_is_found_in_the_kernels_list_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for flags, expected in (({"sse2", "avx512_bf16"}, True), ({"sse2", "avx512f"}, False)):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: flags)
        assert precision.has_bf16(torch.device("cpu")) is expected


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device gpu: allowed are auto, cpu"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="CUDA devices"):
        choose_device("cuda:99")
