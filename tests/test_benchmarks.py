"""The benchmarks: rows, counts and ratios by hand, what counts as the same work, and every kind of step on `tiny`."""

import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import alternate, floor, gpu, growth, ours, profiling, report, sampling
from benchmarks.process import Job, Result, count_of_e, parts_of, token_facts
from benchmarks.work import WORDS, WORKS, conversation_rows, cut, filled, rows_of, scaled, write_rows, written_rows
from trimtab import data
from trimtab.builtin import tiny, write_tiny
from trimtab.records import Preference

ROOT = Path(__file__).parents[1]
TINY_BODY = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # two layers: q and o, k and v, three of the feed-forward
TINY_HEAD = 259 * 64
PEER_PYTHON = ROOT / ".venv-trl" / "bin" / "python"

# ---- Rows


@pytest.mark.parametrize("name", ["dpo", "dpo_long", "reward", "sft", "kto"])
def test_rows_have_their_words_and_depend_on_the_seed_alone(name: str) -> None:
    work = WORKS[name]
    rows = written_rows(work)
    assert rows == written_rows(work) != written_rows(work, seed=1)
    assert len({row["prompt"] for row in rows}) == len(rows) == work.items
    assert {len(row["prompt"].split()) for row in rows} == {work.prompt_words}
    answers = [row[key] for row in rows for key in ("chosen", "rejected", "completion") if key in row]
    assert {len(answer.split()) for answer in answers} == {work.answer_words}
    assert all(answer.startswith(" ") for answer in answers)


def test_half_of_the_feedback_is_wanted() -> None:
    assert sum(row["label"] for row in written_rows(WORKS["kto"])) == 8


def test_words_are_different() -> None:
    assert len(set(WORDS)) == len(WORDS)


def message(role: str, words: int) -> dict[str, str]:
    return {"role": role, "content": " ".join(["word"] * words)}


def test_conversations_with_long_prompts_become_plain_text(tmp_path: Path) -> None:
    prompt = [message("user", 100), message("assistant", 49), message("user", 1)]
    pair = {"prompt": prompt, "chosen": [message("assistant", 2)], "rejected": [message("assistant", 1)]}
    short = {**pair, "prompt": prompt[:2]}
    rambling = {**pair, "chosen": [message("assistant", 151)]}
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in (short, pair, rambling))
    [row] = conversation_rows(replace(WORKS["dpo_hh"], items=1), path)
    assert row["prompt"].startswith("Question: word word")
    assert row["prompt"].endswith("word\n\nQuestion: word\n\nAnswer:")
    [record] = data.load(write_rows(tmp_path / "plain.jsonl", [row]), Preference).records
    assert record.prompt.text == row["prompt"] and record.prompt.is_text
    assert (row["chosen"], row["rejected"]) == (" word word", " word")
    with pytest.raises(ValueError, match="1 prompts of 150 words or more; 2 are needed"):
        conversation_rows(replace(WORKS["dpo_hh"], items=2), path)


def test_a_long_prompt_loses_its_first_words() -> None:
    row = {"prompt": " ".join(f"w{i}" for i in range(100)), "chosen": " a b", "rejected": " c"}

    def longest(row: dict[str, Any]) -> int:
        return len((row["prompt"] + row["chosen"]).split())

    assert cut(row, 102, longest) == row
    shorter = cut(row, 50, longest)
    assert longest(shorter) <= 50
    assert row["prompt"].endswith(" " + shorter["prompt"]) and shorter["chosen"] == row["chosen"]
    with pytest.raises(ValueError, match="an answer alone has more than 2 tokens"):
        cut(row, 2, longest)


def test_packed_rows_are_filled_and_not_overfilled() -> None:
    rows = [{"number": number} for number in range(20)]
    work = replace(WORKS["sft"], fill=2, max_length=10)
    assert len(filled(rows, [3] * 20, work)) == 6
    assert len(filled(rows, [10] * 20, work)) == 2


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_fixed_answers_have_exactly_their_tokens(name: str) -> None:
    rows = rows_of(WORKS[name], tiny()[1], None)
    assert len(rows) == 8 and [len(row["answers"]) for row in rows] == [4] * 8
    assert {len(ids) for row in rows for ids in row["answers"]} == {48}
    assert len({tuple(ids) for row in rows for ids in row["answers"]}) == 32


