"""The command line: finds the recipe of a command, reads its flags, and tells people about their mistakes.

Nothing heavy is imported here; a recipe imports torch when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.lock import released
from trimtab.recipes.options import AlreadyFinished
from trimtab.untrusted import printable, read_yaml_mapping


@dataclass(frozen=True)
class Command:
    """Where a command lives: `module` has a config class and a function that takes it."""

    module: str
    config: str
    function: str
    about: str
    preset: tuple[str, ...] = ()
    """Flags that the command stands for."""
    on_many: bool = False
    """Whether several processes can work on it."""


COMMANDS = {
    "quickstart": Command("quickstart", "Quickstart", "quickstart", "the whole chain on a real model, with a report"),
    "sft": Command("sft", "Sft", "sft", "instruction tuning: imitate demonstrations", on_many=True),
    "reward": Command(
        "reward", "Reward", "reward", "train a reward model on preferences (Bradley-Terry)", on_many=True
    ),
    "dpo": Command("dpo", "Dpo", "dpo", "train a policy on preference pairs: DPO and its family", on_many=True),
    "kto": Command("kto", "Kto", "kto", "train a policy on unpaired feedback: KTO, BCO", on_many=True),
    "rl": Command("rl", "Rl", "rl", "online RL with any algorithm: sample, score, step", on_many=True),
    **{
        name: Command("rl", "Rl", "rl", f"online RL: {about}", ("--algorithm", name), on_many=True)
        for name, about in {
            "rloo": "a prompt's other answers are the baseline",
            "grpo": "scores standardized in their group",
            "ppo": "clipped updates with a critic",
            "reinforce": "the plain policy gradient",
        }.items()
    },
    "online-dpo": Command(
        "online_dpo", "OnlineDpo", "online_dpo", "DPO and its family on pairs of fresh answers", on_many=True
    ),
    "raft": Command("raft", "Raft", "raft", "expert iteration: imitate the best of fresh answers", on_many=True),
    "best-of-n": Command("best_of_n", "BestOfN", "best_of_n", "sample n answers to a prompt, keep the best scored"),
    "generate": Command("generate", "Generate", "generate", "sample answers to prompts"),
    "chat": Command("chat", "Chat", "chat", "talk to a model in the terminal, or to two side by side"),
    "score": Command("score", "Score", "score", "add a reward to every row of a file"),
    "evaluate reward": Command(
        "evaluate_reward", "EvaluateReward", "evaluate_reward", "accuracy of a reward on held-out pairs, RewardBench"
    ),
    "evaluate win-rate": Command(
        "evaluate_win_rate", "EvaluateWinRate", "evaluate_win_rate", "which system answers better, under a judge"
    ),
    "evaluate agreement": Command(
        "evaluate_agreement", "EvaluateAgreement", "evaluate_agreement", "how far annotators agree; one reward or not"
    ),
    "evaluate drift": Command(
        "evaluate_drift", "EvaluateDrift", "evaluate_drift", "how far a policy has moved: KL, entropy, length, ..."
    ),
    "evaluate diversity": Command(
        "evaluate_diversity", "EvaluateDiversity", "evaluate_diversity", "how much the answers of a file differ"
    ),
    "evaluate length-bias": Command(
        "evaluate_length_bias", "EvaluateLengthBias", "evaluate_length_bias", "whether a reward favours long answers"
    ),
    "evaluate sycophancy": Command(
        "evaluate_sycophancy", "EvaluateSycophancy", "evaluate_sycophancy", "whether answers follow the user's opinion"
    ),
    "evaluate multiple-choice": Command(
        "evaluate_choices", "EvaluateChoices", "evaluate_choices", "capability by likelihood, before against after"
    ),
    "evaluate consistency": Command(
        "evaluate_consistency", "EvaluateConsistency", "evaluate_consistency", "position bias of judges; paraphrases"
    ),
    "evaluate frontier": Command(
        "evaluate_frontier", "EvaluateFrontier", "evaluate_frontier", "reward against KL, all checkpoints, best-of-n"
    ),
    "evaluate harness": Command(
        "evaluate_harness", "EvaluateHarness", "evaluate_harness", "tasks of lm-evaluation-harness (extra `eval`)"
    ),
    "data check": Command("data", "Check", "check", "what is in a file: formats, duplicates, contradictions, lengths"),
    "data show": Command("data", "Show", "show", "one batch as the model sees it, its loss mask in colour"),
    "plan": Command("plan", "Plan", "plan", "what training a model takes on some devices, and what fits"),
    "report": Command("report", "Report", "report", "run directories as one self-contained HTML page"),
    "watch": Command("watch", "Watch", "watch", "the same page in a browser, live while runs go on"),
}

USAGE_ERROR = 2
USERS_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError)
"""What is told in a line; anything else is our own mistake and comes with its traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # nothing here reports to anybody
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[-1:] in (["-h"], ["--help"]) and is_group(given[:-1])):
        print(overview(*given[:-1]))
        return 0
    if given[0] == "--version":
        print(f"trimtab {__version__}")
        return 0
    try:
        return run_command(given)
    except USERS_ERRORS as error:
        if os.environ.get("TRIMTAB_DEBUG"):
            raise
        told = "there is not enough memory for this" if isinstance(error, MemoryError) else str(error)
        print(f"trimtab: {printable(told)}", file=sys.stderr)
        return USAGE_ERROR
    except (AlreadyFinished, KeyboardInterrupt) as stop:
        print(f"trimtab: {stop if str(stop) else 'interrupted'}", file=sys.stderr)
        return status_of(stop)


