"""The rules of the house that a review would forget: what may import what, what stands where, what is documented."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trimtab"

# A room (a module or package of trimtab) may import its own layer and those above it in this table.
LAYERS = (
    {"records", "progress", "untrusted", "lock"},
    {"batches", "precision", "layout", "kl", "losses", "advantages", "algorithms"},
    {
        *("data", "tokens", "builtin", "model_files", "weights", "blocked_attention", "attention", "bodies"),
        *("projection", "models", "sampling", "rewards", "conversation"),
        *("judges", "memory", "reference_cache", "references", "rollouts", "selection", "critic", "health"),
        *("objectives", "learner", "checkpoint", "safety", "resume", "parallel", "plan", "tracking", "run"),
    },
    {"evals", "overoptimization", "report", "label"},
    {"recipes"},
    {"cli"},
    {"__main__"},
)

# What a room may import from outside; rooms that are not named may import anything.
LIBRARIES = {
    "records": set(),
    "progress": {"rich"},
    "untrusted": {"yaml"},
    "lock": set(),
    "batches": {"torch", "jaxtyping"},
    "precision": {"torch"},
    "layout": {"torch", "jaxtyping"},
    "kl": {"torch", "jaxtyping"},
    "losses": {"torch", "jaxtyping"},
    "advantages": {"torch", "jaxtyping"},
    "algorithms": set(),
}

HEAVY = {"torch", "transformers", "peft", "datasets"}
# Recipes are read for `--help`; these are what they share once they run.
LOADED_LATE = {"trimtab.recipes.training", "trimtab.recipes.online", "trimtab.recipes.fresh"}
FORBIDDEN_WORDS = {"Trainer", "Manager", "Helper", "Helpers", "Util", "Utils", "Base", "Mixin", "Callback"}
FORBIDDEN_FILES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py", "base.py"}
TOKENIZER_WORK = {"encode", "decode", "batch_decode", "tokenize", "apply_chat_template", "batch_encode_plus"}
ABSOLUTE = re.compile(r"^(/(home|root|tmp|mnt|opt|usr|Users|work|workspace)/|[A-Z]:\\)")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 10, "the package has moved"
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room that a module of trimtab belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_name(path): path for path in sources()}


def imported(path: Path, *, late: bool) -> set[str]:
    """The modules that a file imports: when it is loaded, or with `late` anywhere in it."""
    return {name for node in _import_nodes(tree(path), late) for name in _names(node, path)}


def _import_nodes(node: ast.AST, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif late or not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types(child)):
            yield from _import_nodes(child, late)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _names(node: ast.Import | ast.ImportFrom, path: Path) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    source = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parent.parts
        source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [source])])
    # `from trimtab import run` imports a module, `from trimtab.run import Run` does not.
    return {f"{source}.{name.name}" if f"{source}.{name.name}" in MODULES else source for name in node.names}


def rank(of_room: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if of_room in layer]
    assert found, f"trimtab.{of_room} has no place in LAYERS: say which layer it belongs to"
    return found[0]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"trimtab"}))
def test_imports_point_one_way(module: str):
    inner = {name for name in imported(MODULES[module], late=True) if name.startswith("trimtab.")}
    upward = {name for name in inner if rank(room(name)) > rank(room(module))}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it in LAYERS"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) in LIBRARIES))
def test_the_lower_rooms_need_little(module: str):
    outer = {name.split(".")[0] for name in imported(MODULES[module], late=True)} - {"trimtab"}
    extra = outer - sys.stdlib_module_names - LIBRARIES[room(module)]
    assert not extra, f"{module} imports {sorted(extra)}"


def loaded_with(module: str) -> set[str]:
    """Everything that loading a module loads, as far as this package's own files tell."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            parents = {name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)}
            waiting += [*imported(MODULES[name], late=False), *parents]
    return seen


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if room(name) in {"data", "label", "recipes", "cli"} - LOADED_LATE)
)
def test_reading_data_and_asking_for_help_load_nothing_heavy(module: str):
    if module in LOADED_LATE:
        return
    heavy = {name for name in loaded_with(module) if name.split(".")[0] in HEAVY}
    assert not heavy, f"loading {module} loads {sorted(heavy)}"


def test_help_is_light():
    code = "import sys; from trimtab.cli import main; main(['--help']); import trimtab.data; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(told.stdout.split())


def test_there_is_one_backward():
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sources()
        for call in calls(path)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "backward"
    ]
    assert len(found) == 1 and found[0].startswith("trimtab/learner.py:"), found


def test_no_file_is_a_drawer_for_everything():
    assert not [str(path) for path in sources() if path.name in FORBIDDEN_FILES]


