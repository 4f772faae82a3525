"""`trimtab quickstart`: controlled sentiment (Rafailov et al. 2023, section 6.1) at small scale.

The start model answers review-writing prompts; a lexicon is the gold reward and labels pairs through a Bradley-Terry
coin; a reward model learns from part of the pairs; best-of-n uses it, DPO the pairs; online RL has the gold reward
itself, as PPO-GT of the paper's figure 2, or the reward model; and every method is judged on held-out prompts by gold
reward, by KL from the start model and by length. Deviations from the paper: an instruct model instead of a fine-tuned
GPT-2, VADER instead of a classifier as gold, a few hundred pairs, noisy labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from trimtab.recipes.options import (
    DataOptions,
    Dtype,
    ModelOptions,
    OnlineStepOptions,
    OptimizerOptions,
    RewardChoice,
    RunOptions,
    SamplingOptions,
    StepOptions,
    check_out,
)

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.models import Policy
    from trimtab.recipes.algorithm import AlgorithmOptions
    from trimtab.records import Preference, Prompt
    from trimtab.rewards import Reward
    from trimtab.run import Run
    from trimtab.sampling import Samples


@dataclass(frozen=True)
class Quickstart:
    """Needs no data and no GPU. Ends with a table, `summary.json` and `report.html` in --out."""

    model: str = "smollm2-135m-instruct"
    """The start model: hub id, folder, run directory, or built-in (tiny runs in under a minute and learns nothing)."""
    out: str = "runs/quickstart"
    """The directory to make."""
    methods: tuple[str, ...] = ("best-of-n", "dpo", "rloo")
    """What to compare with the start model: best-of-n, dpo, and algorithms of online RL (rloo, ppo, grpo, ...)."""
    prompts: int | None = None
    """Prompts whose answers are compared, for training; 108, or 24 with the model tiny."""
    held_out_prompts: int | None = None
    """Prompts that every method is judged on; 40, or 8 with the model tiny."""
    answers: int = 4
    """Answers to each training prompt; every two of them become a pair."""
    n: int = 16
    """Answers of best-of-n."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    coin: float = 5.0
    """P(first is labelled better) = sigmoid(coin * (gold(first) - gold(second))); gold lies in [-1, 1]."""
    beta: float = 0.1
    """DPO's beta."""
    lr: float = 2e-5
    """Learning rate of DPO."""
    epochs: float = 0.5
    """DPO's passes over the pairs; three of them to a prompt share an answer."""
    rl_reward: Literal["gold", "proxy"] = "gold"
    """What online RL is rewarded with: the gold reward itself, or the reward model that learned from the pairs (and
    that RL soon learns to please without pleasing gold)."""
    rl_rollouts: int | None = None
    """Rollouts of online RL, 4 answers to each of 8 training prompts; 16, or 6 with the model tiny."""
    rl_lr: float = 3e-5
    """Learning rate of online RL."""
    reward_lr: float = 2e-4
    """Peak learning rate of the reward model; it falls to 0. High, because a new head has few steps to learn in."""
    dtype: Dtype = "auto"
    """Arithmetic of the model's body."""
    device: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is one."""
    seed: int = 0
    """Seed of prompts, samples, labels and data order."""
    overwrite: bool = False
    """Replace --out if it is a run directory."""


PAIRS_HELD_OUT = 1 / 3
"""Share of the prompts whose pairs the reward model does not see."""
EVALUATION_ANSWERS = 4
CHECKPOINT_ANSWERS = 2
"""Answers to each held-out prompt: of final models, and of checkpoints on their way."""
BATCH_SIZE = 8
REWARD_NAMES = {"gold": "the gold reward itself", "proxy": "the reward model"}
RL_PROMPTS, RL_ANSWERS = 8, 4


def quickstart(config: Quickstart) -> None:
    """The whole chain; every step writes into --out."""
    from trimtab.data.reviews import review_prompts
    from trimtab.models import load_policy
    from trimtab.recipes.options import flatten
    from trimtab.rewards import parse_reward
    from trimtab.run import Run

    config = with_sizes(config)
    check_out(RunOptions(config.out, overwrite=config.overwrite), resumes=False)
    assert config.prompts and config.held_out_prompts
    prompts = review_prompts(config.prompts, seed=config.seed, split="train")
    held_out = review_prompts(config.held_out_prompts, seed=config.seed, split="heldout")
    gold = parse_reward("sentiment")
    start = load_policy(config.model, dtype=config.dtype, device=config.device)
    settings = {"command": "quickstart", **flatten(replace(config, overwrite=False))}
    run = Run.create(config.out, config=settings, seed=config.seed, overwrite=config.overwrite)
    print_start(config.model, start)

    say(1, f"sample {config.answers} answers to each of {len(prompts)} prompts, and label pairs by gold reward")
    pairs = labelled_pairs(draw(start, prompts, config.answers, config), gold, config)
    files, trained_on = write_pairs(run.directory, pairs), len(pairs["train"])

    say(2, f"train a reward model on {trained_on} pairs")
    accuracy = train_reward_model(run.directory, files, config)
    proxy = parse_reward(str(run.directory / "reward"), dtype=config.dtype, device=config.device, max_length=1024)

    say(3, f"sample {config.n} answers to each of {len(held_out)} held-out prompts: the start model and best-of-n")
    judged = Judged(start, gold, proxy, config)
    judged.start_model(draw(start, held_out, config.n, config))
    stage = count(4)
    for method in trained_methods(config):
        if method == "dpo":
            say(next(stage), "DPO on the pairs")
            train_dpo(run.directory, files, trained_on, config)
        else:
            say(next(stage), f"{method}, rewarded with {REWARD_NAMES[config.rl_reward]}")
            train_online(run.directory, method, prompts, config)
        say(next(stage), f"judge {method}'s checkpoints on the held-out prompts")
        judged.trained(method, run.directory / method, held_out)
    finish(run, config, judged, accuracy, sum(len(some) for some in pairs.values()))


def with_sizes(config: Quickstart) -> Quickstart:
    """The config with every size decided. Refuses sizes that leave nothing to compare."""
    prompts, held_out_prompts, rl_rollouts = (24, 8, 6) if config.model == "tiny" else (108, 40, 16)
    config = replace(
        config,
        prompts=prompts if config.prompts is None else config.prompts,
        held_out_prompts=held_out_prompts if config.held_out_prompts is None else config.held_out_prompts,
        rl_rollouts=rl_rollouts if config.rl_rollouts is None else config.rl_rollouts,
    )
    least = {"prompts": 5, "held_out_prompts": 2, "answers": 2, "n": 2, "max_new_tokens": 1, "rl_rollouts": 1}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least {smallest} is needed.")
    for name in ("coin", "beta", "lr", "rl_lr", "reward_lr", "epochs"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: a number above 0 is needed.")
    check_methods(config)
    check_effect(config, rl_rollouts)
    return config


def check_methods(config: Quickstart) -> None:
    """Refuse unknown methods, and those of which the demo's rollouts are too small, before anything is sampled."""
    from trimtab.algorithms import ALGORITHMS
    from trimtab.recipes.algorithm import KlOptions, resolve

    given, known = config.methods, ("best-of-n", "dpo", *ALGORITHMS)
    if len(set(given)) < len(given) or not set(given) <= set(known):
        raise ValueError(f"--methods {' '.join(given)}: give some of {', '.join(known)}, each once.")
    for method in set(given) & set(ALGORITHMS):
        resolve(algorithm_options(method, config), KlOptions())