# ---- Counts


def test_the_digest_is_about_rows_and_not_their_order() -> None:
    facts = token_facts([[1, 2], [3]])
    assert (facts["rows"], facts["tokens"]) == (2, 3)
    assert facts == token_facts([[3], [1, 2]])
    assert facts["digest"] != token_facts([[1], [2, 3]])["digest"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    return str(path)


def test_operations_by_hand(folder: str) -> None:
    counts = floor.Counts(tokens=100, predicted=20, looked_at=10, looked_at_predicted=5, seen=1000)
    body = 6 * TINY_BODY * 100 + 2 * TINY_BODY * 10
    head = 6 * TINY_HEAD * 20 + 2 * TINY_HEAD * 5
    assert floor.flops(folder, counts) == body + head + 12 * (2 * 4 * 16) * 1000


def test_the_floor_multiplies_what_a_layer_multiplies() -> None:
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    buffers = floor.Buffers.of(weight, 5)
    floor.Pass([weight], True, {weight.shape: buffers}).run()
    inputs = buffers.inputs.clone().requires_grad_()
    leaf = weight.clone().requires_grad_()
    outputs = torch.nn.functional.linear(inputs, leaf)
    to_inputs, to_weight = torch.autograd.grad(outputs, (inputs, leaf), buffers.gradients)
    torch.testing.assert_close(buffers.outputs, outputs.detach())
    torch.testing.assert_close(buffers.to_inputs, to_inputs)
    torch.testing.assert_close(buffers.to_weight, to_weight)


def test_the_floor_of_nothing_is_nothing() -> None:
    assert not floor.Pass.of([torch.ones(2, 2)], 0, backward=True).weights


def test_counts_of_shared_prompts_by_hand() -> None:
    # Two groups of a prompt of 3 and two answers of 2: the prompt sees 1 + 2 + 3, an answer's tokens 4 and 5.
    assert growth.counts(3, 2, 2, rows=4) == floor.Counts(tokens=14, predicted=8, seen=2 * (6 + 2 * 9))
    assert growth.counts(3, 1, 2, rows=4) == floor.Counts(tokens=20, predicted=8, seen=4 * 15)
    assert growth.counts(3, 2, 2, rows=2) == gpu.pair_counts(3, [2, 2], shared=True, scores=False)
    assert growth.counts(3, 1, 2, rows=2) == gpu.pair_counts(3, [2, 2], shared=False, scores=False)


# ---- Figures


def result(side: str = "trimtab", **changes: Any) -> Result:
    given = Result(
        side,
        seconds=[9.0, 1.0, 3.0],
        losses=[0.7, 0.6, 0.5],
        figures={"loss": 0.7, "grad_norm": 2.0},
        tokens={"rows": 4, "tokens": 40, "digest": "d"},
        loaded=100,
        peak=1000,
        threads=2,
    )
    return replace(given, **changes)


def test_ratios_are_of_medians_and_warm_up_does_not_count() -> None:
    mine = [result(), result(seconds=[9.0, 4.0, 4.0]), result(seconds=[0.0, 1.0, 1.0])]
    theirs = [result("trl best", seconds=[1.0, 6.0, 6.0], peak=4000)]
    told = report.summary("dpo", {"trimtab": mine, "trl best": theirs}, [0.5, 1.0, 1.5], dtype="bfloat16")
    assert told["sides"]["trimtab"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert told["sides"]["trimtab"]["tokens_per_second"] == 20
    assert told["ratios"] == {"trl best": {"speed": 3.0, "memory": 0.25}}
    assert told["floor_fraction"] == {"trimtab": 0.5, "trl best": 1 / 6}


def test_results_are_written_and_read_back(tmp_path: Path) -> None:
    told = report.summary("dpo", {"trimtab": [result()]}, [], dtype="float32")
    assert report.write(told, tmp_path) == tmp_path / "dpo-float32.json"
    assert report.read_all(tmp_path) == [told]
    assert report.table([told]).row_count == 1
    with pytest.raises(FileNotFoundError, match="make bench"):
        report.read_all(tmp_path / "nothing")


def test_a_result_survives_the_way_between_processes(capsys: pytest.CaptureFixture[str]) -> None:
    print("a library's chatter")
    result(note="n").print()
    assert Result.parse(capsys.readouterr().out) == result(note="n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"rows": 4, "tokens": 40, "digest": "other"}}, "read other tokens"),
        ({"threads": 1}, "threads"),
        ({"figures": {"loss": 0.71, "grad_norm": 2.0}}, "loss of the first step is 0.7 and 0.71"),
        ({"figures": {"loss": 0.7, "grad_norm": 2.2}}, "grad_norm"),
    ],
)
def test_other_work_is_not_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        alternate.check_same_work(result(), result("trl best", **changes), "bfloat16")


ONLINE = {"reward": 4.0, "grad_norm": 2.0, "kl": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figures": {**ONLINE, "reward": 4.001}}, "reward of the first step is 4 and 4.001"),
        ({"figures": {**ONLINE, "grad_norm": 2.2}}, "grad_norm"),
        ({"figures": {**ONLINE, "kl": 0.01}}, "KL before the first step is 0 and 0.01"),
        ({"tokens": {"rows": 4, "tokens": 40, "digest": "d", "drawn": [11]}}, "read other tokens"),
    ],
)
def test_other_rollouts_are_not_compared(changes: dict[str, Any], message: str) -> None:
    tokens = {"rows": 4, "tokens": 40, "digest": "d", "drawn": [12]}
    ours, theirs = result(figures=ONLINE, tokens=tokens), result("trl best", figures=ONLINE, tokens=tokens)
    alternate.check_same_work(ours, theirs, "bfloat16", "rloo")
    with pytest.raises(RuntimeError, match=message):
        alternate.check_same_work(ours, replace(theirs, **changes), "bfloat16", "rloo")


