"""Several ranks: two gloo processes give what one process gives, and none waits for one that failed."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from tests.on_ranks import run
from trimtab import parallel
from trimtab.batches import pieces
from trimtab.builtin import builtin_model
from trimtab.cli import main

ROOT = Path(__file__).parents[1]
WORDS = ("yes it is", "no", "perhaps so, as far as I can tell", "indeed", "I do not think so at all, sorry", "fine")
ROWS = [
    {
        "prompt": f"Say {i} please{' now' * (i % 4)}.",
        "chosen": f"{WORDS[i % 6]} {i}",
        "rejected": WORDS[(5 * i + 1) % 6],
        "answer": str(i),
    }
    for i in range(11)
]
FUNCTIONS = """
import pathlib
import time

def codes(completion_ids):
    return [float(sum(ids) % 97) / 10 for ids in completion_ids]

def some(completion_ids):
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 97) / 10 for ids in completion_ids]

def failing(prompts, completions):
    if any("Say 10" in str(prompt) for prompt in prompts):
        pathlib.Path("failed").write_text(str(time.time()))
        raise RuntimeError("the tenth is too much")
    return [float(len(text)) for text in completions]
"""
COMMON = ["--model", "tiny", "--dtype", "float32", "--device", "cpu", "--lr", "1e-4", "--samples", "1"]
# 11 items in batches of 4 leave one of 3; two rows a pass leave the ranks with unequally many.
OFFLINE = ["--data", "pairs.jsonl", "--batch-size", "4", "--micro-batch-rows", "2", "--steps", "3"]
ONLINE = ["--data", "prompts.jsonl", "--micro-batch-rows", "4", "--steps", "2", "--max-new-tokens", "5"]
ONLINE += ["--prompts-per-step", "3", "--group-size", "4", "--reward", "py:reward_functions:codes"]
EVALUATED = ["--eval-data", "pairs.jsonl", "--eval-every", "2"]

CASES: dict[str, tuple[str, list[str]]] = {
    "sft": ("sft", [*OFFLINE, "--data", "demonstrations.jsonl"]),
    "reward": ("reward", [*OFFLINE, *EVALUATED]),
    "dpo": ("dpo", [*OFFLINE, *EVALUATED, "--no-reference-cache"]),
    "kto": ("kto", [*OFFLINE, *EVALUATED, "--no-reference-cache"]),
    "raft": ("raft", ONLINE),
    "online-dpo": ("online-dpo", ONLINE),
    "rloo": ("rloo", [*ONLINE, "--reward", "py:reward_functions:some", "--eval-data", "prompts.jsonl"]),
    "grpo": ("grpo", [*ONLINE, "--epochs-per-rollout", "2"]),
    "ppo": ("ppo", [*ONLINE, "--minibatches", "2", "--kl-target", "2", "--score-shape", "normalized"]),
}
LONGER: dict[str, tuple[str, list[str]]] = {
    "fewer pairs than ranks": ("dpo", [*OFFLINE, "--batch-size", "1", "--no-reference-cache"]),
    "aot": ("dpo", [*OFFLINE, "--loss", "aot", "--no-reference-cache"]),
    "wpo": ("dpo", [*OFFLINE, "--loss", "wpo", "--no-reference-cache"]),
    "live": ("dpo", [*OFFLINE, "--reference", "live"]),
    "moving": ("dpo", [*OFFLINE, "--reference", "moving", "--reference-args", "every=2"]),
    "cached": ("dpo", OFFLINE),
    "checkpointed": ("dpo", [*OFFLINE, "--gradient-checkpointing", "on", "--no-reference-cache"]),
    "adapter": ("dpo", [*OFFLINE, "--lora-rank", "4", "--no-reference-cache"]),
    "adapter of a reward model": ("reward", [*OFFLINE, "--lora-rank", "4"]),
    "adapter online": ("rloo", [*ONLINE, "--lora-rank", "4", "--kl", "exact"]),
    "exact kl": ("rloo", [*ONLINE, "--kl", "exact"]),
    "remax": ("rl", [*ONLINE, "--algorithm", "remax"]),
    "reinforce_pp": ("rl", [*ONLINE, "--algorithm", "reinforce_pp"]),
    "critic first": ("ppo", [*ONLINE, "--critic-warmup", "1"]),
    "fewer prompts than ranks": ("rloo", [*ONLINE, "--prompts-per-step", "1"]),
}
APART: dict[str, tuple[str, list[str]]] = {
    "rloo": ("rloo", ["--eval-data", "prompts.jsonl"]),
    # The second rank has no answer to write, and takes part in the passes of the first.
    "one prompt": ("raft", ["--prompts-per-step", "1", "--max-new-tokens", "9", "--batch-rows", "3"]),
    "adapter": ("rloo", ["--lora-rank", "4"]),
}
WHOLE_ONLY = {"demonstrations beside": ("rloo", [*ONLINE, "--ptx-data", "demonstrations.jsonl", "--ptx-coef", "1"])}
PATIENCE = 300
"""Seconds for anything that is waited for; a loaded machine may need many times what it takes alone."""
NOT_FIGURES = {"seconds", "draw_seconds", "tokens_per_second", "prompt", "response"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, rewards and one cache folder, where commands run."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", ROWS)
    write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS])
    write(tmp_path / "demonstrations.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS])
    (tmp_path / "reward_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))


def on_ranks(cases: list[tuple[str, list[str]]], count: int = 2, *, room: bool = True) -> str:
    """Run commands under torchrun; what they say. Without `room`, no policy can be put together for sampling."""
    builtin_model("tiny")  # before processes join, as the command line does
    Path("cases.json").write_text(json.dumps({"cases": cases, "room": room}))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, "-m", *launcher, "-m", "tests.on_ranks", "cases.json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert told.returncode == 0, told.stderr[-6000:]
    return told.stdout + told.stderr


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(run: Path, name: str) -> list[dict[str, float]]:
    rows = lines_of(run, name)
    numbers = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    return [{key: value for key, value in row.items() if key not in NOT_FIGURES} for row in numbers]


def said(run: Path) -> list[tuple[str, str]]:
    """The prompts and answers of its samples."""
    return [(row["prompt"], row["response"]) for row in lines_of(run, "samples")]


def answers(run: Path) -> list[tuple[list[str], list[float]]]:
    """The answers and the rewards that each rollout tells."""
    rows = [row["answers"] for row in lines_of(run, "rollouts")]
    return [([a["text"] for a in row], [math.nan if a["reward"] is None else a["reward"] for a in row]) for row in rows]


def compare(one: Path, many: Path, near: float = 1e-5) -> None:
    """Losses and figures of every step, evaluations, answers and final weights are the same to 1e-5, or `near`."""
    assert lines_of(one, "metrics") and said(one) == said(many)
    for name in ("metrics", "evals", "samples"):
        for ours, theirs in zip(figures(one, name), figures(many, name), strict=True):
            assert theirs == pytest.approx(ours, rel=near, abs=near, nan_ok=True), (many, name, ours["step"])
    assert [texts for texts, _ in answers(one)] == [texts for texts, _ in answers(many)]
    for (_, ours), (_, theirs) in zip(answers(one), answers(many), strict=True):
        assert theirs == pytest.approx(ours, rel=near, abs=near, nan_ok=True)
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (one, many))
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.allclose(weights[name], others[name], rtol=0, atol=near), (many, name)


def check_cases(split: dict[str, tuple[str, list[str]]], whole: dict[str, tuple[str, list[str]]]) -> None:
    """Run cases on one rank, and with split or whole weights on two."""
    jobs: list[tuple[str, list[str]]] = []
    for shard, cases in {"full": split, "none": whole}.items():
        jobs += [
            (command, [*COMMON, *given, "--shard", shard, "--out", f"{shard}/{name}"])
            for name, (command, given) in cases.items()
        ]
    on_ranks(jobs)
    for name, (command, given) in {**split, **whole}.items():
        run(command, [*COMMON, *given, "--out", f"one/{name}"])
    for shard, cases in {"full": split, "none": whole}.items():
        for name in cases:
            compare(Path("one", name), Path(shard, name))


def test_two_ranks_give_what_one_gives() -> None:
    check_cases(CASES, {"ppo": CASES["ppo"]})
    told = [json.loads(Path(shard, "ppo", "environment.json").read_text()) for shard in ("full", "none")]
    assert [one["ranks"] for one in told] == [2, 2] and "split" in told[0]["shard"] and "copy" in told[1]["shard"]


@pytest.mark.parametrize("names", [["rloo", "one prompt"], pytest.param(["adapter"], marks=pytest.mark.slow)])
def test_where_the_policy_cannot_be_put_together_ranks_draw_the_same_with_split_weights(names: list[str]) -> None:
    cases = {name: (command, [*ONLINE, *flags]) for name, (command, flags) in APART.items() if name in names}
    said = on_ranks(
        [(command, [*COMMON, *given, "--out", f"many/{name}"]) for name, (command, given) in cases.items()], room=False
    )
    assert said.count("sampling with split weights") == 1
    for name, (command, given) in cases.items():
        run(command, [*COMMON, *given, "--out", f"one/{name}"])
        compare(Path("one", name), Path("many", name))


def test_a_reward_model_with_split_weights_gives_the_scores_of_a_whole_one() -> None:
    run("reward", [*COMMON, *OFFLINE, "--lr", "1e-2", "--out", "judge"])
    alone, mixed = (["--reward", "judge", *others] for others in ([], ["length", "--reward-weights", "1", "0.1"]))
    jobs = {"rloo": ("rloo", [*ONLINE, *alone]), "raft": ("raft", [*ONLINE, *mixed, "--prompts-per-step", "1"])}
    on_ranks([(command, [*COMMON, *given, "--out", f"many/{name}"]) for name, (command, given) in jobs.items()])
    for name, (command, given) in jobs.items():
        run(command, [*COMMON, *given, "--out", f"one/{name}"])
        compare(Path("one", name), Path("many", name))
        assert all(len(set(rewards)) > 1 for _, rewards in answers(Path("many", name)))


@pytest.mark.slow
def test_every_combination() -> None:
    check_cases(LONGER, {**CASES, **LONGER, **WHOLE_ONLY})


@pytest.mark.slow
def test_three_ranks() -> None:
    flags = [*COMMON, *CASES["dpo"][1]]
    run("dpo", [*flags, "--out", "one"])
    on_ranks([("dpo", [*flags, "--out", "three"])], count=3)
    compare(Path("one"), Path("three"))


# ---- Going on


RESUMED: dict[str, tuple[str, list[str]]] = {
    # The reference has moved when the run is cut, and moves again.
    "moving": ("dpo", [*OFFLINE, *EVALUATED, "--reference", "moving", "--reference-args", "every=2", "alpha=0.5"]),
    # The third step is the first of two updates on the same answers.
    "ppo": ("ppo", [*ONLINE, "--minibatches", "2", "--kl-target", "2", "--score-shape", "normalized"]),
    "adapter": ("reward", [*OFFLINE, *EVALUATED, "--lora-rank", "4", "--shard", "none"]),
}
SAVED = ["--steps", "5", "--save-every", "3", "--schedule", "linear"]


def test_a_resumed_run_is_the_unbroken_one_on_as_many_ranks_and_on_one() -> None:
    def jobs(folder: str, *flags: str) -> list[tuple[str, list[str]]]:
        return [
            (command, [*COMMON, *given, *SAVED, "--out", f"{folder}/{name}", *flags])
            for name, (command, given) in RESUMED.items()
        ]

    on_ranks(jobs("whole"))
    assert {path.name for path in Path("whole", "ppo", "checkpoints").iterdir()} == {"step-00000003", "step-00000005"}
    for folder in ("again", "alone"):
        shutil.copytree("whole", folder)
        for model in Path(folder).glob("*/model"):
            shutil.rmtree(model)
    on_ranks(jobs("again", "--resume-from", "step-00000003"))
    for command, flags in jobs("alone", "--resume-from", "step-00000003"):
        run(command, [flag for flag in flags if flag not in ("--shard", "none")])
    for name in RESUMED:
        compare(Path("whole", name), Path("again", name), near=1e-6)
        compare(Path("whole", name), Path("alone", name))
    ranks = [json.loads(Path(folder, "ppo", "environment.json").read_text()) for folder in ("again", "alone")]
    assert [[one["ranks"], one["resumed"][0]["ranks"]] for one in ranks] == [[2, 2], [2, 1]]


@contextmanager
def started(*command: str, log: str = "told") -> Iterator[subprocess.Popen[bytes]]:
    """A Python command while it runs, as in a terminal of its own; what it says goes into a file."""
    with Path(log).open("w") as told:
        launcher = subprocess.Popen([sys.executable, *command], stdout=told, stderr=told, start_new_session=True)
    try:
        yield launcher
    finally:
        for process in workers_of(launcher) if launcher.poll() is None else ():
            os.kill(process, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def wait_for_steps(launcher: subprocess.Popen[bytes], run: Path, steps: int = 1) -> None:
    """Until a run has taken some steps, or has ended."""
    metrics, until = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while launcher.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert time.monotonic() < until, "the run does not begin"
        time.sleep(0.02)


def workers_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The processes of the ranks."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def wait_for_start(launcher: subprocess.Popen[bytes], run: Path, times: int) -> None:
    """Until a run has been gone on with so many times."""
    until = time.monotonic() + PATIENCE
    while launcher.poll() is None and len(resumes(run)) < times:
        assert time.monotonic() < until, "the run is not gone on with"
        time.sleep(0.02)


def resumes(run: Path) -> list[Any]:
    """When, and with what, a run was gone on with."""
    return json.loads((run / "environment.json").read_text()).get("resumed", [])


TRIMTAB, TORCHRUN = ["-m", "trimtab"], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STOPPED = {
    "SIGTERM": ([*TRIMTAB, "sft", "--nproc", "2"], lambda launcher: launcher.terminate(), 143),
    # As a terminal sends it: to all that runs in it, and the ranks do not.
    "Ctrl-C": ([*TRIMTAB, "sft", "--nproc", "2"], lambda launcher: os.killpg(launcher.pid, signal.SIGINT), 130),
    "SIGTERM to one rank": (
        [*TRIMTAB, "sft", "--nproc", "2"],
        lambda launcher: os.kill(workers_of(launcher)[-1], signal.SIGTERM),
        143,
    ),
    "SIGTERM to torchrun": ([*TORCHRUN, *TRIMTAB, "sft"], lambda launcher: launcher.terminate(), None),
}
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in STOPPED if name != "SIGTERM"]


@pytest.mark.parametrize("how", ["SIGTERM", *SLOWLY])
def test_ranks_that_are_asked_to_stop_end_the_same_step_and_say_how_to_go_on(how: str) -> None:
    flags = [*COMMON, *CASES["sft"][1], "--steps", "40", "--lr", "1e-5", "--out", "run"]
    command, ask, status = STOPPED[how]
    with started(*command, *flags) as launcher:
        wait_for_steps(launcher, Path("run"))
        ask(launcher)
        assert launcher.wait(PATIENCE) == (status or launcher.returncode) != 0
    said, steps = Path("told").read_text(), len(lines_of(Path("run"), "metrics"))
    assert said.count("trimtab: stopped after step") == 1 and f"stopped after step {steps} of 40, as asked" in said
    assert "Traceback" not in said or status is None, "torchrun shows one of its own"
    assert [path.name for path in Path("run", "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    (typed,) = re.findall(r"^  trimtab (.*)$", said, re.MULTILINE)
    assert typed.endswith("--resume --nproc 2")
    again = trimtab(*shlex.split(typed))
    assert again.returncode == 0 and f"going on after step {steps}" in again.stderr, again.stderr
    assert [row["step"] for row in lines_of(Path("run"), "metrics")] == list(range(1, 41))
    run("sft", [*flags[:-1], "one"])
    compare(Path("one"), Path("run"))


@pytest.mark.slow
def test_a_finished_run_is_left_alone_by_all_ranks_and_that_is_no_error() -> None:
    flags = [*COMMON, *CASES["sft"][1], "--out", "run"]
    run("sft", flags)
    again = trimtab("sft", *flags, "--resume", "--nproc", "2")
    assert again.returncode == 0 and again.stderr.count("is finished (step 3)") == 1, again.stderr


def test_all_ranks_skip_the_step_that_one_of_them_cannot_take() -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    write(Path("broken.jsonl"), [*rows[:-1], {**rows[-1], "weight": 3e38}])
    flags = [*COMMON, *OFFLINE, "--data", "broken.jsonl", "--steps", "4", "--on-nonfinite", "skip"]
    jobs = [("sft", [*flags, "--shard", shard, "--out", shard]) for shard in ("full", "none")]
    on_ranks(jobs)
    run("sft", [*flags, "--out", "one"])
    assert [row.get("skipped") for row in lines_of(Path("one"), "metrics")] == [1, None, None, 2]
    compare(Path("one"), Path("full"))
    compare(Path("one"), Path("none"))


# ---- The command line


def trimtab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_reward_that_fails_on_one_rank_ends_all_with_its_message() -> None:
    flags = [*COMMON, *ONLINE, "--prompts-per-step", "11", "--reward", "py:reward_functions:failing", "--out", "run"]
    told = trimtab("raft", *flags, "--nproc", "2")
    assert told.returncode == 2 and time.time() - float(Path("failed").read_text()) < 20
    said = [line for line in told.stderr.splitlines() if line.startswith("trimtab: ")]
    assert len(said) == 1 and "rank " in said[0] and "the tenth is too much" in said[0], told.stderr
    assert "Traceback" not in told.stderr and not Path("run", "model").exists()


KILLED = {
    "offline": ("dpo", CASES["dpo"][1]),
    # Most of its time goes into rollouts.
    "online": ("rloo", [*ONLINE, "--max-new-tokens", "32"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_rank_that_is_killed_ends_the_others(kind: str) -> None:
    name, given = KILLED[kind]
    flags = [*COMMON, *given, "--steps", "100000", "--out", "run", "--nproc", "2"]
    with started(*TRIMTAB, name, *flags) as launcher:
        wait_for_steps(launcher, Path("run"))
        os.kill(workers_of(launcher)[-1], signal.SIGKILL)
        assert launcher.wait(30) in (2, 128 + signal.SIGKILL), "whoever is seen to end first gives the status"
    assert Path("told").read_text().splitlines()[-1].startswith("trimtab: rank ")


def node(port: int) -> list[str]:
    """torchrun on one of two nodes, this machine being both."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    return ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", *meeting]