def test_no_class_is_named_after_nothing():
    classes = [node.name for path in sources() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if FORBIDDEN_WORDS & set(re.findall(r"[A-Z][a-z]*", name))]


def is_tokenizer_work(call: ast.Call) -> bool:
    """Whether a call turns text into tokens or back: `tokenizer(...)`, `x.tokenizer.encode(...)`, any chat template."""
    function = call.func
    if not isinstance(function, ast.Attribute):
        return isinstance(function, ast.Name) and function.id == "tokenizer"
    if function.attr in {"apply_chat_template", "tokenizer"}:
        return True
    receiver = ast.unparse(function.value).split(".")[-1]
    return receiver == "tokenizer" and (function.attr in TOKENIZER_WORK or function.attr.startswith("convert_"))


def test_only_the_bridge_touches_a_tokenizer():
    crossing = {path for path in sources() if any(is_tokenizer_work(call) for call in calls(path))}
    assert crossing == {PACKAGE / "tokens.py"}


def test_nothing_is_pickled():
    unsafe = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert not [str(path) for path in sources() if unsafe & imported(path, late=True)]
    torch_files = {"torch.load", "torch.save"}
    assert not [str(path) for path in sources() if any(ast.unparse(call.func) in torch_files for call in calls(path))]


NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_nothing_that_is_read_runs(path: Path):
    for call in calls(path):
        place, name = f"{path.relative_to(ROOT)}:{call.lineno}", ast.unparse(call.func)
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert name not in NEVER, f"{place} runs {name}"
        assert not (name.startswith("yaml.") and name[5:] in UNSAFE_YAML), f"{place} reads YAML that can make objects"
        assert "allow_pickle" not in options and options.get("shell", "False") == "False", place
        assert options.get("trust_remote_code", "") != "True", f"{place} trusts code that nobody asked to run"
        assert options.get("weights_only", "True") == "True", place


def test_files_of_others_are_read_under_limits():
    """Reading JSON and YAML has one place; what is listed reads files that trimtab wrote or text that it was given."""
    readers = {"json.load", "json.loads", "yaml.safe_load", "yaml.compose"}
    own = {"untrusted.py", "run.py", "weights.py", "checkpoint.py", "parallel.py"}
    found = {path.name for path in sources() for call in calls(path) if ast.unparse(call.func) in readers}
    assert found <= own, f"{sorted(found - own)} read with json or yaml: take trimtab.untrusted"


def test_weights_come_from_safetensors_alone():
    loads = [call for path in sources() for call in calls(path) if ast.unparse(call.func) == "_from_pretrained"]
    models = [call for call in loads if any(option.arg == "output_loading_info" for option in call.keywords)]
    assert models, "the loading of weights has moved"
    assert all({"use_safetensors": "True"}.items() <= keyword_texts(call).items() for call in models)


def keyword_texts(call: ast.Call) -> dict[str | None, str]:
    return {option.arg: ast.unparse(option.value) for option in call.keywords}


def test_no_error_is_swallowed():
    for path in sources():
        for handler in (node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)):
            place = f"{path.relative_to(ROOT)}:{handler.lineno}"
            caught = ast.unparse(handler.type) if handler.type else ""
            told_again = caught == "Exception" and isinstance(handler.body[-1], ast.Raise)
            assert told_again or caught not in {"", "Exception", "BaseException"}, f"{place} catches everything"
            assert not isinstance(handler.body[0], ast.Pass), f"{place} goes on as if nothing had happened"


def test_no_absolute_path():
    for path in [*sources(), *(path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__))]:
        strings = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant))
        found = [node.value for node in strings if isinstance(node.value, str) and ABSOLUTE.match(node.value)]
        assert not found, f"{path.relative_to(ROOT)} names {found}"


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring left out."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if has_docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_functions_are_small():
    lengths = {f"{path.name}:{one.name}": length(one) for path in sources() for one in functions(path)}
    assert statistics.median(lengths.values()) <= 11
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_every_module_says_what_lives_there():
    assert not [str(path) for path in sources() if path.read_text().strip() and not ast.get_docstring(tree(path))]