def test_stages_add_up_to_the_step_and_their_medians_leave_the_warm_up_out() -> None:
    stages = {"sample": [5.0, 1.0, 1.0], "score": [0.0, 0.5, 0.0], "refer": [1.0, 0.0, 0.5]}
    parts = parts_of(stages, [9.0, 2.0, 4.0])
    assert parts["train"] == [3.0, 0.5, 2.5]
    told = report.summary("rloo", {"trimtab": [result(parts=parts)]}, [], dtype="float32")
    assert told["sides"]["trimtab"]["parts"] == {"sample": 1.0, "score": 0.25, "refer": 0.25, "train": 1.5}
    table, none = report.parts_table([told]), report.parts_table([report.summary("dpo", {"trimtab": [result()]}, [])])
    assert table is not None and table.row_count == 1 and none is None


def test_float32_is_compared_more_strictly() -> None:
    near = result("trl best", figures={"loss": 0.7014, "grad_norm": 2.0})
    alternate.check_same_work(result(), near, "bfloat16")
    with pytest.raises(RuntimeError, match="loss"):
        alternate.check_same_work(result(), near, "float32")
    alternate.check_same_work(result(), result("trl best"), "float32")


# ---- Steps


def job(kind: str, folder: str, scratch: Path, **changes: Any) -> Job:
    work = scaled(next(work for work in WORKS.values() if work.kind == kind), 0.1)
    rows = write_rows(scratch / f"{kind}.jsonl", written_rows(replace(work, items=4)))
    return Job(kind, kind, folder, str(rows), dtype="float32", steps=1, max_length=128, **changes)


@pytest.fixture(scope="module")
def reward_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reward") / "model"
    ours.save_reward_model(folder, str(path))
    return str(path)