def check_effect(config: Quickstart, rl_rollouts: int) -> None:
    """Refuse flags of methods that are not given. `rl_rollouts` is what a stored config says where nobody asked."""
    rl = [name for name in config.methods if name not in ("best-of-n", "dpo")]
    of_method = {"dpo": ("beta", "lr", "epochs"), "online RL": ("rl_reward", "rl_rollouts", "rl_lr")}
    usual = replace(Quickstart(), rl_rollouts=rl_rollouts)
    for method in [*([] if "dpo" in config.methods else ["dpo"]), *([] if rl else ["online RL"])]:
        for name in of_method[method]:
            if getattr(config, name) != getattr(usual, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(config, name)} has no effect: there is no {method} in "
                    f"--methods {' '.join(config.methods)}."
                )


def algorithm_options(method: str, config: Quickstart) -> AlgorithmOptions:
    """A row of the table of algorithms, with rollouts of the demo's size."""
    from trimtab.recipes.algorithm import AlgorithmOptions

    assert config.prompts
    return AlgorithmOptions(method, group_size=RL_ANSWERS, prompts_per_step=min(RL_PROMPTS, config.prompts))


def trained_methods(config: Quickstart) -> list[str]:
    """The methods that leave a run, in the order they were given."""
    return [method for method in config.methods if method != "best-of-n"]


