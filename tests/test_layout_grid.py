"""Every objective gives the loss and the gradient that it has row by row, however its rows and its reference are run.

Expected: each row alone, without padding, through the plain transformer, in one piece and one backward pass. Found: a
step of `Learner` in micro-batches, with rows as they are, prompts shared, or packed, and with a reference that is
computed live or stored. All in float32; a gradient's error is its largest one over all weights, in units of the
largest entry of the expected gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.test_models import FLOAT32, config_of, nudge
from trimtab.batches import Referenced, Tokens
from trimtab.builtin import byte_tokenizer
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.models import FrozenPolicy, Policy, ScalarModel, make_policy, make_scalar
from trimtab.objectives import (
    DemonstrationObjective,
    FeedbackObjective,
    PreferenceObjective,
    RankingObjective,
    RewardObjective,
    TokenOutputs,
)
from trimtab.projection import TokenStatistics
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking
from trimtab.references import LiveReference, store
from trimtab.tokens import Encoded, Row, demonstration_batch, feedback_batch, pair_batch, ranking_batch
from trimtab.weights import classifier_from

TOLERANCE = 1e-5
SHARING = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox")
FALLING_BACK = ("bloom", "recurrent_gemma")
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"share": False},
    "shared": {"share": True},
    "packed": {"share": False, "capacity": 60},
    "shared and packed": {"share": True, "capacity": 60},
}
PROMPT = Prompt.from_user("not read: the tests tokenize by hand")


# ---- Models


@cache
def config_for(family: str) -> transformers.PreTrainedConfig:
    if family == "bloom":
        return transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    more: dict[str, Any] = {}
    if family == "gemma3_text":  # prompts are longer than the window of 4
        more = {"layer_types": ["sliding_attention", "full_attention"]}
    if family == "recurrent_gemma":
        more = {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8}
    return config_of(family, **more)


def network_for(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_for(family), dtype=torch.float32)


def policy_for(family: str, *, lora_rank: int = 0) -> tuple[Policy, FrozenPolicy]:
    """A policy that has moved away from its reference."""
    policy = make_policy(network_for(family), byte_tokenizer(), lora_rank=lora_rank, **FLOAT32)
    reference = policy.reference()
    nudge(policy.trainable_parameters(), size=0.01)
    return policy, reference


def reward_model_for(family: str) -> ScalarModel:
    return make_scalar(classifier_from(network_for(family), seed=0), byte_tokenizer(), **FLOAT32)


@dataclass(frozen=True)
class OneByOne:
    """A model that runs each row alone, without padding and layout."""

    model: Any

    def _each(self, tokens: Tokens, call: Callable[[Tokens], Tensor]) -> Tensor:
        values = []
        for row in range(len(tokens)):
            alone = tokens.select(torch.tensor([row]))
            padding = tokens.ids.shape[1] - alone.ids.shape[1]
            values.append(torch.nn.functional.pad(call(alone)[0], (0, padding)))
        return torch.stack(values)

    def logprobs(self, tokens: Tokens) -> Tensor:
        return self._each(tokens, self.model.logprobs)

    def statistics(self, tokens: Tokens) -> TokenStatistics:
        names = ("logprobs", "log_sum_squares", "entropy")
        return TokenStatistics(
            *(self._each(tokens, lambda row, name=name: getattr(self.model.statistics(row), name)) for name in names)
        )

    def scores(self, tokens: Tokens) -> Tensor:
        return torch.cat([self.model.scores(tokens.select(torch.tensor([row]))) for row in range(len(tokens))])


# ---- Rows


def rows_of(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[Row, ...]:
    marks = [False] * len(prompt)
    return tuple(Row([*prompt, *answer], marks + [True] * len(answer)) for answer in answers)


def ids(length: int, start: int) -> list[int]:
    """Ids that differ from their neighbours', none of them special."""
    return [(start * 37 + 11 * i) % 250 for i in range(length)]


PROMPTS = [ids(length, start) for start, length in enumerate((13, 13, 6, 9, 17, 4))]
ANSWERS = [ids(length, start) for start, length in enumerate((5, 2, 7, 3, 1, 6, 4, 8, 2, 5, 3, 9), start=20)]


def pair_items() -> list[Encoded]:
    records = [Preference(PROMPT, "x", "y", weight=0.5 + i, confidence=1 - 0.1 * i) for i in range(6)]
    return [
        Encoded(record, rows_of(PROMPTS[i], ANSWERS[2 * i : 2 * i + 2]), len(PROMPTS[i]))
        for i, record in enumerate(records)
    ]


def ranking_items() -> list[Encoded]:
    answers = [ANSWERS[:3], ANSWERS[3:5], ANSWERS[5:9], ANSWERS[9:]]
    return [
        Encoded(Ranking(PROMPT, ("x",) * len(some)), rows_of(PROMPTS[i], some), len(PROMPTS[i]))
        for i, some in enumerate(answers)
    ]


