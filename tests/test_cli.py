"""The command line as a person meets it: runs that repeat, mistakes that are told in one message, and quick help."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.cli import COMMANDS, expand_config, main
from trimtab.recipes.dpo import Dpo

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
DEMONSTRATIONS = [{"prompt": f"Say {i}.", "completion": f"yes {i}"} for i in range(12)]
FEEDBACK = [{"prompt": f"Say {i}.", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(12)]
RANKINGS = [{"prompt": f"Say {i}.", "completions": [f"yes {i}", f"maybe {i}", f"no {i}"]} for i in range(12)]
FAST = ["--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--steps", "3"]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", PAIRS)


def train(command: str, data: str, out: Path, *flags: str) -> None:
    assert main([command, "--model", "tiny", "--data", data, "--out", str(out), *FAST, *flags]) == 0


@pytest.mark.parametrize(
    ("command", "rows", "flags"),
    [
        ("sft", DEMONSTRATIONS, []),
        ("sft", DEMONSTRATIONS, ["--no-packing"]),
        ("reward", PAIRS, []),
        ("reward", RANKINGS, []),
        ("dpo", PAIRS, ["--loss", "ipo", "--loss-args", "tau=0.2"]),
        ("dpo", PAIRS, ["--loss", "dpo+0.2*preferred_ft", "--reference", "live", "--lora-rank", "4"]),
        ("dpo", PAIRS, ["--reference", "moving", "--reference-args", "alpha=0.5", "every=1"]),
        ("kto", FEEDBACK, ["--loss-args", "undesirable_weight=1.2"]),
    ],
)
def test_a_run_repeats_to_the_last_bit(command: str, rows: list[dict], flags: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    first, again = tmp_path / "first", tmp_path / "again"
    train(command, data, first, *flags, "--eval-data", data, "--save-every", "2")
    assert main([command, "--config", str(first / "config.yaml"), "--out", str(again)]) == 0
    assert losses(first) == losses(again) and len(losses(first)) == 3
    assert (first / "evals.jsonl").read_text() == (again / "evals.jsonl").read_text()
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (first, again)]
    assert weights[0] == weights[1]
    assert (first / "checkpoints" / "step-00000002" / "model.safetensors").exists()
    environment = json.loads((first / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["versions"]["torch"]
    assert "<html" in (first / "report.html").read_text()[:200]


def test_a_short_run_scores_no_more_references_than_it_needs(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("dpo", pairs, tmp_path / "run", "--steps", "1")
    assert "reference log-probabilities 4/4" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_stored_references_change_nothing_wherever_they_come_from(
    command: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Computed, read, computed after a shorter run, and not kept at all: the same losses to the last bit."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    flags = ["--eval-data", data, "--lr", "0.01", "--steps", "2"]
    for name in ("computed", "read"):
        train(command, data, tmp_path / name, *flags)
    told = capsys.readouterr().err
    counts = re.findall(r"reference log-probabilities: (\d+) of (\d+) from", told)
    assert [found for found, _ in counts] == ["0", "0", *(wanted for _, wanted in counts[:2])]
    assert [int(wanted) for _, wanted in counts[:2]] == {"dpo": [8, 12], "kto": [8, 24]}[command]
    shutil.rmtree(cache / "references")
    train(command, data, tmp_path / "short", *flags, "--steps", "1")
    train(command, data, tmp_path / "after a shorter one", *flags)
    shutil.rmtree(cache / "references")
    train(command, data, tmp_path / "not kept", *flags, "--no-reference-cache")
    assert not (cache / "references").exists()
    for name in ("read", "after a shorter one", "not kept"):
        assert losses(tmp_path / name) == losses(tmp_path / "computed")
        first, again = ((tmp_path / run / "evals.jsonl").read_text() for run in ("computed", name))
        assert first == again


def test_another_seed_and_loss_find_the_references_of_a_whole_pass(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("dpo", pairs, tmp_path / "one")
    train("dpo", pairs, tmp_path / "two", "--seed", "1", "--loss", "ipo", "--lora-rank", "2")
    assert "reference log-probabilities: 12 of 12 from" in capsys.readouterr().err


def test_gradient_checkpointing_changes_no_loss_and_is_told(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for choice in ("auto", "on", "off"):
        train("reward", pairs, tmp_path / choice, "--lr", "0.01", "--gradient-checkpointing", choice)
    told = capsys.readouterr().err
    for line in ("off: on a CPU", "on, as asked", "off, as asked"):
        assert f"gradient checkpointing {line}" in told
    environment = json.loads((tmp_path / "on" / "environment.json").read_text())
    assert environment["gradient_checkpointing"] == "on, as asked"
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-6)
    train("sft", pairs, tmp_path / "again", "--gradient-checkpointing", "on")
    assert main(["sft", "--config", str(tmp_path / "again"), "--out", str(tmp_path / "repeated")]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "repeated")


def test_a_cache_that_cannot_be_written_is_told_before_the_model_is_loaded(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    assert main(["dpo", "--model", "./model", "--data", pairs, "--out", str(tmp_path / "out")]) == 2
    assert "--no-reference-cache" in capsys.readouterr().err


def test_an_override_beats_the_config(pairs: str, tmp_path: Path) -> None:
    train("dpo", pairs, tmp_path / "a")
    config = str(tmp_path / "a" / "config.yaml")
    assert main(["dpo", "--config", config, "--out", str(tmp_path / "b"), "--steps", "1", "--seed", "3"]) == 0
    assert len(losses(tmp_path / "b")) == 1


def test_the_seed_changes_the_order(pairs: str, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        train("dpo", pairs, tmp_path / seed, "--seed", seed, "--lr", "0.01")
    assert losses(tmp_path / "1")[1:] != losses(tmp_path / "2")[1:]


def test_dpo_starts_at_ln_2_from_every_kind_of_start(pairs: str, tmp_path: Path) -> None:
    train("sft", pairs, tmp_path / "sft", "--lora-rank", "4", "--lr", "0.01")
    starts: dict[str, list[str]] = {
        "full": ["tiny"],
        "lora": ["tiny", "--lora-rank", "4"],
        "lora on an sft lora": [str(tmp_path / "sft"), "--lora-rank", "4"],
        "full, live": [str(tmp_path / "sft"), "--reference", "live"],
        "lora, live": [str(tmp_path / "sft"), "--reference", "live", "--lora-rank", "4"],
    }
    for name, (model, *flags) in starts.items():
        out = tmp_path / name
        assert main(["dpo", "--model", model, "--data", pairs, "--out", str(out), *FAST, *flags]) == 0
        assert losses(out)[0] == pytest.approx(0.69314718, abs=1e-6), name


def test_the_chain_of_commands(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("reward", pairs, tmp_path / "reward")
    train("dpo", pairs, tmp_path / "dpo")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Say 1."}, {"prompt": "Say 2."}])
    best, answers, scored = (str(tmp_path / name) for name in ("best.jsonl", "answers.jsonl", "scored.jsonl"))
    reward, policy, few = str(tmp_path / "reward"), str(tmp_path / "dpo"), ["--max-new-tokens", "5"]
    chosen = ["best-of-n", "--model", policy, "--reward", reward, "--data", prompts, "-n", "4", "--out", best]
    assert main([*chosen, *few]) == 0
    rows = [json.loads(line) for line in Path(best).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Say 1.", "Say 2."]
    assert all(row["reward"] == max(row["rewards"]) and len(row["rewards"]) == 4 for row in rows)
    again = str(tmp_path / "again.jsonl")
    assert main(["score", "--reward", reward, "--data", best, "--out", again]) == 0
    rescored = [json.loads(line) for line in Path(again).read_text().splitlines()]
    assert any(row.get("finished") is False for row in rescored), "five tokens cut some answer"
    # One answer is one row of tokens to both commands; bf16 leaves a little.
    assert [row["reward"] for row in rescored] == pytest.approx([row["reward"] for row in rows], abs=0.02)
    assert main(["generate", "--model", policy, "--data", prompts, "--out", answers, *few]) == 0
    assert main(["score", "--reward", reward, "--data", answers, "--out", scored]) == 0
    assert all(isinstance(json.loads(line)["reward"], float) for line in Path(scored).read_text().splitlines())
    implicit = str(tmp_path / "implicit.jsonl")
    assert main(["score", "--reward", f"implicit:{policy}", "--data", pairs, "--out", implicit]) == 0
    assert len(json.loads(Path(implicit).read_text().splitlines()[0])["reward"]) == 2
    capsys.readouterr()
    assert main(["evaluate", "reward", "--reward", reward, "--data", pairs, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"]["value"] <= 1
    assert main(["data", "check", pairs, "--against", pairs, "--model", "tiny"]) == 0
    assert main(["data", "show", pairs, "--model", "tiny"]) == 0
    assert main(["report", reward, policy, "--out", str(tmp_path / "page.html")]) == 0


def test_several_rewards_are_weighed_and_added(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "four", "answer": "Four "},
        {"prompt": "b", "completion": "no", "answer": "x"},
    ]
    given, out = write(tmp_path / "answers.jsonl", rows), tmp_path / "scored.jsonl"
    several = [
        "--reward",
        "length",
        "exact-match",
        "ensemble:min(sentiment,length)",
        "--reward-weights",
        "-0.5",
        "2",
        "1",
    ]
    assert main(["score", *several, "--data", given, "--out", str(out)]) == 0
    # "no" has a negative sentiment, "four" none: min(0, 4) = 0 and min(s, 2) = s.
    first, second = (json.loads(line)["reward"] for line in out.read_text().splitlines())
    assert first == -0.5 * 4 + 2 * 1 + 0
    assert -2 < second < -1


def test_best_of_n_chooses_among_the_answers_that_the_reward_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = """
def first_kept(prompts, completions):
    return [None if prompt == "second" or not i else -i for i, prompt in enumerate(prompts)]