def print_start(name: str, policy: Policy) -> None:
    """The first line: which model, where, and in which arithmetic."""
    from trimtab.progress import console

    console.print(f"{name} on {policy.device}: {policy.arithmetic.why}")


def say(stage: int, text: str) -> None:
    """One line a stage."""
    from trimtab.progress import console

    console.print(f"[bold]{stage}[/bold] {text}")


def draw(policy: Policy, prompts: Sequence[Prompt], n: int, config: Quickstart) -> Samples:
    """Answers at temperature 1, the distribution that KL is measured on."""
    from trimtab.sampling import sample

    return sample(policy, prompts, n, max_new_tokens=config.max_new_tokens, seed=config.seed, progress=True)


def labelled_pairs(samples: Samples, gold: Reward, config: Quickstart) -> dict[str, list[Preference]]:
    """Pairs for training and held-out pairs, no prompt in both; a coin on their gold rewards says which is chosen.

    Training takes every pair of a prompt's answers. Held-out pairs share no answer, so that their accuracy has an
    honest interval. Equal answers are no pair.
    """
    import random
    from itertools import combinations

    import torch

    from trimtab.rewards import every_score

    coin = random.Random(config.seed)
    scores = torch.tensor(every_score(gold, samples.row_prompts, samples.answers), dtype=torch.float64)
    held_out = max(1, round(PAIRS_HELD_OUT * len(samples.prompts)))
    pairs: dict[str, list[Preference]] = {"train": [], "heldout": []}
    for prompt in range(len(samples.prompts)):
        rows = range(prompt * samples.n, (prompt + 1) * samples.n)
        part = "heldout" if prompt < held_out else "train"
        couples = zip(rows[::2], rows[1::2], strict=False) if part == "heldout" else combinations(rows, 2)
        for first, second in couples:
            if samples.texts[first] != samples.texts[second]:
                first_wins = coin.random() < torch.sigmoid(config.coin * (scores[first] - scores[second])).item()
                pairs[part].append(pair_of(samples, *((first, second) if first_wins else (second, first))))
    return pairs


def pair_of(samples: Samples, chosen: int, rejected: int) -> Preference:
    """Two rows of the samples as a preference; an answer that was cut stays marked as cut."""
    from trimtab.records import Preference

    return Preference(
        samples.row_prompts[chosen],
        samples.texts[chosen],
        samples.texts[rejected],
        chosen_finished=bool(samples.finished[chosen]),
        rejected_finished=bool(samples.finished[rejected]),
    )


def write_pairs(directory: Path, pairs: dict[str, list[Preference]]) -> dict[str, Path]:
    """The pairs as files, pairs-train.jsonl and pairs-heldout.jsonl."""
    from trimtab.data import to_row
    from trimtab.recipes.training import write_rows

    if not all(pairs.values()):
        raise ValueError("too few different answers came out to train on; give more --prompts or --answers.")
    files = {part: directory / f"pairs-{part}.jsonl" for part in pairs}
    for part, path in files.items():
        write_rows(path, (to_row(pair) for pair in pairs[part]))
    return files


def train_reward_model(directory: Path, files: dict[str, Path], config: Quickstart) -> dict[str, float]:
    """`trimtab reward` on the pairs; returns its held-out accuracy with interval."""
    from trimtab.recipes.reward import Reward, reward

    return reward(
        Reward(
            model=ModelOptions(config.model, config.dtype, config.device),
            data=DataOptions(str(files["train"]), str(files["heldout"])),
            run=RunOptions(str(directory / "reward"), config.seed),
            steps=StepOptions(
                lr=config.reward_lr, batch_size=BATCH_SIZE, optimizer=OptimizerOptions(schedule="linear")
            ),
        )
    )