def registered() -> set[str]:
    """The names of every registry."""
    from trimtab.advantages import ADVANTAGES, SCORE_SHAPES
    from trimtab.algorithms import ALGORITHMS
    from trimtab.kl import KL_ESTIMATORS, KL_LOSSES
    from trimtab.losses.policy import POLICY_LOSSES
    from trimtab.losses.preference import PREFERENCE_LOSSES
    from trimtab.losses.reward import REWARD_LOSSES
    from trimtab.losses.unpaired import UNPAIRED_LOSSES
    from trimtab.losses.value import VALUE_LOSSES
    from trimtab.rewards import ENSEMBLES, RULES

    offline = {*PREFERENCE_LOSSES, *UNPAIRED_LOSSES, *REWARD_LOSSES}
    online = {*ALGORITHMS, *ADVANTAGES, *SCORE_SHAPES, *POLICY_LOSSES, *VALUE_LOSSES, *KL_ESTIMATORS, *KL_LOSSES}
    ensembles = {f"ensemble:{name}(R1,R2,...)" for name in ENSEMBLES}
    return offline | online | {*RULES, *ensembles}


def test_every_registered_name_has_a_page():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "methods").glob("*.md")]
    silent = {name for name in registered() if not any(f"`{name}`" in page for page in pages)}
    assert not silent, f"no page of docs/methods says {sorted(silent)} (in backticks)"


LOGGING = (
    *("objectives.py", "learner.py", "run.py", "losses/policy.py", "selection.py"),
    *("recipes/training.py", "recipes/online.py"),
)
FIGURES = ("Metrics", "dict[str, float]", "dict[str, Mean]", "Mapping[str, float]")


def logged_names() -> set[str]:
    """Keys of the dicts written in functions that return metrics or log a step."""
    found = set()
    for path in (PACKAGE / name for name in LOGGING):
        for function in functions(path):
            returned = ast.unparse(function.returns) if function.returns else ""
            if function.name == "_log_step" or any(kind in returned for kind in FIGURES):
                found |= _dict_keys(function)
    return found


def _dict_keys(function: ast.AST) -> set[str]:
    keys = {key for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys}
    stored = (
        node for node in ast.walk(function) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    )
    keys |= {node.slice for node in stored}
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def documented_metrics() -> list[str]:
    """The names in the first column of every table of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_every_logged_name_is_documented_once():
    documented, logged = documented_metrics(), logged_names()
    assert {"loss", "accuracy", "grad_norm", "tokens_per_second"} <= logged, "the functions that log have moved"
    assert logged - {"step"} <= set(documented)
    assert len(documented) == len(set(documented))


def file_tree() -> list[str]:
    """The paths that README's file tree lists: the code block with a line that begins with `trimtab/`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    trees = [block for block in blocks if re.search(r"^trimtab/", block, re.MULTILINE)]
    assert len(trees) == 1, "README.md ends with one file tree, in which a line begins with trimtab/"
    return list(_tree_paths(trees[0]))


def _tree_paths(block: str) -> Iterator[str]:
    """Indentation makes children; a line lists one path, or several and no description."""
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip(" │├└─"))
        words = line.strip(" │├└─").split()
        parents = [(depth, name) for depth, name in parents if depth < indent]
        folder = "".join(name for _, name in parents)
        names = words if all(map(_is_path, words)) else words[:1]
        yield from (folder + name for name in names)
        if words[0].endswith("/"):
            parents.append((indent, words[0]))


def _is_path(word: str) -> bool:
    return bool(re.fullmatch(r"[\w./-]+(/|\.\w+)|Makefile|LICENSE|\.\w+/run", word))


def test_the_readme_lists_files_that_exist():
    missing = [path for path in file_tree() if not (ROOT / path).exists()]
    assert not missing


def test_the_readme_lists_every_room():
    listed = {path.rstrip("/") for path in file_tree()}
    rooms = {
        f"trimtab/{path.name}" for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"trimtab/__init__.py", "trimtab/__main__.py"} <= listed


def test_the_tree_reader_reads_trees():
    block = "Makefile  .ci/run  LICENSE\ntrimtab/\n  losses/     pure\n    reward.py   a b\n  cli.py\ndocs/  pages\n"
    expected = ["Makefile", ".ci/run", "LICENSE", "trimtab/", "trimtab/losses/", "trimtab/losses/reward.py"]
    assert list(_tree_paths(block)) == [*expected, "trimtab/cli.py", "docs/"]
    drawn = "trimtab/\n├── losses/\n│   └── reward.py  # pure\n└── cli.py\n"
    assert list(_tree_paths(drawn)) == ["trimtab/", "trimtab/losses/", "trimtab/losses/reward.py", "trimtab/cli.py"]


def test_every_dependency_has_a_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=~! ;]", name)[0] for name in wanted}
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2].partition("\n## ")[0]
    )
    reasons = {name.strip() for line in section.splitlines() if "|" in line for name in line.split("|")[1].split(",")}
    assert names <= reasons, f"CONTRIBUTING.md does not say why {sorted(names - reasons)}"
    assert reasons - {"package", "---"} <= names