def feedback_items() -> list[Encoded]:
    """Answers and mismatched answers, and two neighbours with one prompt."""
    prompts = [PROMPTS[0], *PROMPTS[:5]]
    return [
        Encoded(Feedback(PROMPT, "x", i % 2 == 0), rows_of(prompt, ANSWERS[2 * i : 2 * i + 2]), len(prompt))
        for i, prompt in enumerate(prompts)
    ]


def demonstration_items() -> list[Encoded]:
    prompts = [PROMPTS[0], PROMPTS[0], *PROMPTS]
    return [
        Encoded(Demonstration(PROMPT, "x", weight=1 + i), rows_of(prompt, ANSWERS[i : i + 1]), len(prompt))
        for i, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class Case:
    """An objective, its items, how they become a batch, and whether a reference is read."""

    objective: Any
    items: list[Encoded]
    collate: Callable[..., Any]
    referenced: bool = False
    scores: bool = False


def preference_case(name: str) -> Case:
    objective = PreferenceObjective(combine(ALL_LOSSES, name))
    return Case(objective, pair_items(), pair_batch, referenced=objective.reads_reference)


def feedback_case(name: str) -> Case:
    return Case(FeedbackObjective(combine(UNPAIRED_LOSSES, name)), feedback_items(), feedback_batch, referenced=True)


CASES: dict[str, Callable[[], Case]] = {
    "sft": lambda: Case(DemonstrationObjective(), demonstration_items(), demonstration_batch),
    "reward": lambda: Case(
        RewardObjective(combine(REWARD_LOSSES, "bradley_terry")), pair_items(), pair_batch, scores=True
    ),
    "ranking": lambda: Case(
        RankingObjective(combine(RANKING_LOSSES, "plackett_luce")), ranking_items(), ranking_batch, scores=True
    ),
    **{name: lambda name=name: preference_case(name) for name in ("dpo", "aot", "ld_dpo", "wpo", "orpo")},
    **{name: lambda name=name: feedback_case(name) for name in ("kto", "bco")},
}


# ---- The two ways


def gradient_of(model: Any) -> Tensor:
    """All gradients in one vector, and none left behind."""
    parameters = model.trainable_parameters()
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def expected_step(model: Any, case: Case, batch: Any) -> tuple[float, Tensor]:
    model.body.use_layout(share=False)
    loss, _ = case.objective.loss(case.objective.outputs(OneByOne(model), batch), batch)
    (loss.total / loss.count).backward()
    return loss.item(), gradient_of(model)


def found_step(model: Any, case: Case, batch: Any, rows: int) -> tuple[float, Tensor]:
    optimizer = make_optimizer(model.trainable_parameters(), lr=0.0, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    learner = Learner(model, case.objective, optimizer, schedule, micro_batch_rows=rows, max_grad_norm=0)
    return learner.step(batch)["loss"], gradient_of(model)


def batches(case: Case, pad_id: int, reference: FrozenPolicy | None) -> Iterator[tuple[str, Any]]:
    """The batch with its reference from each of two sources; where none is read, the same twice."""
    batch = case.collate(case.items, pad_id)
    everything = range(len(case.items))
    if reference is None or not case.referenced:
        attached = isinstance(case.objective, PreferenceObjective | FeedbackObjective)
        plain = Referenced(batch, torch.zeros(batch.tokens.ids.shape)) if attached else batch
        yield from [("no reference", plain)] * 2
        return
    yield "live", LiveReference(reference, 5).attach(batch, everything)
    yield "stored", store(reference, case.items, pad_id=pad_id, max_rows=4).attach(batch, everything)


def expected_batch(case: Case, pad_id: int, reference: FrozenPolicy | None) -> Any:
    """The batch with its reference computed row by row."""
    if reference is None or not case.referenced:
        return next(batches(case, pad_id, None))[1]
    reference.policy.body.use_layout(share=False)
    batch = case.collate(case.items, pad_id)
    return Referenced(batch, OneByOne(reference).logprobs(batch.tokens))


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor], name: str) -> None:
    error = (found[1] - expected[1]).abs().max() / expected[1].abs().max()
    assert abs(found[0] - expected[0]) < TOLERANCE * max(1, abs(expected[0])), name
    assert error < TOLERANCE, f"{name}: {error:.1e}"


def check(model: Any, reference: FrozenPolicy | None, case: Case, layouts: Sequence[str]) -> None:
    expected = expected_step(model, case, expected_batch(case, model.pad_id, reference))
    assert expected[1].abs().max() > 1e-5
    tokens = case.collate(case.items, model.pad_id).tokens
    for layout in layouts:
        for body in (model.body, *([reference.policy.body] if reference else [])):
            body.use_layout(**LAYOUTS[layout])
            assert (body.layout(tokens) is None) == (layout == "rows")
        for rows, (source, batch) in zip((6, 100), batches(case, model.pad_id, reference), strict=True):
            assert_same(found_step(model, case, batch, rows), expected, f"{layout}, {source}, {rows} rows")


