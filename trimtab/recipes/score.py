"""`trimtab score`: adds a reward to every row of a file."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.recipes.options import RewardOptions, check_file


@dataclass(frozen=True)
class Score:
    """Every row comes back with a field `reward`: a number for one answer, a list for several in their order."""

    reward: RewardOptions
    data: str
    """Rows with answers: any accepted format; chosen comes before rejected in the list."""
    out: str
    """The .jsonl file to write."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    overwrite: bool = False
    """Replace the file if it exists."""


def score(config: Score) -> None:
    """Read rows, score every answer, write the rows with their rewards."""
    from trimtab import data
    from trimtab.data.checks import prompt_of
    from trimtab.recipes import training
    from trimtab.records import answers_of
    from trimtab.rewards import every_score, parse_rewards

    check_file(config.out, overwrite=config.overwrite)
    records = training.read(config.data, data.kind_of(config.data), skip_invalid=config.skip_invalid).records
    reward = parse_rewards(
        config.reward.choice.reward,
        config.reward.choice.reward_weights,
        **training.scoring(config.reward),
        max_length=config.reward.max_length,
        overlong=config.reward.overlong,
    )
    given = [(prompt_of(record), answer) for record in records for answer in answers_of(record)]
    if not given:
        raise ValueError(
            f"{config.data}: its rows have prompts and no answers to score. `trimtab generate` writes some."
        )
    scores = iter(every_score(reward, [prompt for prompt, _ in given], [answer for _, answer in given]))
    rows = []
    for record in records:
        found = [next(scores) for _ in answers_of(record)]
        rows.append({**data.to_row(record), "reward": found[0] if len(found) == 1 else found})
    training.write_rows(config.out, rows)