@pytest.mark.slow
def test_two_nodes_go_on_after_a_rank_of_one_was_killed() -> None:
    flags = [*COMMON, *CASES["dpo"][1], "--steps", "40", "--save-every", "4", "--keep-last", "2"]
    run("dpo", [*flags, "--out", "one"])
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*node(port), *TRIMTAB, "dpo", *flags, "--out", "run", "--resume"]
    with started(*command) as first, started(*command, log="said") as second:
        wait_for_steps(first, Path("run"), 9)
        os.kill(workers_of(second)[0], signal.SIGKILL)
        wait_for_start(first, Path("run"), 1)
        told = "".join(Path(name).read_text()[-4000:] for name in ("told", "said"))
        assert (first.wait(PATIENCE), second.wait(PATIENCE)) == (0, 0), told
    assert len(resumes(Path("run"))) == 1
    compare(Path("one"), Path("run"))


@pytest.mark.slow
def test_torchrun_starts_ranks_again_after_one_was_killed_and_they_go_on() -> None:
    flags = [*COMMON, *CASES["dpo"][1], "--steps", "60", "--save-every", "4", "--keep-last", "2"]
    on_ranks([("dpo", [*flags, "--out", "unbroken"])])
    command = [*TORCHRUN, "--max-restarts", "2", *TRIMTAB, "dpo", *flags, "--out", "run", "--resume"]
    with started(*command) as launcher:
        for kills, steps in enumerate((9, 31), 1):
            wait_for_steps(launcher, Path("run"), steps)
            os.kill(workers_of(launcher)[kills % 2], signal.SIGKILL)
            wait_for_start(launcher, Path("run"), kills)
        assert launcher.wait(PATIENCE) == 0, Path("told").read_text()[-4000:]
    assert len(resumes(Path("run"))) == 2 and [row["step"] for row in lines_of(Path("run"), "metrics")][-1] == 60
    compare(Path("unbroken"), Path("run"), near=1e-6)