@pytest.mark.parametrize("kind", list(ours.KINDS))
def test_every_kind_steps(kind: str, folder: str, reward_folder: str, tmp_path: Path) -> None:
    given = job(kind, reward_folder if kind == "reward" else folder, tmp_path)
    told = ours.run(given)
    rows = given.read_rows()
    answers = [row[key] for row in rows for key in ("chosen", "rejected", "completion") if key in row]
    texts = [row["prompt"] + row[key] for row in rows for key in ("chosen", "rejected", "completion") if key in row]
    assert len(told.seconds) == len(told.losses) == 2 and told.losses[1] < told.losses[0]
    assert told.tokens["tokens"] == sum(len(text) + 1 for text in texts)  # a token a byte, and the one that ends it
    assert told.tokens["distinct"] == sum(len(text) + 1 for text in answers) + sum(len(row["prompt"]) for row in rows)
    assert told.tokens["predicted"] == (0 if kind == "reward" else sum(len(text) + 1 for text in answers))
    assert told.tokens["looked_at"] == (told.tokens["tokens"] if kind == "kto" else 0)
    assert told.peak >= told.loaded > 0
    known = {"dpo": math.log(2), "kto": 0.5}
    assert told.losses[0] == pytest.approx(known.get(kind, told.losses[0]), rel=1e-6)


def online_job(kind: str, folder: str, scratch: Path, **changes: Any) -> Job:
    work = replace(WORKS[kind], items=3, prompt_words=4, answer_words=9)
    rows = write_rows(scratch / f"{kind}.jsonl", rows_of(work, tiny()[1], None))
    sizes = {"answers": 4, "new_tokens": 9, "steps": 2, "max_length": 128}
    return Job(kind, kind, folder, str(rows), dtype="float32", **sizes, **changes)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_online_steps_begin_with_the_fixed_answers_and_draw_the_others_in_full(
    kind: str, folder: str, tmp_path: Path
) -> None:
    given = online_job(kind, folder, tmp_path)
    told, rows = ours.run(given), given.read_rows()
    tokenizer = tiny()[1]
    answers = [ids for row in rows for ids in row["answers"]]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows for _ in range(4)]
    facts = token_facts([[*prompt, *ids] for prompt, ids in zip(prompts, answers, strict=True)])
    assert {name: told.tokens[name] for name in facts} == facts
    assert told.tokens["drawn"] == [12 * 9, 12 * 9] and told.tokens["predicted"] == 12 * 9
    assert told.tokens["distinct"] == 12 * 9 + sum(map(len, prompts[::4]))
    assert told.figures["reward"] == pytest.approx(sum(count_of_e([tokenizer.decode(a) for a in answers])) / 12)
    assert told.figures["kl"] == pytest.approx(0, abs=1e-6) and told.figures["ratio"] == pytest.approx(1, abs=1e-6)
    assert [sum(parts) for parts in zip(*told.parts.values(), strict=True)] == pytest.approx(told.seconds)
    assert told.figures["grad_norm"] > 0 and told.peak >= told.loaded > 0


def test_the_price_of_kl_moves_nothing_in_the_step_that_is_compared(folder: str, tmp_path: Path) -> None:
    free, priced = (ours.run(online_job("rloo", folder, tmp_path, beta=beta)) for beta in (0.0, 1.0))
    assert free.figures["grad_norm"] == pytest.approx(priced.figures["grad_norm"], rel=1e-5)


def test_sharing_changes_no_figure(folder: str, tmp_path: Path) -> None:
    shared, rows = (ours.run(job("dpo", folder, tmp_path, share=share)) for share in (True, False))
    assert (shared.laid_out, rows.laid_out) == (True, False)
    assert shared.tokens == rows.tokens
    assert shared.figures == pytest.approx(rows.figures, rel=1e-4, abs=1e-4)


def test_plain_sgd_can_take_adamws_place(folder: str, tmp_path: Path) -> None:
    told = ours.run(job("dpo", folder, tmp_path, optimizer="sgd", lr=1e-3))
    assert told.losses[1] < told.losses[0]


def in_this_process(arrangement: str, job: Job, scratch: Path) -> Result:
    job = replace(job, dtype="float32", **gpu.ARRANGEMENTS[arrangement])
    told = ours.run(job)
    gpu.check_arrangement(told, job)
    return told


