"""Where rows come from, and one clear error for every source that is not there or cannot be read."""

import gzip
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab import data
from trimtab.records import Demonstration, Preference, Prompt, Ranking

FILES = [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz"]


def contents(path: str) -> list[str]:
    return [prompt.text for prompt in data.load(path, Prompt).records]


@pytest.mark.parametrize("suffix", FILES)
def test_every_row_knows_where_it_stands(write, suffix: str):
    path = write({"prompt": "a"}, {"prompt": 'b\nc, "d"'}, {"prompt": "ü"}, name=f"rows{suffix}")
    prompts = data.load(path, Prompt).records
    assert [prompt.text for prompt in prompts] == ["a", 'b\nc, "d"', "ü"]
    lines = {"jsonl": [":1", ":2", ":3"], "csv": [":2", ":3", ":5"]}
    expected = lines.get(suffix.split(".")[1], [":row 1", ":row 2", ":row 3"])
    assert [prompt.source.removeprefix(path) for prompt in prompts] == expected


def test_jsonl_may_have_blank_lines_windows_line_ends_and_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    assert [(prompt.text, prompt.source[-2:]) for prompt in data.load(path, Prompt).records] == [
        ("a", ":1"),
        ("b", ":4"),
    ]


def test_a_json_file_may_hold_json_lines_or_one_object(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert contents(str(path)) == ["a", "b"]
    path.write_text('{"prompt": "a"}', encoding="utf-8")
    assert contents(str(path)) == ["a"]


def test_csv_with_a_byte_order_mark_and_cells_longer_than_the_default_limit(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffprompt\r\n".encode() + b"x" * 200_000 + b"\r\n")
    assert [len(text) for text in contents(str(path))] == [200_000]


def test_csv_text_that_looks_like_a_list_stays_text(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt\n[1]\n[abc\n"[{""a"": 1}]"\n[]\n', encoding="utf-8")
    assert contents(str(path)) == ["[1]", "[abc", '[{"a": 1}]', "[]"]


@pytest.mark.parametrize("suffix", FILES)
def test_an_empty_file_is_an_error(tmp_path: Path, suffix: str):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(b"") if suffix.endswith("gz") else b"")
    with pytest.raises(ValueError, match=r"rows\.") as caught:
        data.load(str(path), Prompt)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("suffix", "content"), [(".jsonl", b"\n\n"), (".json", b"[]"), (".csv", b"prompt\n")])
def test_a_file_without_rows_is_an_error(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    for read in (lambda: data.load(path, Prompt), lambda: data.kind_of(path)):
        with pytest.raises(ValueError, match="found no rows, expected at least one"):
            read()


BROKEN = {
    "cut gzip": ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-12], "broken gzip file"),
    "no gzip": ("rows.jsonl.gz", b'{"prompt": "a"}', "broken gzip file"),
    "gzip with a wrong checksum": (
        "rows.csv.gz",
        gzip.compress(b"prompt\na\n")[:-8] + b"\0" * 8,
        "broken gzip file",
    ),
    "no JSON": ("rows.json", b'[{"prompt": "a"}', "not JSON"),
    "JSON that is not UTF-8": ("rows.json", b'["\xff"]', "not UTF-8 (invalid start byte at byte 2)"),
    "csv that is not UTF-8": ("rows.csv", b"prompt\na\n\xffb\n", ":3: not UTF-8"),
    "open quote": ("rows.csv", b'prompt\n"a\nb\n', "not comma-separated values"),
    "column twice": ("rows.csv", b"prompt,prompt\na,b\n", "names a column twice"),
    "no parquet": ("rows.parquet", b"PAR1 but not really PAR1", "not a readable parquet file"),
    "unknown suffix": ("rows.txt", b"a", "expected a file that ends with .jsonl, .json, .csv, .parquet"),
    "no suffix": ("rows", b"a", "expected a file that ends with"),
    "only gz": ("rows.gz", gzip.compress(b"a"), "expected a file that ends with"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, name: str):
    file, content, words = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.load(str(path), Prompt, skip_invalid=True)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_csv_line_with_too_many_cells_is_a_bad_row(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,id\na,1\nb,2,3\nc\nd,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv:3: line: found 3 cells, expected 2 \(prompt, id\)"):
        data.load(path, Prompt)
    loaded = data.load(path, Prompt, skip_invalid=True)
    assert [problem.where[-1] for problem in loaded.skipped] == ["3", "4"]
    assert [prompt.text for prompt in loaded.records] == ["a", "d"]


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "folder/missing.csv", "./missing", "/no/such/place", "missing", "a\0b", ""]
)
def test_what_does_not_exist_says_what_would_be_accepted(source: str):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(source, Prompt)
    for words in [".parquet", "owner/name", "package.module:function", "reviews-heldout"]:
        assert words in str(caught.value)


def test_a_directory_names_the_files_in_it(tmp_path: Path, write):
    path = write({"prompt": "a"})
    with pytest.raises(ValueError, match="is a directory") as caught:
        data.load(str(tmp_path), Prompt)
    assert path in str(caught.value)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes an importable module `made_here` of some functions."""

    def make(**functions: object) -> None:
        made = types.ModuleType("made_here")
        made.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, "made_here", made)

    return make


def test_a_function_may_return_rows_or_records(module):
    pair = Preference(Prompt.from_text("p"), "a", "b")
    module(rows=lambda: iter([{"prompt": "a"}, {"prompt": 3}]), records=lambda: [pair, pair])
    loaded = data.load("made_here:rows", Prompt, skip_invalid=True)
    assert ([prompt.text for prompt in loaded.records], loaded.records[0].source) == (["a"], "made_here:rows:row 1")
    assert str(loaded.skipped[0]).startswith("made_here:rows:row 2: prompt: found 3")
    assert data.load("made_here:records", Preference).records == [pair, pair]
    assert data.load("made_here:records", Demonstration).records == [Demonstration(pair.prompt, "a")] * 2
    assert data.load("made_here:records", Ranking).records == [Ranking(pair.prompt, ("a", "b"))] * 2
    assert data.kind_of("made_here:records") is Preference


def test_a_record_that_cannot_become_the_kind_is_an_error(module):
    module(records=lambda: [Prompt.from_text("p")])
    with pytest.raises(ValueError, match=r"made_here:records:row 1: record: found a Prompt, expected a Preference"):
        data.load("made_here:records", Preference)


def test_functions_that_are_not_there_or_return_nothing_useful(module):
    module(nothing=lambda: None, text=lambda: "rows", numbers=lambda: [1], value=3)
    for name in ("nothing", "text"):
        with pytest.raises(ValueError, match="expected an iterable of rows"):
            data.load(f"made_here:{name}", Prompt)
    with pytest.raises(ValueError, match="row 1: row: found 1, expected an object with column names"):
        data.load("made_here:numbers", Prompt)
    for name in ("missing", "value"):
        with pytest.raises(ValueError, match=f"module made_here has no function '{name}'"):
            data.load(f"made_here:{name}", Prompt)
    module(rows=lambda path: [path])
    with pytest.raises(ValueError, match=r"cannot be called without arguments \(missing a required argument: 'path'\)"):
        data.load("made_here:rows", Prompt)
    with pytest.raises(FileNotFoundError, match="no module 'not_made_here'"):
        data.load("not_made_here.part:rows", Prompt)


def test_a_module_of_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lying_here.py").write_text("def rows():\n    return [{'prompt': 'a'}]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert contents("lying_here:rows") == ["a"]


def test_a_hub_data_set_is_loaded_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"prompt": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    [prompt] = data.load("owner/name", Prompt, split="test").records
    assert (prompt.text, prompt.source) == ("a", "owner/name[test]:row 1")
    data.load("owner/name:part", Prompt)
    assert asked == [("owner/name", None, "test"), ("owner/name", "part", "train")]


def test_a_hub_data_set_that_cannot_be_loaded_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(name: str, config: str | None, *, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ValueError, match="'owner/name' is no file here, and as a hub data set its split 'train'"
    ) as caught:
        data.load("owner/name", Prompt)
    assert "no network" in str(caught.value)


def test_a_split_without_effect_is_an_error(write):
    for source in (write({"prompt": "a"}), "reviews", "made_here:rows"):
        with pytest.raises(ValueError, match="only hub data sets have splits"):
            data.load(source, Prompt, split="test")


@pytest.mark.parametrize("name", data.SOURCES)
def test_built_in_names_give_prompts(name: str):
    loaded = data.load(name, Prompt)
    assert len(loaded.records) == len(set(loaded.records)) == loaded.rows >= 250


def test_importing_data_imports_nothing_slow():
    slow = ("torch", "transformers", "datasets", "pyarrow", "numpy")
    code = f"import sys, trimtab.data, trimtab.data.checks; print([m for m in {slow} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