def status_of(stop: BaseException) -> int:
    """The exit status of a run that was asked to stop, or had nothing left to do."""
    return 0 if isinstance(stop, AlreadyFinished) else 128 + getattr(stop, "number", signal.SIGINT)


def run_command(given: Sequence[str]) -> int:
    """Find the command, read its flags, run it."""
    name, rest = split_command(given)
    command = COMMANDS[name]
    count, rest = take_count(name, command, rest)
    recipe = import_module(f"trimtab.recipes.{command.module}")
    check_preset(name, command, rest)
    given_flags = [*command.preset, *rest]
    config = read_config(getattr(recipe, command.config), given_flags, prog=f"trimtab {name}", about=in_full(command))
    if count > 1 and "WORLD_SIZE" not in os.environ:
        from trimtab.parallel import launch

        return launch(count, [*name.split(), *rest])
    run_recipe(getattr(recipe, command.function), config, together=count > 1)
    return 0


def in_full(command: Command) -> str:
    """What a command is about, and the two words that stand beside its flags because no config holds them."""
    if not command.on_many:
        return command.about
    return f"{command.about}. --nproc N: on N devices of this machine. --config RUN: with the flags of that run"


def take_count(name: str, command: Command, given: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes work on a command, and its other flags: `--nproc N` starts them, torchrun has done so."""
    rest, asked = list(given), None
    for i, word in enumerate(rest):
        if word == "--nproc" or word.startswith("--nproc="):
            asked = word.partition("=")[2] or "".join(rest[i + 1 : i + 2])
            del rest[i : i + (1 if "=" in word else 2)]
            break
    started = os.environ.get("WORLD_SIZE")
    if asked is not None and started is not None:
        raise ValueError(f"--nproc {asked}: {started} processes have been started already; leave it out.")
    if asked is not None and not (asked.isdecimal() and int(asked) > 0):
        raise ValueError(f"--nproc {asked}: a number of processes from 1 is needed.")
    count = int(asked or started or 1)
    if count > 1 and not command.on_many:
        able = ", ".join(other for other, some in COMMANDS.items() if some.on_many)
        raise ValueError(f"`trimtab {name}` runs in one process. In several run {able}.")
    return count, rest


def run_recipe(function: Callable[[Any], object], config: Any, *, together: bool) -> None:
    """Run a command, with the other processes if there are any."""
    if not together:
        with released():
            function(config)
        return
    from trimtab import parallel
    from trimtab.builtin import BUILTIN_MODELS, builtin_model
    from trimtab.recipes.options import flatten
    from trimtab.safety import Interrupted

    # Once processes have joined, transformers writes models on the first rank only, whoever asks it to.
    for name in BUILTIN_MODELS:
        if any(name in str(value) for value in flatten(config).values()):
            builtin_model(name)
    parallel.start()
    first, ended = parallel.is_first(), None
    with parallel.Leaving(USERS_ERRORS, USAGE_ERROR):
        try:
            with released():  # before ranks leave, which they do at once
                function(config)
        except (AlreadyFinished, Interrupted) as stop:  # on all ranks alike
            ended = stop.with_traceback(None)  # which holds on to weights
        if ended is None or not first:
            parallel.leave(status_of(ended) if ended else 0)
        parallel.finish()
    if ended is not None:
        raise ended


def check_preset(name: str, command: Command, given: Sequence[str]) -> None:
    """Refuse to say again, or otherwise, what the command's name says."""
    for flag in command.preset[::2]:
        if any(word.partition("=")[0] == flag for word in given):
            raise ValueError(f"`trimtab {name}` stands for {' '.join(command.preset)}: leave {flag} out.")


def split_command(given: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command, one word or two, and what follows it."""
    for words in (2, 1):
        name = " ".join(given[:words])
        if name in COMMANDS:
            return name, list(given[words:])
    from difflib import get_close_matches

    wanted = " ".join(word for word in given[:2] if not word.startswith("-"))
    inner = [name for name in COMMANDS if name.startswith(given[0] + " ")]
    near = inner or get_close_matches(wanted, COMMANDS, n=2) or get_close_matches(given[0], COMMANDS, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no command {wanted!r}.{hint} `trimtab --help` lists them all.")


def read_config(config: type, arguments: Sequence[str], *, prog: str, about: str) -> Any:
    """A recipe's config from the command line, after the flags that `--config FILE` stands for."""
    from inspect import getdoc

    import tyro

    description = f"{about[0].upper()}{about[1:]}.\n\n{getdoc(config) or ''}"
    flags = expand_config(config, arguments, prog.removeprefix("trimtab "))
    return tyro.cli(config, args=flags, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))


def expand_config(config: type, arguments: Sequence[str], command: str) -> list[str]:
    """`--config FILE` written out as flags, in front of the others so that those win."""
    rest: list[str] = []
    flags: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or next(given, None)
            if path is None:
                raise ValueError("--config needs a file, such as RUN/config.yaml.")
            flags += flags_of_file(config, Path(path), command)
        else:
            rest.append(argument)
    overridden = {word.partition("=")[0].replace("_", "-").removeprefix("--no-") for word in rest if word[:2] == "--"}
    overridden = {word.removeprefix("--") for word in overridden}
    if overridden & {"steps", "epochs"}:
        overridden |= {"steps", "epochs"}  # two ways to say one thing: the command line's is meant
    if "--trust-remote-code" in flags and "trust-remote-code" not in overridden:
        raise ValueError("the --config file asks for trust_remote_code, which a file cannot grant: type it as a flag.")
    return [flag for name, words in pairs_of(flags) if name not in overridden for flag in words] + rest


def pairs_of(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with the values that follow them."""
    grouped: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            grouped.append((word.removeprefix("--").removeprefix("no-"), [word]))
        else:
            grouped[-1][1].append(word)
    return grouped


def flags_of_file(config: type, path: Path, command: str) -> list[str]:
    """The flags that a `config.yaml` stands for. Raises ValueError for keys that the command does not have."""
    if path.is_dir():
        path = path / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    try:
        loaded = read_yaml_mapping(path)
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    if loaded.get("command") not in (None, command):
        raise ValueError(f"--config {path} is of `trimtab {loaded['command']}`, not of `trimtab {command}`.")
    known = field_names(config)
    unknown = sorted(str(key) for key in loaded if key not in known and key != "command")
    if unknown:
        raise ValueError(f"--config {path} has unknown keys {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    for key, value in loaded.items():
        check_value(path, str(key), value)
    return [word for key, value in loaded.items() if key != "command" for word in flag_words(str(key), value)]


def check_value(path: Path, key: str, value: Any) -> None:
    """Refuse what no flag can say, and flags in the place of values."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list | dict | bytes):
            raise ValueError(
                f"--config {path}: {key}: found {type(item).__name__}, expected a value or a list of values."
            )
        if isinstance(item, str) and (item.startswith("--") or "\0" in item):
            raise ValueError(f"--config {path}: {key}: found {item[:60]!r}, which no value looks like.")


def field_names(config: type) -> set[str]:
    """The names of all flags of a composed config."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    hints = get_type_hints(config)
    names: set[str] = set()
    for entry in fields(config):
        kind = hints[entry.name]
        names |= field_names(kind) if isinstance(kind, type) and is_dataclass(kind) else {entry.name}
    return names


def flag_words(key: str, value: Any) -> list[str]:
    """One key of a config file as words of a command line; null is the flag's absence."""
    flag = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [flag, str(value)]


def is_group(words: Sequence[str]) -> bool:
    """Whether these words begin commands and are none: no words at all, or one such as `evaluate`."""
    return not words or (len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in COMMANDS))


def overview(group: str = "") -> str:
    """What `trimtab --help` prints, and `trimtab evaluate --help` of its commands alone."""
    named = {name: command.about for name, command in COMMANDS.items() if name.startswith(f"{group} ".lstrip())}
    width = max(map(len, named))
    lines = "\n".join(f"  {name:{width}}  {about}" for name, about in named.items())
    return (
        "trimtab: align a language model with human preferences, and know whether it worked.\n\n"
        f"usage: trimtab {group or 'COMMAND'} {'COMMAND ' if group else ''}[flags]\n\n{lines}\n\n"
        "`trimtab COMMAND --help` explains a command's flags. Start with `trimtab quickstart`.\n"
        "RUN/config.yaml repeats a run: `trimtab COMMAND --config RUN/config.yaml --out OTHER`."
    )
