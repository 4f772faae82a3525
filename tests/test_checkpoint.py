"""A checkpoint is complete or absent, and nothing of a damaged one is used."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import bigram
from tests.bigram import Bigram
from trimtab import checkpoint as checkpoints
from trimtab.checkpoint import (
    MANIFEST,
    TENSORS,
    VALUES,
    Weights,
    digest_of,
    is_whole,
    read_checkpoint,
    recover,
    write_checkpoint,
)
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.objectives import DemonstrationObjective
from trimtab.run import MOST_SKIPPED, Run
from trimtab.safety import Safety, random_state, set_random_state

EXAMPLE = Path(__file__).parent / "recorded_run"

STATE = {
    "learner": {"weights": {"a.weight": torch.tensor([[1.5, -2.0]]), "b": torch.tensor(3.0).bfloat16()}, "lr": [0.1]},
    "run": {"step": 7, "best": None, "mean": 0.1 + 0.2, "bytes": torch.arange(5, dtype=torch.uint8), "nothing": {}},
}


def save(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def written(folder: Path, step: int = 7, state: Any = STATE) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(path, step=step, state=state, save=save)
    return path


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other and type(one) is type(other)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert same(read_checkpoint(path), STATE)
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == sorted(
        ["config.json", MANIFEST, VALUES, TENSORS]
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]


# ---- Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def link(path: Path) -> None:
    shutil.move(path, path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize("name", ["config.json", MANIFEST, VALUES, TENSORS])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, link])
def test_damage_to_any_file_is_found_and_the_file_named(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    path = written(tmp_path)
    damage(path / name)
    with pytest.raises(ValueError, match=r"damaged|is a link") as error:
        read_checkpoint(path)
    assert str(path / name) in str(error.value)
    assert not is_whole(path)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    """Of all its bytes: no digit of a step, a size or a name can change unseen."""
    path = written(tmp_path)
    content = (path / MANIFEST).read_bytes()
    for i in range(len(content)):
        if content[i : i + 1].isspace() or content[i + 1 : i + 2].isspace():
            continue  # a byte more or less between two tokens of JSON says the same
        changed = bytearray(content)
        changed[i] ^= 1
        (path / MANIFEST).write_bytes(changed)
        assert not is_whole(path), (i, changed[i : i + 20])


def rewritten(path: Path, **changes: Any) -> None:
    """A manifest that somebody wrote on purpose, its own sha256 included."""
    facts = {**json.loads((path / MANIFEST).read_text()), **changes}
    facts.pop("sha256")
    (path / MANIFEST).write_text(json.dumps({**facts, "sha256": digest_of(facts)}))


ABSOLUTE = os.sep + "etc" + os.sep + "hostname"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "written by a newer trimtab"),
        ({"format_version": "1"}, "damaged"),
        ({"files": []}, "damaged"),
        ({"files": {VALUES: 3}}, "does not say the size"),
        ({"files": {"../../letter": {"bytes": 1, "sha256": ""}}}, "lies elsewhere"),
        ({"files": {ABSOLUTE: {"bytes": 1, "sha256": ""}}}, "lies elsewhere"),
        ({"files": {"state/./values.json": {"bytes": 1, "sha256": ""}}}, "lies elsewhere"),
        ({"files": {"state": {"bytes": 1, "sha256": ""}}}, "no file at all"),
        ({"files": {VALUES: {"bytes": 2**70, "sha256": ""}}}, "were written"),
        ({"files": {}}, "without the state of a run"),
    ],
)
def test_a_manifest_that_lies_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=said):
        read_checkpoint(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a": ', "\xff"])
def test_json_that_is_none_of_ours_is_refused(text: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)


def test_a_manifest_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    os.truncate(path / MANIFEST, 2**40)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="no file of a checkpoint"):
        read_checkpoint(path)


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    state = path / "state"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        read_checkpoint(path)


def test_files_that_a_manifest_does_not_name_are_never_opened(tmp_path: Path) -> None:
    path = written(tmp_path)
    os.mkfifo(path / "state" / "pipe")  # opening it would wait for ever
    assert same(read_checkpoint(path), STATE)


def test_another_models_weights_are_refused_before_one_is_changed() -> None:
    own = Bigram(seed=1)
    before = own.logits.clone()
    for saved, said in [
        ({**dict(own.named_parameters()), "value": torch.zeros(7)}, r"value is \[7\] float32 there and \[6\]"),
        ({"logits": torch.zeros(6, 6)}, "value: the checkpoint has no such weight"),
        ({**dict(own.named_parameters()), "bias": torch.zeros(6)}, "bias: this model has no such weight"),
        ({"logits": torch.zeros(6, 6), "value": torch.zeros(6).double()}, "float64 there and"),
    ]:
        with pytest.raises(ValueError, match=said):
            Weights(own).load_state_dict(saved)
        assert torch.equal(own.logits, before)


# ---- Full disks, and processes that died


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = written(tmp_path)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"the disk is full: the state alone of .*step-00000008 takes \d+ bytes"):
        written(tmp_path, 8)
    assert [path.name for path in good.parent.iterdir()] == [good.name] and is_whole(good)


def test_room_is_looked_for_before_anything_large_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(checkpoints, "save_file", lambda *arguments: pytest.fail("written in spite of it"))
    with pytest.raises(OSError, match="10 bytes are free"):
        written(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_a_dead_process_left_is_cleared_up(tmp_path: Path) -> None:
    path = written(tmp_path)
    folder = path.parent
    shutil.copytree(path, folder / ".step-00000008.partial")
    shutil.copytree(path, folder / ".step-00000006.removed")
    (tmp_path / ".model-abc").mkdir()
    (tmp_path / ".config.yaml.partial").write_text("see")
    path.rename(folder / f".{path.name}.old")  # it died between the two renames of a replacement
    recover(tmp_path)
    assert [path.name for path in folder.iterdir()] == [path.name] and is_whole(path)
    assert list(tmp_path.iterdir()) == [folder]


# ---- A run


def learner_of(model: Bigram) -> Learner:
    optimizer = make_optimizer(model.trainable_parameters(), lr=0.1, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="linear", warmup_steps=2, steps=20)
    return Learner(model, DemonstrationObjective(), optimizer, schedule, 4)


def broken() -> Any:
    """Demonstrations whose loss is not a number."""
    batch = bigram.demonstrations()
    return type(batch)(batch.tokens, torch.full_like(batch.weights, torch.nan))


def safety(learner: Learner, **options: Any) -> Safety:
    return Safety(save=save, parts={"learner": learner}, rows=lambda step: [f"train.jsonl:{step}"], **options)


def test_a_step_that_is_not_finite_is_told_with_its_rows_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    run, learner = Run.create(tmp_path / "run", config={"command": "sft"}, seed=0), learner_of(Bigram())
    batches = [bigram.demonstrations(), bigram.demonstrations(), broken()]
    with pytest.raises(FloatingPointError, match="step 3: loss is nan") as error:
        run.train(learner, batches, steps=3, safety=safety(learner, every=2))
    for said in ("train.jsonl:3", "step-00000002", "trimtab sft --config", "--resume"):
        assert said in str(error.value)


def test_skipped_steps_change_nothing_but_are_counted_and_limited(tmp_path: Path) -> None:
    run, learner = Run.create(tmp_path / "run", config={}, seed=0), learner_of(Bigram())
    batches = [broken(), bigram.demonstrations(), broken(), bigram.demonstrations()]
    run.train(learner, batches, steps=4, safety=safety(learner, on_nonfinite="skip"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in rows] == [1, None, 2, None] and rows[0]["loss"] is None
    assert [row["lr"] for row in rows] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1 * (1 - 1 / 18)])
    other = learner_of(Bigram())
    for lr in (row["lr"] for row in rows[1::2]):  # the same as two steps at their learning rates
        for group in other.optimizer.param_groups:
            group["lr"] = lr
        other.step(bigram.demonstrations())
    assert torch.equal(other.parameters[0], learner.parameters[0])
    endless = Run.create(tmp_path / "endless", config={}, seed=0)
    with pytest.raises(FloatingPointError, match=f"step {MOST_SKIPPED + 1}:"):
        endless.train(learner, [broken()] * 20, steps=20, safety=safety(learner, on_nonfinite="skip"))


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), numpy.random.normal(), torch.randn(()).item()]

    draw()
    path = written(tmp_path, state={"random": random_state()})
    first = [draw(), draw()]
    set_random_state(read_checkpoint(path)["random"])
    assert [draw(), draw()] == first


def test_a_recorded_run_can_be_read_and_gone_on_from(tmp_path: Path) -> None:
    """It was recorded with the first format; every later one must read it."""
    shutil.copytree(EXAMPLE, tmp_path / "run")
    learner = learner_of(Bigram(seed=5))
    run = Run.reopen(tmp_path / "run", config={"command": "sft"}, seed=0)
    run.restore({"learner": learner})
    run.train(learner, [bigram.demonstrations()] * 2, steps=6, safety=safety(learner))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    whole = Run.create(tmp_path / "whole", config={"command": "sft"}, seed=0)
    other = learner_of(Bigram())
    whole.train(other, [bigram.demonstrations()] * 6, steps=6, safety=safety(other))
    known = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in known], rel=1e-5)


def record(out: Path) -> None:
    """How the recorded run was made: four steps, the last row of its figures cut in half as by a kill."""
    run, learner = Run.create(out, config={"command": "sft"}, seed=0), learner_of(Bigram())
    run.train(learner, [bigram.demonstrations()] * 5, steps=5, safety=safety(learner, every=4))
    shutil.rmtree(out / "checkpoints" / "step-00000005")
    truncate_last = (out / "metrics.jsonl").read_bytes()[:-30]
    (out / "metrics.jsonl").write_bytes(truncate_last)
