"""Sinks of --track: what they get is what the run's files say, once, also after a resume; they never cost a run."""

import json
import math
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest

from trimtab import parallel, tracking
from trimtab.cli import main
from trimtab.recipes import training
from trimtab.run import Run
from trimtab.tracking import GROUPS, SINKS, SinkName, open_sink, values_of

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
FEEDBACK = [{"prompt": f"Say {i}.", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(8)]
OFFLINE = ["--batch-size", "4", "--lr", "0.01"]
ONLINE = ["--prompts-per-step", "2", "--max-new-tokens", "16", "--reward", "length"]
COMMANDS = {
    "sft": (PAIRS, OFFLINE),
    "reward": (PAIRS, OFFLINE),
    "dpo": (PAIRS, OFFLINE),
    "kto": (FEEDBACK, OFFLINE),
    "rloo": (PAIRS, ONLINE),
    "online-dpo": (PAIRS, [*ONLINE[:-2], "--judge", "rule:length"]),
    "raft": (PAIRS, ONLINE),
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(folder: Path, *flags: str, command: str = "dpo", steps: int = 4) -> int:
    """A small run in `folder`/run that is evaluated and saved every second step."""
    data, own = COMMANDS[command]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    fixed = ["--model", "tiny", "--data", str(file), "--dtype", "float32", "--device", "cpu", "--samples", "2"]
    often = ["--eval-data", str(file), "--eval-every", "2", "--save-every", "2", "--steps", str(steps)]
    return main([command, *fixed, *often, *own, "--out", str(folder / "run"), *flags])


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The series of figures that the files of a run hold, by the names that sinks know."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file, group in list(GROUPS.items())[:2]:
        for row in rows(run / file):
            for name, value in row.items():
                if name != "step" and value is not None:
                    found.setdefault(f"{group}/{name}", []).append((row["step"], value))
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


# ---- TensorBoard itself


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The figures that TensorBoard shows of a run."""
    return {tag: [(step, value.item()) for step, value in series] for tag, series in shown(run, "scalars").items()}


def texts(run: Path) -> dict[str, list[tuple[int, str]]]:
    """The texts that TensorBoard shows of a run."""
    found = shown(run, "text").items()
    return {
        tag.removesuffix("/text_summary"): [(step, value.item().decode()) for step, value in some]
        for tag, some in found
    }


def shown(run: Path, plugin: str) -> dict[str, list[tuple[int, Any]]]:
    """What one part of TensorBoard reads from a run's event files, with the class that its server reads them by."""
    folder = "tensorboard.backend.event_processing"
    reader = pytest.importorskip(f"{folder}.plugin_event_accumulator")
    every = reader.EventAccumulator(str(run / "tensorboard"), tensor_size_guidance={plugin: 0}).Reload()
    values = pytest.importorskip("tensorboard.util.tensor_util")
    return {
        tag: [(one.step, values.make_ndarray(one.tensor_proto)) for one in every.Tensors(tag)]
        for tag in every.Tags()["tensors"]
        if every.SummaryMetadata(tag).plugin_data.plugin_name == plugin
    }


def assert_shows_the_files(run: Path) -> None:
    found, written = scalars(run), expected(run)
    assert found.keys() == written.keys() and {"train/loss", "eval/accuracy"} <= found.keys()
    for name, series in written.items():
        assert [step for step, _ in found[name]] == [step for step, _ in series], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in series], rel=1e-6), name


def test_tensorboard_shows_what_the_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    assert train(tmp_path, "--track", "tensorboard") == 0
    run = tmp_path / "run"
    assert_shows_the_files(run)
    assert len(scalars(run)["train/loss"]) == 4 and len(scalars(run)["eval/loss"]) == 3
    found = texts(run)
    assert [step for step, _ in found["samples/1"]] == [step for step, _ in found["samples/2"]] == [0, 4]
    first = rows(run / "samples.jsonl")[0]
    assert first["prompt"] in found["samples/1"][0][1] and "    -->" in found["samples/1"][0][1]
    [(_, config)] = found["config"]
    assert '"command": "dpo"' in config
    assert "--track" not in capsys.readouterr().err


def test_tensorboard_goes_on_without_doubled_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train(tmp_path, "--track", "tensorboard", steps=6) == 0
    assert train(tmp_path, "--track", "tensorboard", "--resume-from", "step-00000004", steps=6) == 0
    run = tmp_path / "run"
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert_shows_the_files(run)
    assert len(texts(run)["config"]) == 1 and [step for step, _ in texts(run)["samples/1"]] == [0, 6]