@pytest.mark.parametrize("changes", [{"laid_out": False}, {"attention": "flex"}])
def test_an_arrangement_that_did_not_run_is_no_figure(changes: dict[str, Any]) -> None:
    asked = Job("dpo", "dpo", "model", "rows", share=True, attention="sdpa")
    told = result(laid_out=True, attention="sdpa")
    gpu.check_arrangement(told, asked)
    with pytest.raises(RuntimeError, match=r"cannot be shared|was asked for"):
        gpu.check_arrangement(replace(told, **changes), asked)


def test_the_gpu_command_runs_at_a_tiny_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "start", in_this_process)
    monkeypatch.setattr(gpu, "available", lambda device: ["shared, sdpa", "rows, sdpa"])
    told = gpu.gpu(gpu.Gpu(tiny=True, steps=1, out=str(tmp_path)))
    assert not [one for one in told if "failed" in one]
    assert [one["work"] for one in told] == ["dpo", "dpo", "reward", "reward"]
    for shared, rows in zip(told[::2], told[1::2], strict=True):
        assert shared["loss"] == pytest.approx(rows["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(rows["grad_norm"], rel=1e-4)
    assert json.loads((tmp_path / "gpu-tiny.json").read_text())["arrangements"] == told


def test_rows_of_the_gpu_command_have_exactly_their_tokens(tmp_path: Path) -> None:
    given = gpu.prepare(gpu.TINY, "dpo", gpu.Gpu(tiny=True, prompt_tokens=20, answer_tokens=6), "cpu", tmp_path)
    told = ours.run(replace(given, dtype="float32", steps=1))
    counts = gpu.run_counts(given, shared=True)
    assert (told.tokens["distinct"], told.tokens["predicted"]) == (counts.tokens, counts.predicted) == (2 * 32, 24)
    assert told.tokens["tokens"] == gpu.run_counts(given, shared=False).tokens == 4 * 26


def test_growth_measures_and_predicts_every_point(folder: str, tmp_path: Path) -> None:
    sizes = {"answer_tokens": 4, "rows": 4, "most_tokens": 24, "repeats": 1}
    config = growth.Growth(folder, (8, 16), (1, 2, 4), **sizes, dtype="float32", out=str(tmp_path))
    points = growth.growth(config)
    assert [(one.prompt, one.answers) for one in points] == [(p, n) for p in (8, 16) for n in (0, 2, 4)]
    assert points[0].seconds == points[0].predicted_seconds
    predicted = [one.predicted_seconds for one in points[3:]]
    assert predicted == sorted(predicted, reverse=True)
    assert len(json.loads((tmp_path / "growth.json").read_text())["points"]) == 6
    with pytest.raises(ValueError, match="--answers 3"):
        growth.growth(replace(config, answers=(3,)))


def test_passes_hold_all_rows_and_no_more_tokens_than_asked() -> None:
    from trimtab.models import make_policy

    policy = make_policy(*tiny(), dtype="float32", device="cpu")
    config = growth.Growth("tiny", answer_tokens=4, rows=8, most_tokens=40)
    for answers, share, expected in ((1, False, [3, 3, 2]), (2, True, [4, 4]), (4, True, [4, 4]), (8, True, [8])):
        passes = list(growth.passes(policy, 8, answers, config, share=share))
        assert [len(tokens) for tokens in passes] == expected
        prompts = [row.tolist() for tokens in passes for row in tokens.ids[:, :8]]
        assert all(prompts[i] == prompts[i - i % answers] for i in range(8))


# ---- Where time goes


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention under a mask, backward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention under a mask, forward"),
        ("aten::addmm", "matrix products of the layers and the head"),
        ("aten::mkldnn_linear", "matrix products of the layers and the head"),
        ("aten::zero_", "zeroing of new gradients"),
        ("aten::mul", profiling.REST),
        ("autograd::engine::evaluate_function: MmBackward0", profiling.REST),
    ],
)
def test_operators_belong_to_parts(operator: str, part: str) -> None:
    assert profiling.part_of(operator) == part


def test_shares_by_hand() -> None:
    found = profiling.shares({"aten::mm": 3.0, "aten::bmm": 1.0, "aten::mul": 5.0, "aten::copy_": 1.0})
    products, copies = list(profiling.PARTS)[2:4]
    assert list(found)[:2] == [products, copies] and list(found)[-1] == profiling.REST
    assert {part: share for part, share in found.items() if share} == {products: 0.4, copies: 0.1, profiling.REST: 0.5}