def test_what_several_processes_cannot_do_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {
        ("generate", "--model", "tiny", "--nproc", "2"): "runs in one process. In several run sft, reward, dpo",
        ("dpo", "--nproc", "none"): "--nproc none: a number",
        ("dpo", *COMMON, *OFFLINE, "--out", "run", "--shard", "full"): "--shard full has no effect on one process",
    }
    for arguments, message in refused.items():
        assert main(list(arguments)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:1"], "--device cuda:1: each of 2 processes has its own"),
        (["--ptx-data", "demonstrations.jsonl", "--ptx-coef", "1"], "--ptx-data"),
        (["--sampler", "vllm:http://127.0.0.1:9"], "--sampler vllm:http://127.0.0.1:9: 2 processes sample themselves"),
    ],
)
def test_flags_that_do_not_go_with_several_processes(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        run("rloo", [*COMMON, *ONLINE, "--out", "run", *flags])


def test_processes_that_start_again_meet_under_a_new_name() -> None:
    store = HashStore()
    store.set("name of 1", "of one that died before it was told")
    with ThreadPoolExecutor(3) as pool:
        starts = [list(pool.map(lambda i: parallel.name_of_start(store, i, 3), range(3))) for _ in range(3)]
    assert [len(set(names)) for names in starts] == [1, 1, 1] and len({names[0] for names in starts}) == 3


# ---- Who does what


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [[2] * 9, [1], [5, 1, 1, 4, 2], [1] * 20])
def test_every_item_counts_once_and_ranks_run_equally_often(
    rows: list[int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "ranks", lambda: count)
    plans = []
    for rank in range(count):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        plans.append(parallel.own_pieces(rows, 4))
    assert len({len(plan) for plan in plans}) == 1
    counted = [item for plan in plans for items, counts in plan if counts for item in items.tolist()]
    assert counted == list(range(len(rows)))
    for items in (items for plan in plans for items, _ in plan):
        assert len(items) == 1 or sum(rows[i] for i in items.tolist()) <= 4
    sizes = [sum(len(items) for items, counts in plan if counts) for plan in plans]
    assert max(sizes) - min(sizes) <= 1


def test_one_rank_has_everything_in_pieces() -> None:
    assert [items.tolist() for items, _ in parallel.own_pieces([2, 2, 2], 4)] == [[0, 1], [2]]
    assert list(pieces([2, 2, 2], 4)) == [range(2), range(2, 3)] and list(pieces([], 4)) == []
    assert parallel.gather(3) == [3] and parallel.over_ranks(list, [1, 2]) == [1, 2]
