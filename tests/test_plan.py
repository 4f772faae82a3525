"""`trimtab plan`: arithmetic by hand, the sizes of real models, and estimates beside measured peaks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.peak_memory import CONFIG, LENGTH, ROWS
from trimtab.batches import Tokens
from trimtab.bodies import run_rows
from trimtab.builtin import tiny
from trimtab.cli import main
from trimtab.memory import layers_of, saved_bytes
from trimtab.plan import KINDS, Device, Size, Work, memory, rows, seconds, size_of

ROOT = Path(__file__).parents[1]
SIZE = Size(
    weights=1000,
    trained=1000,
    layers=4,
    layer=200,
    outside=200,
    trained_head=150,
    hidden=10,
    vocabulary=15,
    key_values=20,
    kept=(1600, 4800),
    bytes_of_products=4,
)
WORK = Work(rows=8, micro_batch_rows=2, length=50, new_tokens=5, sampled_rows=4)


def test_a_hand_value() -> None:
    told = memory(SIZE, KINDS["dpo, kto (live reference)"], WORK)
    assert (told["weights"], told["frozen"], told["optimizer"], told["gradients"]) == (4000, 4000, 8000, 4000)
    # 100 bytes a token, and in each of 4 layers a mask of 4 bytes for 50 x 50 places in two rows
    assert told["activations"] == 100 * 100 + 4 * 2 * 2500 * 4
    assert told["logits"] == 4 * (3 * 256 * 15 + 150)
    assert told["peak"] == 20_000 + told["activations"] + told["logits"] and told["sampling"] == told["together"] == 0


def test_splitting_divides_what_rests_and_nothing_else() -> None:
    whole, split = (memory(SIZE, KINDS["ppo"], replace(WORK, devices=4, split=choice)) for choice in (False, True))
    for name in ("weights", "frozen", "optimizer", "gradients"):
        assert split[name] == whole[name] / 4
    assert split["activations"] == whole["activations"] and split["logits"] == whole["logits"]
    assert split["together"] == 4 * 2 * (2 * 200 + 200) and whole["together"] == 0
    assert split["sampling"] == whole["sampling"] + 4000 and split["start"] == whole["start"] == 4 * 3 * 1000


def test_whole_models_are_read_before_they_are_split() -> None:
    size = replace(SIZE, weights=10**9, trained=10**9)  # beside which rows, logits and one layer are nothing
    told = memory(size, KINDS["dpo, kto (live reference)"], replace(WORK, devices=16, split=True))
    assert told["peak"] == told["start"] == 8 * 10**9


def test_an_adapter_needs_no_copy_and_little_else() -> None:
    told = memory(replace(SIZE, trained=10, trained_head=0), KINDS["raft, online-dpo, rloo, grpo"], WORK)
    assert told["frozen"] == 0 and told["optimizer"] == 80 and told["gradients"] == 40


def test_time_by_hand() -> None:
    device = Device(operations=1e6, memory=1e5, link=1e4)
    # 2 (800 + 150) + attention 2 * 50 * 10 * 4 operations a token forward, three times that in all, 400 tokens
    assert seconds(SIZE, KINDS["sft"], WORK, device) == pytest.approx(400 * 3 * 5900 / 1e6)
    # and gradients are exchanged by two
    two = seconds(SIZE, KINDS["sft"], replace(WORK, devices=2), device)
    assert two == pytest.approx(200 * 3 * 5900 / 1e6 + 8000 / 1e4)
    drawn = replace(WORK, new_tokens=5)
    more = seconds(SIZE, replace(KINDS["sft"], samples=True), drawn, device) - seconds(
        SIZE, KINDS["sft"], drawn, device
    )
    assert more == pytest.approx(2 * 5 * 4000 / 1e5)


def test_layers_run_again_only_where_that_is_needed() -> None:
    needed = memory(SIZE, KINDS["sft"], WORK)["peak"]
    device = Device(1, 1, 1)
    assert [(row.work.recompute, row.fits) for row in rows({"sft": SIZE}, WORK, device, needed)] == [(False, True)]
    assert [(row.work.recompute, row.fits) for row in rows({"sft": SIZE}, WORK, device, needed - 1)] == [(True, True)]
    assert [(row.work.recompute, row.fits) for row in rows({"sft": SIZE}, WORK, device, 16_000)] == [(True, False)]
    assert [row.work.split for row in rows({"sft": SIZE}, replace(WORK, devices=2), device, needed)] == [False, True]


def test_answers_are_drawn_with_split_weights_only_where_that_is_needed() -> None:
    # One answer at a time of a large model: sampling is what takes the most.
    size, kind = replace(SIZE, weights=10**6, trained=10**4, trained_head=0), "raft, online-dpo, rloo, grpo"
    work, device = replace(WORK, sampled_rows=1, devices=8, split=True), Device(1e9, 1e9, 1e6)
    together, apart = (memory(size, KINDS[kind], replace(work, apart=choice)) for choice in (False, True))
    assert together["sampling"] - apart["sampling"] == 4 * 10**6 - 4 * (2 * 200 + 200)
    assert apart["start"] == together["start"] and apart["weights"] == together["weights"]
    found = {room: rows({kind: size}, work, device, room)[1] for room in (together["peak"], together["peak"] - 1)}
    assert [(row.work.apart, row.fits) for row in found.values()] == [(False, True), (True, True)]
    # One batch of five new tokens, each of which brings all weights from the other devices.
    known, slower = (row.seconds for row in found.values())
    assert slower - known == pytest.approx(5 * 4 * 10**6 / 1e6)


def test_a_reward_model_is_split_with_the_rest() -> None:
    work = replace(WORK, devices=4, reward=500)
    whole, split = (memory(SIZE, KINDS["ppo"], replace(work, split=choice)) for choice in (False, True))
    assert whole["frozen"] == 4 * 1500 and split["frozen"] == 1500
    assert memory(SIZE, KINDS["sft"], work)["frozen"] == 0, "methods that do not sample ask no reward"


def test_the_size_of_a_model_is_that_of_the_real_one() -> None:
    network, _ = tiny()
    size = size_of(network.config, bf16=False)
    assert size.weights == size.trained == sum(weight.numel() for weight in network.parameters())
    assert size.layers == len(layers_of(network)) and size.weights == size.outside + size.layers * size.layer
    ids = torch.arange(48)[None]
    tokens = Tokens(ids, ids > 0, ids < 0)  # a column of padding, so that there are masks
    real = saved_bytes(lambda: run_rows(network.base_model, tokens), network.parameters())
    assert size.kept[1] + size.layers * 48**2 * 4 == pytest.approx(real, rel=0.02)


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--devices", "2", "--memory", "1"]) == 0
    told = capsys.readouterr().out
    assert "0.0122 billion weights" in told and "yes" in told and "ppo" in told
    assert main(["plan", "--model", str(tmp_path), "--memory", "0"]) == 2
    assert "--memory 0.0: a number above 0" in capsys.readouterr().err


WAYS = {
    "plain": ("sft", {}, 0),
    "recompute": ("sft", {"recompute": True}, 0),
    "live": ("dpo, kto (live reference)", {}, 0),
    "adapter": ("sft", {}, 8),
}


def measured(kind: str, ranks: int) -> int:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "tests.peak_memory", kind]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT, env=environment)
    return int(told.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", WAYS)
def test_estimates_are_within_15_percent_of_measured_peaks(kind: str, ranks: int) -> None:
    method, changes, rank = WAYS[kind]
    size = size_of(CONFIG, bf16=False, lora_rank=rank)
    work = Work(
        rows=2 * ROWS * ranks,
        micro_batch_rows=ROWS,
        length=LENGTH,
        new_tokens=0,
        sampled_rows=0,
        devices=ranks,
        split=ranks > 1,
        **changes,
    )
    peak = measured(kind, ranks)
    told = memory(size, KINDS[method], work)
    print({name: round(value / 2**20) for name, value in told.items()}, "measured", peak // 2**20)
    assert told["peak"] == pytest.approx(peak, rel=0.15)
