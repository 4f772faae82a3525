"""Hostile models, templates, configs and run directories end a command with status 2 and one message, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.builtin import byte_tokenizer, tiny
from trimtab.cli import main
from trimtab.records import Message, Prompt
from trimtab.tokens import encode_prompt
from trimtab.weights import load_language_model, load_tokenizer, resolve

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONG = settings(FUZZ, max_examples=3000)
ROOT = Path(__file__).parents[1]


Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    network, tokenizer = tiny()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# ---- Models

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds list"),
    "config is too deep": (lambda f: (f / "config.json").write_text("[" * 10**6), "nested deeper than"),
    "config says a key twice": (
        lambda f: (f / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        "the key 'vocab_size' stands twice",
    ),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
    "a billion layers": (lambda f: change(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers: found"),
    "absurd widths": (lambda f: change(f / "config.json", hidden_size=2**40), "could not be loaded"),
    "absurd vocabulary": (lambda f: change(f / "config.json", vocab_size=10**12), "could not be loaded"),
    "widths of text": (lambda f: change(f / "config.json", hidden_size="many"), "could not be loaded"),
    "weights are cut": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors: not a readable safetensors file",
    ),
    "weights are empty": (lambda f: os.truncate(f / "model.safetensors", 0), "not a readable safetensors file"),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        "not a readable safetensors file",
    ),
    "an index that leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../b.safetensors"}}'),
        "expected for every tensor the name of a .safetensors file beside it",
    ),
    "an index that is a list": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}'),
        "weight_map: found ['model.safetensors'], expected",
    ),
    "an index of folders": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": ".."}}'),
        "weight_map: found '..', expected",
    ),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "could not be loaded"),
    "tokenizer of another shape": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "could not be loaded"),
    "config is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "is a pipe, expected an ordinary file",
    ),
    "a template of megabytes": (
        lambda f: (f / "chat_template.jinja").write_text("a" * 2_000_000),
        "the most of a chat template",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_hostile_model_is_refused(model: Path, name: str):
    fault, words = FAULTS[name]
    fault(model)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(model)
        load_language_model(model)
    assert words in str(caught.value) and str(model) in str(caught.value)


CANARY = """
import os, sys
sys.addaudithook(lambda event, _: event == "pickle.find_class" and os._exit(77))
from trimtab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_pickled_weights_are_not_opened_and_what_to_type_works(model: Path, tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    words = ["generate", "--model", str(model), "--data", str(prompts), "--out", str(tmp_path / "out.jsonl")]
    told = subprocess.run([sys.executable, "-c", CANARY, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 2, told.stderr
    assert "Traceback" not in told.stderr
    _, _, command = told.stderr.rstrip().rpartition("python -c ")
    subprocess.run([sys.executable, "-c", command.strip('"')], check=True)
    assert load_language_model(model).num_parameters() > 0


def test_adapters_that_stand_on_each_other_are_refused(tmp_path: Path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        entries = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="stands on itself"):
        load_tokenizer(tmp_path / "a")


def test_code_of_a_model_runs_on_request_alone_and_is_named_first(model: Path, tmp_path: Path, capsys: Captured):
    change(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (model / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nraise ValueError('it ran')\n")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_language_model(model)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="could not be loaded"):
        load_language_model(model, trust_remote_code=True)
    assert "runs its own code: own.Own" in " ".join("".join(capsys.readouterr()).split())


# ---- Chat templates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "endless": (LOOP, "longer than"),
    "huge at once": ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
    "doubling": ("{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", ""),
    "huge output": ("{{ 'a' * 2000000 }}", "characters of this conversation, expected at most"),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "changes its input": ("{{ messages.append(1) }}", "unsafe"),
    "divides by zero": ("{{ 1 / 0 }}", "zero"),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "no such filter": ("{{ messages | nothing }}", "nothing"),
    "broken": ("{% for %}", ""),
    "too deep": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", ""),
    "a huge range": ("{{ range(10 ** 9) | list }}", "ange too big"),
    "a number of many digits": ("{{ 10 ** 10000 }}", "integer string conversion"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trimtab.tokens.TEMPLATE_SECONDS", 1.5)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, words = TEMPLATES[name]
    with pytest.raises(ValueError, match="the chat template of") as caught:
        encode_prompt(tokenizer, Prompt((Message("user", "hello"),)))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


PIECES = (
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        " for m in messages ",
        " endfor ",
        " if ",
        " endif ",
        "m.content",
        "m['role']",
        "messages",
    ),
    *(
        " set x = ",
        "x",
        "+",
        "*",
        "99",
        "'a'",
        "|join",
        "|length",
        "[0]",
        "(",
        ")",
        "loop.index",
        "raise_exception('a')",
    ),
    *("\n", "add_generation_prompt", " break ", "{#", "namespace()", ".__class__", "eos_token", "\ud800", "\0"),
)
TEMPLATE = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=30)


def template_gives_ids_or_one_error(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    try:
        assert encode_prompt(tokenizer, Prompt((Message("user", "hello"),))) is not None
    except ValueError as error:
        assert type(error) is ValueError, error


@FUZZ
@given(template=TEMPLATE)
def test_any_template(template: str):
    template_gives_ids_or_one_error(template)


@pytest.mark.slow
@LONG
@given(template=TEMPLATE)
def test_any_template_long(template: str):
    template_gives_ids_or_one_error(template)


# ---- Configs and run directories

BYTES = st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
VALUE = st.recursive(
    SCALAR, lambda i: st.lists(i, max_size=3) | st.dictionaries(st.text(max_size=5), i, max_size=3), max_leaves=5
)
KEYS = st.sampled_from(["runs", "out", "command", "config", "trust_remote_code"]) | st.text(max_size=8)
MAPPING = st.dictionaries(KEYS, VALUE, max_size=4)
CONFIG = BYTES | MAPPING.map(lambda entries: yaml.safe_dump(entries).encode())


def ended_well(words: list[str], capsys: Captured) -> None:
    """A command ends with 0 or with 2 and one message; tyro says what is wrong with flags by itself."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    told = capsys.readouterr().err
    assert status in (0, 2) and (status == 0 or told.strip()), (status, told)


def config_ends_well(folder: Path, content: bytes, capsys: Captured) -> None:
    (folder / "x.yaml").write_bytes(content)
    ended_well(["report", "--config", str(folder / "x.yaml"), "--out", str(folder / "page.html")], capsys)


@FUZZ
@given(content=CONFIG)
def test_any_config(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, content: bytes):
    monkeypatch.chdir(tmp_path)
    config_ends_well(tmp_path, content, capsys)


@pytest.mark.slow
@LONG
@given(content=CONFIG)
def test_any_config_long(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, content: bytes):
    monkeypatch.chdir(tmp_path)
    config_ends_well(tmp_path, content, capsys)


FIGURES = st.sampled_from(["step", "loss", "reward", "kl", "accuracy", "lr", "prompt", "response", "answers", "x"])
ROWS = st.lists(st.dictionaries(FIGURES, VALUE, max_size=4), max_size=4)
LINES = BYTES | ROWS.map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
OBJECT = BYTES | st.dictionaries(
    st.sampled_from(["command", "versions", "seed", "started", "trimtab", "x"]), VALUE, max_size=4
).map(lambda entries: json.dumps(entries).encode())
FILES = {"config.yaml": CONFIG, "environment.json": OBJECT}
FILES |= dict.fromkeys(["metrics.jsonl", "evals.jsonl", "samples.jsonl", "rollouts.jsonl"], LINES)


def run_ends_well(folder: Path, files: dict[str, bytes], capsys: Captured) -> None:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name, content in files.items():
        (run / name).write_bytes(content)
    ended_well(["report", str(run), "--out", str(folder / "page.html")], capsys)


@FUZZ
@given(files=st.fixed_dictionaries(FILES))
def test_any_run_directory(tmp_path: Path, capsys: Captured, files: dict[str, bytes]):
    run_ends_well(tmp_path, files, capsys)


@pytest.mark.slow
@LONG
@given(files=st.fixed_dictionaries(FILES))
def test_any_run_directory_long(tmp_path: Path, capsys: Captured, files: dict[str, bytes]):
    run_ends_well(tmp_path, files, capsys)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": 3, "response": "a"},
        {"prompt": [{"role": "user"}], "response": "a"},
        {"prompt": "a"},
        {"prompt": "a", "answers": ["b"], "response": "b"},
        {"prompt": "a", "answers": {"dpo": {}}},
    ],
)
def test_a_run_with_samples_that_are_none_is_one_error(tmp_path: Path, capsys: Captured, row: dict[str, object]):
    files = {"config.yaml": "{}", "environment.json": "{}", "metrics.jsonl": "", "samples.jsonl": json.dumps(row)}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err
    assert "samples.jsonl of " in told and ", row 1: " in told


CONFIGS = {
    "a flag as a value": ("runs: ['--out', 'x.html']\n", "runs: found '--out', which no value looks like"),
    "a NUL": ('out: "a\\0b"\n', "out: found 'a\\x00b', which no value looks like"),
    "a mapping": ("out: {a: 1}\n", "out: found dict, expected a value or a list"),
    "a key twice": ("out: a.html\nout: b.html\n", "it says out twice"),
    "a link to nothing": (None, "there is no such file"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_one_error(tmp_path: Path, capsys: Captured, name: str):
    content, words = CONFIGS[name]
    path = tmp_path / "x.yaml"
    path.symlink_to("nowhere") if content is None else path.write_text(content)
    assert main(["report", "--config", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_a_config_cannot_grant_trust(tmp_path: Path, capsys: Captured):
    path = tmp_path / "x.yaml"
    path.write_text("model: tiny\ndata: nowhere.jsonl\ntrust_remote_code: true\n")
    words = ["generate", "--config", str(path), "--out", str(tmp_path / "out.jsonl")]
    assert main(words) == 2
    assert "which a file cannot grant" in capsys.readouterr().err
    assert main([*words, "--trust-remote-code"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_what_data_says_does_nothing_to_the_terminal(tmp_path: Path, capsys: Captured):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"\\u001b[2J\\u0007": 1}\n')
    assert main(["data", "check", str(path)]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x07" not in told and "\\x1b[2J" in told


def test_a_resolved_folder_was_looked_at(model: Path):
    assert resolve(model) == model