def train_dpo(directory: Path, files: dict[str, Path], pairs: int, config: Quickstart) -> None:
    """`trimtab dpo` on the same pairs, with a checkpoint on the way for the frontier."""
    from math import ceil

    from trimtab.batches import batch_starts
    from trimtab.recipes.dpo import Dpo, dpo

    steps = ceil(len(batch_starts(pairs, BATCH_SIZE)) * config.epochs)
    dpo(
        Dpo(
            model=ModelOptions(config.model, config.dtype, config.device),
            data=DataOptions(str(files["train"])),
            run=RunOptions(str(directory / "dpo"), config.seed, save_every=ceil(steps / 2), save_state=False),
            steps=StepOptions(lr=config.lr, batch_size=BATCH_SIZE, steps=steps),
            loss_args=(f"beta={config.beta}",),
        )
    )


def train_online(directory: Path, method: str, prompts: Sequence[Prompt], config: Quickstart) -> None:
    """`trimtab rl` on the training prompts, with a checkpoint on the way."""
    from math import ceil

    from trimtab.algorithms import ALGORITHMS
    from trimtab.data import to_row
    from trimtab.recipes.rl import Rl, rl
    from trimtab.recipes.training import write_rows

    assert config.rl_rollouts
    file, steps = directory / "prompts.jsonl", config.rl_rollouts * ALGORITHMS[method].updates
    write_rows(file, (to_row(prompt) for prompt in prompts))
    rl(
        Rl(
            model=ModelOptions(config.model, config.dtype, config.device),
            data=DataOptions(str(file)),
            run=RunOptions(
                str(directory / method), config.seed, save_every=ceil(steps / 2), save_state=False, samples=0
            ),
            reward=RewardChoice(online_rewards(directory, config)),
            algorithm=algorithm_options(method, config),
            sampling=SamplingOptions(max_new_tokens=config.max_new_tokens),
            steps=OnlineStepOptions(lr=config.rl_lr, steps=steps, micro_batch_rows=RL_PROMPTS * RL_ANSWERS),
        )
    )


def online_rewards(directory: Path, config: Quickstart) -> tuple[str, ...]:
    """What online RL is rewarded with, in the grammar of --reward."""
    return ("sentiment",) if config.rl_reward == "gold" else (str(directory / "reward"),)


