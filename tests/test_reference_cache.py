"""The cache of reference log-probabilities: what it gives is what would be computed, to the last bit, or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import reference_cache, references
from trimtab.builtin import tiny_policy
from trimtab.models import FrozenPolicy, Policy
from trimtab.records import Preference, Prompt
from trimtab.reference_cache import (
    arithmetic_of,
    check_folder,
    fingerprint,
    open_cache,
    read_window,
    window_file,
    write_window,
)
from trimtab.references import StoredReference, store
from trimtab.tokens import Encoded, encode

MAX_ROWS = 4


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and windows of two items."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "WINDOW_ITEMS", 2)
    return tmp_path / "cache"


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


def items_of(policy: Policy, count: int = 7) -> list[Encoded]:
    records = [
        Preference(Prompt.from_user(f"Question {i}{'?' * (3 * i % 7)}"), f"yes {i}" * (i % 3 + 1), "no" * (i % 2 + 1))
        for i in range(count)
    ]
    return encode(policy.tokenizer, records, max_length=400)[0]


class Counting:
    """A reference that counts the rows it scores."""

    def __init__(self, scorer: FrozenPolicy) -> None:
        self.scorer, self.rows = scorer, 0
        self.device = scorer.device

    def logprobs(self, tokens: Any) -> Any:
        self.rows += len(tokens)
        return self.scorer.logprobs(tokens)


def stored(
    policy: Policy, items: list[Encoded], *, wanted: list[int] | None = None, cached: bool = True, seed: int = 0
) -> tuple[StoredReference, int]:
    """The log-probabilities of some items, and how many rows were scored for them."""
    scorer = Counting(policy.reference())
    cache = open_cache(scorer.scorer, max_rows=MAX_ROWS, seed=seed) if cached else None
    found = store(scorer, items, pad_id=policy.pad_id, max_rows=MAX_ROWS, wanted=wanted, cache=cache)
    return found, scorer.rows


def assert_same(found: StoredReference, expected: StoredReference) -> None:
    assert found.logprobs.keys() == expected.logprobs.keys()
    for item, rows in expected.logprobs.items():
        assert all(torch.equal(*two) for two in zip(found.logprobs[item], rows, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# ---- What is found


def test_what_is_read_is_what_was_computed_to_the_last_bit(
    policy: Policy, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = items_of(policy)
    fresh, rows = stored(policy, items, cached=False)
    assert rows == 14 and not cache_folder.exists()
    first, rows = stored(policy, items)
    assert rows == 14 and len(files(cache_folder)) == 4
    again, rows = stored(policy, items)
    assert 0 < rows <= MAX_ROWS, "only a sample is computed again"
    for found in (first, again):
        assert_same(found, fresh)
    told = capsys.readouterr().err
    assert f"reference log-probabilities: 0 of 7 from {cache_folder}" in told
    assert f"reference log-probabilities: 7 of 7 from {cache_folder}" in told
    assert not [path for path in cache_folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_a_longer_run_computes_only_its_new_windows_and_gets_the_values_of_a_fresh_one(policy: Policy) -> None:
    items = items_of(policy)
    short, long = [5, 0, 3, 6], [5, 0, 3, 6, 1, 2, 4]
    stored(policy, items, wanted=short)
    found, rows = stored(policy, items, wanted=long)
    assert rows <= 3 * 2 + MAX_ROWS
    assert_same(found, stored(policy, items, wanted=long, cached=False)[0])


def test_windows_cut_at_another_place_are_computed_as_if_nothing_were_there(policy: Policy) -> None:
    """Neighbours of another length move last digits, so what ran with others is not taken."""
    items = items_of(policy)
    stored(policy, items, wanted=[5, 0, 3])
    found, _ = stored(policy, items, wanted=[5, 0, 3, 6])
    assert_same(found, stored(policy, items, wanted=[5, 0, 3, 6], cached=False)[0])


def test_other_data_that_begins_alike_shares_its_windows(policy: Policy) -> None:
    items = items_of(policy)
    stored(policy, items)
    shorter, rows = stored(policy, items[:4])
    assert rows <= MAX_ROWS
    assert_same(shorter, stored(policy, items[:4], cached=False)[0])


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    items, score = items_of(policy), references.score

    def stop(scorer: Any, items: Any, chosen: Any, pad_id: int) -> Any:
        if 4 in chosen:
            raise KeyboardInterrupt
        return score(scorer, items, chosen, pad_id)

    with monkeypatch.context() as patched:
        patched.setattr(references, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            stored(policy, items)
    _, rows = stored(policy, items)
    assert rows <= 3 * 2 + MAX_ROWS


# ---- What is not found


def changed(policy: Policy, what: str) -> tuple[Policy, list[Encoded]]:
    """A policy and its items, one thing about them changed."""
    items = items_of(policy)
    if what == "a weight":
        with torch.no_grad():
            policy.model.get_parameter("model.norm.weight")[0] += 1e-6
    if what == "a config entry":
        policy.model.config.rms_norm_eps = 1e-5
    if what == "an id":
        rows = items[0].rows
        items[0] = replace(items[0], rows=(replace(rows[0], ids=[*rows[0].ids[:-1], 7]), rows[1]))
    if what == "a mask":
        rows = items[0].rows
        items[0] = replace(items[0], rows=(replace(rows[0], response=[False, True, *rows[0].response[2:]]), rows[1]))
    if what == "precision":
        policy = tiny_policy(dtype="bfloat16")
    if what == "layout":
        policy.body.use_layout(share=False)
    return policy, items


@pytest.mark.parametrize("what", ["a weight", "a config entry", "an id", "a mask", "precision", "layout"])
def test_a_change_of_anything_is_another_key(policy: Policy, what: str) -> None:
    stored(policy, items_of(policy))
    other, items = changed(policy, what)
    found, rows = stored(other, items)
    assert rows >= 4, "the window of the first item is computed again"
    assert_same(found, stored(other, items, cached=False)[0])


def test_rows_together_threads_and_versions_are_in_the_key(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = policy.reference()
    before = arithmetic_of(reference, 4)
    assert arithmetic_of(reference, 4) == before != arithmetic_of(reference, 8)
    for module, name in ((torch, "get_num_threads"), (reference_cache, "processor_name")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda: 17)
            assert arithmetic_of(reference, 4) != before
    with monkeypatch.context() as patched:
        patched.setattr(reference_cache.metadata, "version", lambda package: "0.0")
        assert arithmetic_of(reference, 4) != before


def test_training_the_policy_leaves_the_reference_and_changes_the_next_ones(policy: Policy) -> None:
    adapted, items = tiny_policy(lora_rank=2), items_of(policy)
    stored(policy, items)
    for trained, found_again in ((adapted, True), (policy, False)):
        with torch.no_grad():
            for parameter in trained.trainable_parameters():
                parameter.add_(0.01)
        found, rows = stored(trained, items)
        assert (rows <= MAX_ROWS) == found_again
        assert_same(found, stored(trained, items, cached=False)[0])


def test_a_fingerprint_is_about_what_is_computed_with() -> None:
    plain, adapted = tiny_policy(), tiny_policy(lora_rank=2)
    assert fingerprint(adapted.reference()) == fingerprint(plain.reference()) == fingerprint(plain.frozen())
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(0.01)
    assert fingerprint(adapted.reference()) == fingerprint(plain.reference())
    assert fingerprint(adapted.frozen()) != fingerprint(plain.reference())
    assert fingerprint(tiny_policy(seed=1).reference()) != fingerprint(plain.reference())


def test_a_fingerprint_sees_one_bit_and_which_weight_it_is_in() -> None:
    found = set()
    for name in ("", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        policy = tiny_policy()
        if name:
            policy.model.get_parameter(name).data.view(torch.int32)[3, 5] ^= 1
        found.add(fingerprint(policy.reference()))
    swapped = tiny_policy()
    one, two = (swapped.model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2))
    one.data, two.data = two.data, one.data
    assert len(found | {fingerprint(swapped.reference())}) == 4


# ---- What cannot be trusted


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "a bit":
        content[-20] ^= 1
    else:
        content = bytearray(b"")
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "a bit", "empty"])
def test_a_damaged_file_is_named_and_made_again(
    how: str, policy: Policy, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = items_of(policy)
    expected, _ = stored(policy, items)
    victim = files(cache_folder)[1]
    whole = victim.read_bytes()
    damage(victim, how)
    found, rows = stored(policy, items)
    assert f"{victim} is damaged" in capsys.readouterr().err
    assert 0 < rows <= 2 * MAX_ROWS and victim.read_bytes() == whole
    assert_same(found, expected)


def test_a_file_under_another_windows_name_is_not_taken(
    policy: Policy, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = items_of(policy)
    cache = open_cache(policy.reference(), max_rows=MAX_ROWS, seed=0)
    expected, _ = stored(policy, items)
    one, two = (window_file(cache.folder, items[start : start + 2]) for start in (0, 2))
    one.write_bytes(two.read_bytes())
    found, _ = stored(policy, items)
    assert f"{one} is damaged (it holds other rows" in capsys.readouterr().err
    assert_same(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_values_that_the_reference_does_not_give_are_found_by_the_sample(
    seed: int, policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    items = items_of(policy)
    expected, _ = stored(policy, items)
    cache = open_cache(policy.reference(), max_rows=MAX_ROWS, seed=seed)
    for start in range(0, 7, 2):
        window = range(start, min(start + 2, 7))
        some = [items[i] for i in window]
        moved = [[row * 1.001 for row in expected.logprobs[i]] for i in window]
        write_window(window_file(cache.folder, some), some, moved)
    found, rows = stored(policy, items, seed=seed)
    told = capsys.readouterr().err
    assert f"{cache.folder}: the reference gives other log-probabilities now" in told
    assert "reference log-probabilities: 0 of 7" in told and rows >= 14
    assert_same(found, expected)
    assert_same(stored(policy, items)[0], expected)


def test_bf16_has_a_wider_tolerance(policy: Policy) -> None:
    rounded = tiny_policy(dtype="bfloat16")
    assert open_cache(policy.reference(), max_rows=4, seed=0).tolerance == 1e-4
    assert open_cache(rounded.reference(), max_rows=4, seed=0).tolerance == 0.1
    known = {0: [torch.tensor([0.0, -0.5, -8.0])]}
    for off, expected in ((0.9e-4, True), (1.1e-4, False)):
        assert references.agree({0: [known[0][0] * (1 + off)]}, known, 1e-4) == expected
    assert references.agree({0: [torch.tensor([0.0, -0.50009, -8.0])]}, known, 1e-4), "absolute below one nat"
    assert not references.agree({0: [torch.tensor([0.0, float("nan"), -8.0])]}, known, 1e-4)


def test_windows_of_rows_without_responses_and_of_nothing(policy: Policy, tmp_path: Path) -> None:
    items = items_of(policy, 2)
    blank = [replace(item, rows=tuple(replace(r, response=[False] * len(r.ids)) for r in item.rows)) for item in items]
    values = [[torch.zeros(len(row.ids)) for row in item.rows] for item in blank]
    write_window(tmp_path / "w.safetensors", blank, values)
    found = read_window(tmp_path / "w.safetensors", blank)
    assert found is not None
    assert_same(StoredReference(dict(enumerate(found))), StoredReference(dict(enumerate(values))))
    assert read_window(tmp_path / "none.safetensors", blank) is None
    assert stored(policy, [])[0].logprobs == {}


def test_a_cache_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file is no folder.*Set TRIMTAB_CACHE.*or give --no-reference-cache"):
        check_folder()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "new" / "deep"))
    check_folder()