def test_the_profile_of_a_step_adds_up() -> None:
    found = profiling.profile_step(profiling.Profile(model="tiny", dtype="float32", scale=0.1))
    assert sum(found.values()) == pytest.approx(1) and list(found)[-1] == profiling.REST
    # A step has every part; which of them is large depends on the machine.
    assert set(found) == {*profiling.PARTS, profiling.REST} and min(found.values()) > 0
    with pytest.raises(ValueError, match="--hh-data FILE"):
        profiling.profile_step(profiling.Profile(work="dpo_hh", model="tiny"))


def test_sampling_is_measured_on_every_way(tmp_path: Path) -> None:
    sizes = {"prompts": 2, "answers": 2, "tokens": 3, "turns": 1, "threads": torch.get_num_threads()}
    sampling.sampling(sampling.Sampling("tiny", **sizes, dtype="float32", out=str(tmp_path)))
    found = json.loads((tmp_path / "sampling.json").read_text())["found"]
    assert set(found) == {"trimtab", "generate", "trimtab, any family", "products alone", "gap"}
    assert found["trimtab"]["times_ours"] == 1 and max(found["gap"].values()) < 1e-4
    with pytest.raises(ValueError, match="is 0: at least 1"):
        sampling.sampling(sampling.Sampling("tiny", turns=0))


# ---- What people type


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (alternate.Cpu(works=("dpp",)), ValueError, "--works dpp: give some of dpo"),
        (alternate.Cpu(peer_settings=("fast",)), ValueError, "--peer-settings fast: give some of best, defaults"),
        (alternate.Cpu(pairs=0), ValueError, "--pairs 0"),
        (alternate.Cpu(peer_python="nowhere/python"), FileNotFoundError, "make bench"),
        (alternate.Cpu(peer_settings=(), hh_data="nowhere.gz"), FileNotFoundError, "--hh-data nowhere.gz"),
    ],
)
def test_mistakes_are_told_before_anything_runs(config: alternate.Cpu, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        alternate.cpu(config)


def test_a_process_that_fails_says_why() -> None:
    code = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"ended with status 3\nthe reason"):
        alternate.run([sys.executable, "-c", code])


def test_the_peer_is_pinned() -> None:
    lines = (ROOT / "benchmarks" / "requirements-trl.txt").read_text().splitlines()
    assert "trl==1.16.0" in lines and "-c ../constraints.txt" in lines


def test_the_peers_side_needs_nothing_of_trimtab() -> None:
    for name in ("peer_trl.py", "process.py", "__init__.py"):
        text = (ROOT / "benchmarks" / name).read_text()
        assert "import trimtab" not in text and "from trimtab" not in text


SIDE_BY_SIDE = ["dpo", "reward", "sft", "kto", "rloo", "grpo"]


@pytest.mark.slow
def test_both_sides_do_the_same_work(tmp_path: Path) -> None:
    """Needs the peer's environment, which `make bench` makes; without it, this side alone."""
    peer = ["best", "defaults"] if PEER_PYTHON.exists() else []
    command = [sys.executable, "-m", "benchmarks", "cpu", "--model", "tiny", "--works", *SIDE_BY_SIDE]
    flags = ["--pairs", "1", "--steps", "1", "--scale", "0.2", "--dtype", "float32", "--out", str(tmp_path)]
    asked = [*command, *flags, "--peer-python", str(PEER_PYTHON), "--peer-settings", *peer]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = report.read_all(tmp_path)
    assert {one["work"] for one in told} == set(SIDE_BY_SIDE)
    assert all(set(one["sides"]) == {"trimtab", *(f"trl {name}" for name in peer)} for one in told)


@pytest.mark.slow
def test_the_gpu_command_runs_as_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tiny", "--steps", "1", "--works", "dpo"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    arrangements = json.loads((tmp_path / "gpu-tiny.json").read_text())["arrangements"]
    assert not [one for one in arrangements if "failed" in one]