class Judged:
    """What every method reached on the held-out prompts, gathered as the methods come."""

    def __init__(self, start: Policy, gold: Reward, proxy: Reward, config: Quickstart) -> None:
        self.start, self.gold, self.proxy, self.config = start, gold, proxy, config
        self.methods: list[dict[str, Any]] = []
        self.frontier: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []
        self.start_gold: Any = None

    def start_model(self, samples: Samples) -> None:
        """The start model itself, and best-of-n chosen among its answers by the proxy."""
        import torch

        from trimtab.overoptimization.best_of_n import best_of, expected_best_of_n, kl_bound

        n = self.config.n
        gold, proxy, lengths = self.measures(samples)
        self.start_gold = gold.mean(-1)
        zero = torch.zeros(len(gold))
        self.add("start", gold.mean(-1), proxy.mean(-1), zero, lengths.mean(-1))
        self.texts = [
            {"prompt": prompt.text, "answers": {"start": self.answer(samples, i, 0, gold, proxy)}}
            for i, prompt in enumerate(samples.prompts)
        ]
        if "best-of-n" not in self.config.methods:
            return
        for k in [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= n]:
            for method, chosen_by in {"best-of-n": proxy, "best-of-n by gold": gold}.items():
                estimate = expected_best_of_n(chosen_by, gold, k).mean().item()
                self.frontier.append({"method": method, "n": k, "kl": kl_bound(k), "gold": estimate})
        expected = (expected_best_of_n(proxy, values, n) for values in (gold, proxy, lengths))
        gold_n, proxy_n, length_n = expected
        self.add(f"best-of-{n}", gold_n, proxy_n, torch.full((len(gold),), kl_bound(n)), length_n)
        self.methods[-1]["kl_is_bound"] = True
        for i, best in enumerate(best_of(proxy).tolist()):
            answer = self.answer(samples, i, best, gold, proxy)
            self.texts[i]["answers"][f"best-of-{n}"] = answer | {"kl": kl_bound(n), "kl_is_bound": True}

    def trained(self, method: str, run: Path, prompts: Sequence[Prompt]) -> None:
        """A trained policy: its checkpoints as points of the frontier, its final model as a method."""
        last = (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
        for path in sorted((run / "checkpoints").glob("step-*")):
            step = int(path.name.removeprefix("step-"))
            if step == last:
                continue  # the final model, which comes next
            _, gold, _, _, kl = self.judge(path, prompts, CHECKPOINT_ANSWERS)
            self.frontier.append({"method": method, "step": step, "kl": kl.mean().item(), "gold": gold.mean().item()})
        samples, gold, proxy, lengths, kl = self.judge(run, prompts, EVALUATION_ANSWERS)
        self.frontier.append({"method": method, "step": None, "kl": kl.mean().item(), "gold": gold.mean().item()})
        self.add(method, gold.mean(-1), proxy.mean(-1), kl.mean(-1), lengths.mean(-1))
        for i, text in enumerate(self.texts):
            text["answers"][method] = self.answer(samples, i, 0, gold, proxy) | {"kl": kl[i, 0].item()}
        drop_checkpoints(run)

    def judge(self, path: Path, prompts: Sequence[Prompt], answers: int) -> tuple[Samples, Any, Any, Any, Any]:
        """Samples of a saved policy, their gold and proxy rewards, lengths and KL, `[prompts, answers]` each."""
        from trimtab.models import load_policy

        policy = load_policy(str(path), dtype=self.config.dtype, device=self.config.device)
        samples = draw(policy, prompts, answers, self.config)
        return samples, *self.measures(samples), self.kl(policy, samples)

    def measures(self, samples: Samples) -> tuple[Any, Any, Any]:
        """Gold reward, proxy reward and length in tokens of every answer, each `[prompts, answers]` in float64."""
        import torch

        from trimtab.rewards import every_score

        asked, answers = samples.row_prompts, samples.answers
        scores = (every_score(reward, asked, answers) for reward in (self.gold, self.proxy))
        gold, proxy = (torch.tensor(values, dtype=torch.float64).view(-1, samples.n) for values in scores)
        return gold, proxy, samples.tokens.response_lengths.double().view(-1, samples.n).cpu()

    def kl(self, policy: Policy, samples: Samples) -> Any:
        """Exact KL from the start model in nats per answer, `[prompts, answers]`."""
        from trimtab.evals.drift import kl_per_token

        return kl_per_token(policy, self.start, samples).sum(-1).double().view(-1, samples.n).cpu()

    def add(self, method: str, gold: Any, proxy: Any, kl: Any, length: Any) -> None:
        """One row of the table, from one mean per prompt each; intervals are over prompts."""
        from trimtab.evals.intervals import bootstrap_difference, bootstrap_mean

        row: dict[str, Any] = {"method": method}
        for name, values in {"gold": gold, "proxy": proxy, "kl": kl, "length": length}.items():
            row[name] = bootstrap_mean(values.numpy(), seed=self.config.seed).to_dict()
        # The same prompts and the same uniform numbers for all methods, so the difference is paired by prompt.
        gain = bootstrap_difference(gold.numpy(), self.start_gold.numpy(), seed=self.config.seed)
        self.methods.append({**row, "gold_gain": gain.to_dict()})

    def answer(self, samples: Samples, prompt: int, answer: int, gold: Any, proxy: Any) -> dict[str, Any]:
        """One answer with its rewards, for people to read."""
        text = samples.texts[prompt * samples.n + answer]
        return {"text": text, "gold": gold[prompt, answer].item(), "proxy": proxy[prompt, answer].item()}


def drop_checkpoints(run: Path) -> None:
    """The checkpoints were only kept to be judged; the final model stays."""
    import shutil

    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def finish(run: Run, config: Quickstart, judged: Judged, accuracy: dict[str, float], pairs: int) -> None:
    """The table, summary.json, samples.jsonl and report.html."""
    from rich.console import Console

    from trimtab.progress import console
    from trimtab.report import write_report
    from trimtab.run import write_json

    held_out = {"value": accuracy["accuracy"], "low": accuracy["accuracy_low"], "high": accuracy["accuracy_high"]}
    summary = {
        "model": config.model,
        "methods": judged.methods,
        "reward_model": {"accuracy": held_out, "pairs": accuracy["pairs"]},
        "frontier": judged.frontier,
        "pairs": pairs,
        "notes": notes(config),
        "texts": judged.texts,
        "commands": own_commands(config),
    }
    write_json(run.directory / "summary.json", summary)
    for text in judged.texts:
        run.append("samples.jsonl", text)
    runs = [run.directory / name for name in ("reward", *trained_methods(config))]
    page = write_report(runs, run.directory / "report.html", summary=summary)
    print_table(summary, Console(highlight=False, soft_wrap=True, width=max(100, console.width)))
    console.print(f"summary: {run.directory / 'summary.json'}\nreport: {page}")


def notes(config: Quickstart) -> list[str]:
    """What has to be known to compare the methods."""
    from trimtab.report.summary import method_name

    online = [method_name(method) for method in trained_methods(config) if method != "dpo"]
    if not online:
        return []
    others = "; DPO and best-of-n saw labels drawn by a coin, or the reward model that learned from them"
    return [f"{' and '.join(online)} trained on {REWARD_NAMES[config.rl_reward]}{others}."]


def own_commands(config: Quickstart) -> list[str]:
    """What to type to do the same, with the same settings, to one's own model and data.

    Nobody has a gold reward there, so online RL is rewarded by the reward model.
    """
    pairs = f"--model MY_MODEL --data MY_PAIRS.jsonl --eval-data HELD_OUT.jsonl --batch-size {BATCH_SIZE}"
    sampled = f"--data MY_PROMPTS.jsonl --max-new-tokens {config.max_new_tokens}"
    moved = f"--lr {config.lr:g} --epochs {config.epochs:g} --loss-args beta={config.beta:g}"
    online = [online_command(method, sampled, config) for method in trained_methods(config) if method != "dpo"]
    return [
        "trimtab data check MY_PAIRS.jsonl --model MY_MODEL",
        f"trimtab reward {pairs} --lr {config.reward_lr:g} --schedule linear --out runs/reward",
        "trimtab evaluate reward --reward runs/reward --data HELD_OUT.jsonl",
        f"trimtab best-of-n --model MY_MODEL --reward runs/reward {sampled} -n {config.n} --out best.jsonl",
        f"trimtab dpo {pairs} {moved} --out runs/dpo",
        *online,
        f"trimtab generate --model runs/dpo {sampled} --out answers.jsonl",
    ]


def online_command(method: str, sampled: str, config: Quickstart) -> str:
    """What to type for an algorithm of online RL."""
    from trimtab.algorithms import ALGORITHMS

    assert config.rl_rollouts
    size = f"--group-size {RL_ANSWERS} --prompts-per-step {RL_PROMPTS} --lr {config.rl_lr:g}"
    steps = config.rl_rollouts * ALGORITHMS[method].updates
    moved = f"{size} --steps {steps} --out runs/{method}"
    return f"trimtab rl --algorithm {method} --model MY_MODEL --reward runs/reward {sampled} {moved}"


def print_table(summary: dict[str, Any], console: Any) -> None:
    """The short table at the end."""
    from rich.table import Table

    accuracy = summary["reward_model"]["accuracy"]
    table = Table(title="held-out prompts: mean and 95 % interval")
    for column in ("method", "gold reward", "proxy reward", "KL (nats)", "length (tokens)"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in summary["methods"]:
        cells = {name: cell(row[name]) for name in ("gold", "proxy", "kl", "length")}
        if row.get("kl_is_bound"):
            cells["kl"] = f"at most {cells['kl']}"
        table.add_row(row["method"], *cells.values())
    console.print(f"reward model: held-out accuracy {cell(accuracy)}")
    console.print(table)
    console.print("the same with your own model and data:")
    for command in summary["commands"]:
        console.print(f"  {command}")


def cell(estimate: dict[str, Any]) -> str:
    """An estimate in a table."""
    if estimate["low"] is None or estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
