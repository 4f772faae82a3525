"""The real sets of `shared/data`, read in place: each loads as it is, as the kinds that it is made for."""

from pathlib import Path

import pytest

from trimtab import data
from trimtab.data.checks import facts
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking, Record

SHARED = Path(__file__).parents[2] / "../shared/data"
ALL: list[type[Record]] = [Prompt, Demonstration, Preference, Ranking, Feedback]
FILES: dict[str, tuple[int, list[type[Record]]]] = {
    "hh_helpful_train": (4106, ALL),
    "hh_helpful_valid": (536, ALL),
    "hh_harmless_train": (1491, ALL),
    "hh_harmless_valid": (261, ALL),
    "ukp_arguments_train": (7328, [Preference]),
    "oasst_en100_pairs": (297, ALL),
    "judge_llmbar": (193, ALL),
    "judge_mtbench_human": (126, ALL),
    "judge_pandalm": (680, [Prompt, Preference]),
    "instruct_small": (850, [Prompt, Demonstration]),
    "self_instruct_seed": (175, [Prompt, Demonstration]),
    "persona_chat": (643, [Prompt, Demonstration]),
    "gsm8k_train": (7173, [Prompt, Demonstration]),
    "gsm8k_valid": (300, [Prompt, Demonstration]),
    "cot_mix": (2000, [Prompt, Demonstration]),
    "rt_polarity_train": (7381, [Demonstration]),
    "sentiment_graded": (5877, [Demonstration]),
    "eval_arena_hard": (200, [Prompt]),
    "eval_user_instructions": (171, [Prompt]),
    "persona_evals": (2400, [Prompt]),
    "sycophancy_opinion": (547, [Prompt]),
    "truthfulqa": (398, [Prompt]),
}


def shared(name: str) -> Path:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("../shared/data is not here")
    return path


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in FILES.items() for kind in kinds])
def test_a_real_set_loads_as_it_is(name: str, kind: type[Record]):
    loaded = data.load(shared(name), kind)
    rows, _ = FILES[name]
    assert (loaded.rows, loaded.skipped) == (rows, [])
    assert len(loaded.records) == rows * (2 if kind is Feedback else 1)


def test_the_answers_of_problems_are_the_final_ones():
    prompts = data.load(shared("gsm8k_valid"), Prompt).records
    assert all(prompt.answer is not None and len(prompt.answer) < 20 for prompt in prompts)
    demonstrations = data.load(shared("gsm8k_valid"), Demonstration).records
    for item in demonstrations:
        assert item.response.replace(",", "").endswith(f"#### {item.prompt.answer}")


def test_ties_of_judges_are_ties():
    pairs = data.load(shared("judge_pandalm"), Preference).records
    assert sum(pair.confidence == 0.5 for pair in pairs) == 87
    for pair in pairs:
        assert pair.confidence in (0.5, 1.0)


def test_rows_without_a_pair_are_skipped_only_on_demand():
    path = shared("instruct_small")
    with pytest.raises(ValueError, match=r"instruct_small\.jsonl\.gz:\d+: chosen: found null"):
        data.load(path, Preference)
    loaded = data.load(path, Preference, skip_invalid=True)
    assert (len(loaded.records), len(loaded.skipped)) == (845, 5)


def test_the_longer_answer_wins_as_often_as_was_measured():
    """The baselines of the README of the sets, measured there on held-out parts of a few hundred rows."""
    for name, share in [("hh_helpful_train", 0.55), ("hh_harmless_train", 0.47), ("ukp_arguments_train", 0.74)]:
        found = facts(data.load(shared(name), Preference).records).longer_wins
        assert found is not None
        assert found.share == pytest.approx(share, abs=0.05)


def test_training_and_validation_share_no_prompt():
    train, valid = (data.load(shared(f"hh_helpful_{part}"), Preference).records for part in ("train", "valid"))
    found = facts(valid, against=train, against_source="train")
    assert found.shared_prompts is not None
    assert found.shared_prompts.count == 0
    again = facts(valid[:10], against=valid)
    assert again.shared_rows is not None
    assert again.shared_rows.count == 10