def test_a_run_that_is_replaced_is_tracked_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for _ in range(2):
        assert train(tmp_path, "--track", "tensorboard", "--overwrite", steps=2) == 0
    assert_shows_the_files(tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


# ---- Services, by stand-ins with the signatures that their documentation has


@dataclass
class Service:
    """A stand-in for the package of a service: what it was told, run by run, and when it is to fail."""

    opened: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    finished: int = 0
    fails_at: float = math.inf

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        if step >= self.fails_at:
            raise ConnectionError("no route to the [service]")
        self.logged.append((step, dict(data)))

    def finish(self) -> None:
        self.finished += 1

    def open(self, **arguments: Any) -> SimpleNamespace:
        self.opened.append(arguments)
        return SimpleNamespace(log=self.log, finish=self.finish)

    @property
    def series(self) -> dict[str, list[tuple[int, float]]]:
        """The figures that it was told."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, data in self.logged:
            for name, value in data.items():
                if isinstance(value, float):
                    found.setdefault(name, []).append((step, value))
        return found


def put_in_place(service: Service, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)

    def wandb_init(*, entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None, mode=None):
        assert dir is not None and Path(dir).is_dir() and not set(id or "") & set("/\\#?%:")
        return service.open(project=project, id=id, name=name, config=config, resume=resume)

    def trackio_init(project, name=None, group=None, space_id=None, config=None, resume="never", settings=None):
        return service.open(project=project, id=name, name=name, config=config, resume=resume)

    module.init = {"wandb": wandb_init, "trackio": trackio_init}[name]
    module.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Service]:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    found = Service()
    put_in_place(found, request.param, monkeypatch)
    return request.param, found


def test_a_service_gets_what_the_files_say(service: tuple[str, Service], tmp_path: Path) -> None:
    name, told = service
    assert train(tmp_path, "--track", name) == 0
    assert told.series == expected(tmp_path / "run")
    [opened] = told.opened
    assert opened["project"] == "trimtab" and opened["name"].startswith("run") and opened["resume"] == "allow"
    assert opened["config"]["command"] == "dpo" and opened["config"]["track"] == [name]
    samples = [data for _, data in told.logged if "samples/2" in data]
    text = samples[0]["samples/2"] if name == "trackio" else samples[0]["samples/2"].data[0][0]
    second = rows(tmp_path / "run" / "samples.jsonl")[1]
    assert len(samples) == 2 and text == f"{second['prompt']}\n\n--> {second['response']}"
    steps = [step for step, _ in told.logged]
    assert steps == sorted(steps) and told.finished == 1  # a service takes no step below its last one


def test_a_service_goes_on_with_the_same_run(service: tuple[str, Service], tmp_path: Path) -> None:
    name, told = service
    assert train(tmp_path, "--track", name, steps=6) == 0
    before = [*told.logged]
    assert train(tmp_path, "--track", name, "--resume-from", "step-00000004", steps=6) == 0
    assert told.logged == before  # it has all of it: on a CPU the same steps have the same figures
    first, again = told.opened
    assert first["id"] == again["id"] and again["config"] is None
    more = ["--schedule", "constant", "--warmup", "0"]
    assert train(tmp_path, "--track", name, "--overwrite", *more, steps=4) == 0
    assert train(tmp_path, "--track", name, "--resume", *more, steps=6) == 0
    assert told.opened[2]["id"] == told.opened[3]["id"] != first["id"]
    steps = [step for step, data in told.logged[len(before) :] if "train/loss" in data]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_outlives_its_sink(
    service: tuple[str, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, told = service
    told.fails_at = 2
    assert train(tmp_path, "--track", name) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("ConnectionError: no route to the [service]") == 1
    assert f"--track {name}: failed at step 2 and gets nothing more; the run itself goes on" in said
    # three steps, the evaluations of steps 2 and 4, two samples
    assert f"--track {name}: 7 rows were not tracked" in said
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 4
    assert [step for step, data in told.logged if "train/loss" in data] == [1]
    sent = json.loads((tmp_path / "run" / "tracking" / f"{name}.json").read_text())
    assert sent["missed"] == 7 and sent["steps"] == {"samples": 0, "eval": 0, "train": 1}


def test_a_resumed_run_sends_what_its_sink_missed(service: tuple[str, Service], tmp_path: Path) -> None:
    name, told = service
    told.fails_at = 3
    assert train(tmp_path, "--track", name) == 0
    told.fails_at = math.inf
    assert train(tmp_path, "--track", name, "--resume-from", "step-00000002") == 0
    assert told.series == expected(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "tracking" / f"{name}.json").read_text())["missed"] == 0


@pytest.mark.parametrize(("step", "missed"), [(0, 0), (2, 5)])
def test_a_sink_that_failed_at_once_gets_all_only_from_the_start(
    step: int, missed: int, service: tuple[str, Service], tmp_path: Path
) -> None:
    name, _ = service
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / f"{name}.json").write_text('{"identity": "x", "steps": {}, "missed": 5}')
    sink = open_sink(name, tmp_path, step)
    sink.close()
    assert sink.sent.missed == missed


def test_a_sink_that_cannot_be_opened_ends_the_run_before_its_first_step(
    service: tuple[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, told = service
    monkeypatch.setattr(told, "open", lambda **arguments: {}["account"])
    # The stand-in looks `open` up when it is called.
    assert train(tmp_path, "--track", name) == 2
    assert f"--track {name} cannot be opened. KeyError: 'account'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sink_that_cannot_be_closed_costs_nothing(
    service: tuple[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, told = service
    monkeypatch.setattr(told, "finish", lambda: 1 / 0)
    assert train(tmp_path, "--track", name, steps=2) == 0
    assert f"--track {name}: failed at the end" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "report.html").exists()


def test_a_project_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Service()
    put_in_place(told, "wandb", monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "ships")
    assert train(tmp_path, "--track", "wandb", steps=2) == 0
    assert told.opened[0]["project"] == "ships"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_tracks(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Service(), Service()
    put_in_place(first, "wandb", monkeypatch)
    put_in_place(second, "trackio", monkeypatch)
    assert train(tmp_path, "--track", "wandb", "trackio", command=command, steps=2) == 0
    assert first.series == second.series == expected(tmp_path / "run")
    assert first.series["train/loss"][0][0] == 1


# ---- Around them


def test_every_sink_has_its_name() -> None:
    assert tuple(SINKS) == get_args(SinkName)


def test_only_what_was_measured_is_sent() -> None:
    row = {"step": 3, "loss": 0.5, "kl": math.nan, "margin": -math.inf, "pairs": 4, "accuracy": None}
    assert values_of("train", row, 1) == {"train/loss": 0.5, "train/pairs": 4.0}


def test_other_files_are_not_sent(tmp_path: Path, service: tuple[str, Service]) -> None:
    name, told = service
    (tmp_path / "config.yaml").write_text("command: dpo\n")
    sink = open_sink(name, tmp_path, 0)
    sink("rollouts.jsonl", {"rollout": 1, "reward": 1.0})
    sink("metrics.jsonl", {"step": 1, "loss": 1.0})
    sink.close()
    assert told.series == {"train/loss": [(1, 1.0)]}


def test_one_rank_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(training, "open_sinks", lambda names, directory, step: opened.append(step) or [])
    config, run = SimpleNamespace(run=SimpleNamespace(track=("wandb",))), Run(tmp_path, 0, step=7)
    training.track(run, config)
    monkeypatch.setattr(parallel, "is_first", lambda: False)
    training.track(run, config)
    assert opened == [7]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"identity": "x", "steps": [], "missed": 0}',
        '{"identity": 1, "steps": {}, "missed": 0}',
        '{"identity": "x", "steps": {}, "missed": 0, "more": 1}',
        '{"identity": "x", "steps": {"train": true}, "missed": 0}',
    ],
)
def test_a_damaged_note_is_named(
    content: str, service: tuple[str, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _ = service
    assert train(tmp_path, "--track", name, steps=4) == 0
    (tmp_path / "run" / "tracking" / f"{name}.json").write_text(content)
    assert train(tmp_path, "--track", name, "--resume-from", "step-00000002", steps=4) == 2
    assert f"{name}.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_package_is_told_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda asked: None)
    assert train(tmp_path, "--track", name) == 2
    assert f"pip install {name}" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_sink_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--track", "wandb", "wandb") == 2
    assert "wandb is named twice" in capsys.readouterr().err