"""
    (tmp_path / "rewards_that_leave_out.py").write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": name} for name in ("first", "second", "third")])
    best, drawn = tmp_path / "best.jsonl", tmp_path / "drawn.jsonl"
    sampling = ["--model", "tiny", "--data", prompts, "--max-new-tokens", "6"]
    choosing = ["--reward", "py:rewards_that_leave_out:first_kept", "-n", "4", "--out", str(best)]
    assert main(["best-of-n", *sampling, *choosing]) == 0
    assert "left out 5 of 12 answers; 1 prompts" in " ".join(capsys.readouterr().err.split())
    assert main(["generate", *sampling, "--num-answers", "4", "--out", str(drawn)]) == 0
    rows, answers = ([json.loads(line) for line in path.read_text().splitlines()] for path in (best, drawn))
    assert [(row["prompt"], row["rewards"]) for row in rows] == [
        ("first", [None, -1.0, -2.0, -3.0]),
        ("third", [-8.0, -9.0, -10.0, -11.0]),
    ]
    assert [(row["reward"], row["completion"]) for row in rows] == [
        (-1.0, answers[1]["completion"]),
        (-8.0, answers[8]["completion"]),
    ]


def test_a_reward_that_leaves_an_answer_out_cannot_score_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards_of_none.py").write_text("def none(completions):\n    return [None for text in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    given, out = write(tmp_path / "answers.jsonl", DEMONSTRATIONS), tmp_path / "scored.jsonl"
    assert main(["score", "--reward", "py:rewards_of_none:none", "--data", given, "--out", str(out)]) == 2
    assert re.search(r"none gave None for the answer .*answers\.jsonl:1", capsys.readouterr().err, re.DOTALL)
    assert not out.exists()


MISTAKES = {
    "no such file": (["dpo", "--data", "nowhere.jsonl"], r"nowhere\.jsonl"),
    "empty file": (["dpo", "--data", "{empty}"], r"empty\.jsonl.*no rows"),
    "missing column": (["dpo", "--data", "{demonstrations}"], r"rejected"),
    "not a string": (["sft", "--data", "{numbers}"], r"numbers\.jsonl:1.*completion"),
    "same answer twice": (["dpo", "--data", "{same}"], r"same\.jsonl:1"),
    "unknown loss": (["dpo", "--data", "{pairs}", "--loss", "dop"], r"dop.*dpo"),
    "unknown argument": (["dpo", "--data", "{pairs}", "--loss-args", "bata=1"], r"bata.*beta"),
    "argument out of range": (["dpo", "--data", "{pairs}", "--loss-args", "beta=-1"], r"beta"),
    "inert reference arguments": (["dpo", "--data", "{pairs}", "--reference-args", "alpha=1"], r"moving"),
    "a reference that nothing reads": (
        ["dpo", "--data", "{pairs}", "--loss", "simpo", "--reference", "live"],
        r"simpo",
    ),
    "nothing is kept": (
        ["dpo", "--data", "{pairs}", "--reference", "live", "--no-reference-cache"],
        r"--reference stored",
    ),
    "nothing is read": (["dpo", "--data", "{pairs}", "--loss", "simpo", "--no-reference-cache"], r"reads it"),
    "a reference that never moves": (["dpo", "--data", "{pairs}", "--reference", "moving"], r"every=512.*never"),
    "steps and epochs": (["dpo", "--data", "{pairs}", "--steps", "3", "--epochs", "1"], r"--epochs"),
    "epochs without end": (["dpo", "--data", "{pairs}", "--epochs", "inf"], r"--epochs inf"),
    "empty data": (["dpo", "--data", ""], r"--data is empty"),
    "no decay": (["dpo", "--data", "{pairs}", "--weight-decay", "nan"], r"--weight-decay"),
    "reference that stands": (
        ["dpo", "--data", "{pairs}", "--reference", "moving", "--reference-args", "every=0"],
        r"every",
    ),
    "no such reference": (["dpo", "--data", "{pairs}", "--ref-model", "./nowhere"], r"nowhere"),
    "a batch of one": (["kto", "--data", "{pairs}", "--batch-size", "1"], r"at least 2"),
    "device of another kind": (["dpo", "--data", "{pairs}", "--device", "meta"], r"--device meta"),
    "evaluation without data": (["dpo", "--data", "{pairs}", "--eval-every", "3"], r"--eval-data"),
    "too long": (["dpo", "--data", "{pairs}", "--max-length", "8"], r"--overlong"),
    "no rows left": (["dpo", "--data", "{pairs}", "--max-length", "8", "--overlong", "drop"], r"nothing is left"),
    "no steps": (["dpo", "--data", "{pairs}", "--steps", "0"], r"--steps 0"),
    "unknown model": (["dpo", "--data", "{pairs}", "--model", "./nowhere"], r"nowhere"),
    "out is taken": (["dpo", "--data", "{pairs}", "--out", "{taken}"], r"already holds.*--overwrite"),
    "unknown key in config": (["dpo", "--data", "{pairs}", "--config", "{config}"], r"learning_rate"),
    "no such config": (["dpo", "--data", "{pairs}", "--config", "nowhere.yaml"], r"nowhere\.yaml"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(
    name: str, tmp_path: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("keep me")
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    places = {
        "pairs": pairs,
        "empty": write(tmp_path / "empty.jsonl", []),
        "demonstrations": write(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS),
        "numbers": write(tmp_path / "numbers.jsonl", [{"prompt": "a", "completion": 3}]),
        "same": write(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}]),
        "taken": str(tmp_path / "taken"),
        "config": str(tmp_path / "config.yaml"),
    }
    given, expected = MISTAKES[name]
    arguments = [word.format(**places) for word in given]
    for flag, value in {"--model": "tiny", "--out": str(tmp_path / "out")}.items():
        arguments += [] if flag in arguments else [flag, value]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert re.search(expected, told, re.DOTALL), told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists() and (tmp_path / "taken" / "precious.txt").exists()


def test_unknown_command_and_near_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dop"]) == 2
    assert "dpo" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "data check" in capsys.readouterr().err


def test_config_files_expand_to_flags_that_the_command_line_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("command: dpo\nlr: 1e-5\nloss_args: [beta=0.2]\nskip_invalid: true\nsteps: null\n")
    assert expand_config(Dpo, ["--config", str(path), "--lr", "2"], "dpo") == [
        "--loss-args", "beta=0.2", "--skip-invalid", "--lr", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*name.split(), "--help"])
    assert exit_status.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[name].about[1:30] in shown.replace("\n", " ") or len(shown) > 200


def test_help_has_no_indented_paragraph_and_names_what_no_config_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for name, told in (
        ("chat", "\n\nType a message"),
        ("dpo", "--nproc N"),
        ("chat", "[OPTIONS] MODEL"),
        ("dpo", "--config RUN"),
    ):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert told in capsys.readouterr().out


@pytest.mark.parametrize("group", ["evaluate", "data"])
def test_help_of_a_group_lists_its_commands_alone(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group, "--help"]) == 0
    listed = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [name for name in COMMANDS if name.startswith(f"{group} ")] and len(listed) > 1


def test_help_is_quick_and_imports_no_torch() -> None:
    probe = (
        "import sys; from trimtab.cli import main; main({}); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    began = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-c", probe.format("['--help']")], capture_output=True, text=True, check=True
    ).stdout
    assert time.perf_counter() - began < 2  # half a second on an idle machine; tests share theirs
    assert "quickstart" in shown and shown.strip().endswith("[]")


def test_a_run_is_never_replaced_by_a_run_on_itself(pairs: str, tmp_path: Path) -> None:
    train("dpo", pairs, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    run = str(tmp_path / "run")
    for flags in (["--model", run], ["--model", "tiny", "--ref-model", run]):
        assert main(["dpo", *flags, "--data", pairs, "--out", run, "--overwrite", *FAST]) == 2
    assert main(["report", run, "--out", pairs]) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_answers_that_were_cut_claim_no_end(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Say 1.", "chosen": "old", "rejected": "older"}])
    out = str(tmp_path / "answers.jsonl")
    assert main(["generate", "--model", "tiny", "--data", prompts, "--out", out, "--max-new-tokens", "3"]) == 0
    [row] = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert row["finished"] is False and "chosen" not in row
    from trimtab import data
    from trimtab.models import load_tokenizer
    from trimtab.records import Demonstration
    from trimtab.tokens import encode, eos_id

    tokenizer = load_tokenizer("tiny")
    [cut] = data.load(out, Demonstration).records
    [item], _ = encode(tokenizer, [cut], max_length=100)
    assert item.rows[0].ids[-1] != eos_id(tokenizer) and item.rows[0].response[-1]


def test_a_policy_run_leaves_texts_to_read(pairs: str, tmp_path: Path) -> None:
    train("dpo", pairs, tmp_path / "run", "--samples", "2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 3, 3] and rows[0]["prompt"] == rows[2]["prompt"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["arithmetic"] and environment["device"] == "cpu"