def model_and_reference(family: str, case: Case, **options: Any) -> tuple[Any, FrozenPolicy | None]:
    return (reward_model_for(family), None) if case.scores else policy_for(family, **options)


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_do_not_depend_on_the_layout(name: str, family: str) -> None:
    case = CASES[name]()
    check(
        *model_and_reference(family, case), case, list(LAYOUTS) if family == "llama" else ["rows", "shared", "packed"]
    )


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_the_same_with_an_adapter_whose_reference_is_the_model_without_it(name: str) -> None:
    case = CASES[name]()
    check(*model_and_reference("llama", case, lora_rank=2), case, ["rows", "shared"])


@pytest.mark.filterwarnings("ignore:RecurrentGemmaForCausalLM. its head is not known here:UserWarning")
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FALLING_BACK for name in CASES])
def test_families_that_cannot_share_fall_back_to_rows(family: str, name: str) -> None:
    case = CASES[name]()
    if case.scores and family == "recurrent_gemma":
        pytest.skip("transformers has no classifier of this family")
    model, reference = model_and_reference(family, case)
    assert model.body.arrangement is None
    for options in (LAYOUTS["shared"], LAYOUTS["packed"]):
        with pytest.raises(ValueError, match="cannot run several rows in one sequence"):
            model.body.use_layout(**options)
    check(model, reference, case, ["rows"])


# ---- No option is without effect


@dataclass
class Shapes:
    """What a transformer was run on: the shape of each call's ids."""

    calls: list[tuple[int, ...]]


def watch(network: PreTrainedModel) -> Shapes:
    seen = Shapes([])

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.calls.append(tuple(options["input_ids"].shape))

    network.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("scores", [False, True])
def test_each_layout_runs_other_sequences(scores: bool) -> None:
    """Twelve rows of at most 22 tokens; 62 tokens of prompts and 55 of answers in six groups; at most 60 a sequence."""
    case = CASES["reward" if scores else "dpo"]()
    model, _ = model_and_reference("llama", case)
    tokens = case.collate(case.items, model.pad_id).tokens
    seen = watch(model.model)
    shapes = {}
    for name, options in {**LAYOUTS, "packed tightly": {"share": False, "capacity": 24}}.items():
        model.body.use_layout(**options)
        seen.calls.clear()  # it may try an attention on a few tokens
        model.scores(tokens) if scores else model.logprobs(tokens)
        shapes[name] = seen.calls.pop()
        assert not seen.calls, "one call for all rows"
    assert shapes["rows"] == (12, 22)
    assert shapes["shared"][0] * shapes["shared"][1] < 12 * 22 * 0.6
    assert shapes["packed"][1] > 22
    assert 117 <= shapes["shared and packed"][0] * shapes["shared and packed"][1] < 1.3 * 117
    assert shapes["packed tightly"][1] <= 24 < shapes["packed"][1] <= 60


def test_answers_of_one_ranking_run_their_prompt_once() -> None:
    case = CASES["ranking"]()
    model = reward_model_for("gpt2")
    model.body.use_layout(share=True)
    seen = watch(model.model)
    model.scores(case.collate(case.items, model.pad_id).tokens)
    assert sum(s * length for s, length in seen.calls) < sum(len(row.ids) for item in case.items for row in item.rows)


def test_entropies_come_through_layouts_as_well() -> None:
    policy, _ = policy_for("qwen3")
    case = CASES["wpo"]()
    tokens = case.collate(case.items, policy.pad_id).tokens
    policy.body.use_layout(share=False)
    expected = OneByOne(policy).statistics(tokens)
    for options in LAYOUTS.values():
        policy.body.use_layout(**options)
        found = policy.statistics(tokens)
        assert torch.allclose(found.entropy, expected.entropy, atol=1e-5)
        assert torch.allclose(found.log_sum_squares, expected.log_sum_squares, atol=1e-5)


def test_the_loss_would_notice_a_wrong_row() -> None:
    """The grid's own check: rows that are exchanged in a pair are not within the tolerance."""
    case = CASES["dpo"]()
    policy, reference = policy_for("llama")
    batch = expected_batch(case, policy.pad_id, reference)
    expected = expected_step(policy, case, batch)
    outputs = TokenOutputs(batch.logprobs.roll(1, dims=0))
    with pytest.raises(AssertionError):
        assert_same(found_step(policy, case, Referenced(batch.batch, outputs.logprobs), 100), expected, "wrong")
