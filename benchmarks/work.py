"""The rows of every work: text that both sides tokenize for themselves.

Prompts and answers are plain text, so that no chat template stands between the two sides, and answers begin with a
space, so that no token straddles the boundary to the prompt.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["dpo", "reward", "sft", "kto", "rloo", "grpo"]
Row = dict[str, Any]

FREQUENT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get through back "
    "much before go good new write our used me man too any day same right look think also around another came come "
    "work three word must because does part even place well such here take why things help put years different away "
    "again off went old number great tell men say small every found still between name should home big give air line "
    "set own under read last never us left end along while might next sound below saw something thought both few those "
    "always looked show large often together asked house world going want school important until form food keep child"
)
WORDS = FREQUENT.split()


@dataclass(frozen=True)
class Work:
    """What a batch holds: `items` pairs or answers, prompts and answers of so many words; or conversations of a file.

    With `fill`, items are added until they no longer fit into that many packed rows of `max_length` tokens. Items of
    online RL are prompts to which `answers` are drawn; these have `answer_words` tokens, whatever words they make.
    """

    kind: Kind
    items: int
    prompt_words: int = 64
    answer_words: int = 24
    from_conversations: bool = False
    fill: int = 0
    max_length: int = 4096
    answers: int = 0


WORKS: dict[str, Work] = {
    "dpo": Work("dpo", items=8),
    "dpo_long": Work("dpo", items=4, prompt_words=256, answer_words=64),
    "dpo_hh": Work("dpo", items=4, from_conversations=True, max_length=512),
    "reward": Work("reward", items=8),
    "reward_hh": Work("reward", items=4, from_conversations=True, max_length=512),
    "sft": Work("sft", items=64, fill=2, max_length=512),
    "kto": Work("kto", items=16),
    "rloo": Work("rloo", items=8, answer_words=48, answers=4),
    "grpo": Work("grpo", items=8, answer_words=48, answers=4),
}

LONG_WORDS = 150
"""Conversations are used with at least so many words in the prompt (a few hundred tokens), at most so many in an
answer."""


def text(generator: random.Random, words: int) -> str:
    """Some words of the list, separated by spaces."""
    return " ".join(generator.choices(WORDS, k=words))


def written_rows(work: Work, seed: int = 0) -> list[Row]:
    """Rows of random words: the same for the same seed."""
    generator = random.Random(seed)

    def answer() -> str:
        return " " + text(generator, work.answer_words) + "."

    def row(number: int) -> Row:
        prompt = text(generator, work.prompt_words) + ":"
        if work.answers:
            return {"prompt": prompt, "answers": [answer() for _ in range(work.answers)]}
        if work.kind == "kto":
            return {"prompt": prompt, "completion": answer(), "label": number % 2 == 0}
        if work.kind == "sft":
            return {"prompt": prompt, "completion": answer()}
        return {"prompt": prompt, "chosen": answer(), "rejected": answer()}

    return [row(number) for number in range(work.items)]


def conversation_rows(work: Work, path: Path, seed: int = 0) -> list[Row]:
    """Pairs of a file in the form of HH (lists of messages) as plain text, those with long prompts, drawn by `seed`."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    long = [pair for pair in pairs if is_long(pair)]
    if len(long) < work.items:
        raise ValueError(f"{path}: {len(long)} prompts of {LONG_WORDS} words or more; {work.items} are needed.")
    return [plain(pair) for pair in random.Random(seed).sample(long, work.items)]


def is_long(pair: dict[str, Any]) -> bool:
    """Whether a pair has a long prompt, and answers that leave room for it."""
    answers = max(words_of(pair["chosen"]), words_of(pair["rejected"]))
    return words_of(pair["prompt"]) >= LONG_WORDS >= answers


def words_of(messages: Sequence[dict[str, str]]) -> int:
    """Words in a list of messages."""
    return sum(len(message["content"].split()) for message in messages)


def plain(pair: dict[str, Any]) -> Row:
    """A pair of conversations as plain text, under names that trimtab does not read as a conversation again."""
    names = {"user": "Question", "assistant": "Answer", "system": "Task"}
    turns = [f"\n\n{names[turn['role']]}: {turn['content'].strip()}" for turn in pair["prompt"]]
    answers = {name: " " + " ".join(turn["content"].strip() for turn in pair[name]) for name in ("chosen", "rejected")}
    return {"prompt": "".join(turns).lstrip() + "\n\nAnswer:", **answers}


def cut(row: Row, max_length: int, longest: Callable[[Row], int]) -> Row:
    """A row whose prompt has lost as many first words as it takes to have at most `max_length` tokens."""
    while (excess := longest(row) - max_length) > 0:
        if " " not in row["prompt"]:
            raise ValueError(f"an answer alone has more than {max_length} tokens: {row['chosen'][:60]!r}...")
        row = {**row, "prompt": row["prompt"].split(" ", max(1, excess // 2))[-1]}
    return row


def filled(rows: Sequence[Row], lengths: Sequence[int], work: Work) -> list[Row]:
    """The first rows, as many as fit into `fill` packed sequences of `max_length` tokens."""
    from trimtab.layout import fill_bins

    count = len(rows)
    while count > 1 and len(fill_bins(lengths[:count], work.max_length, pair_price=0.0)) > work.fill:
        count -= 1
    return list(rows[:count])


def rows_of(work: Work, tokenizer: Any, conversations: Path | None) -> list[Row]:
    """The rows of a work, cut or filled up by their length in tokens."""
    from trimtab.tokens import tokenize

    def longest(row: Row) -> int:
        return max(item.longest for item in tokenize(tokenizer, [record_of(row)]))

    if work.from_conversations:
        assert conversations is not None, "works on conversations are skipped without a file"
        return [cut(row, work.max_length, longest) for row in conversation_rows(work, conversations)]
    rows = written_rows(work)
    if work.answers:
        return [with_fixed_answers(row, tokenizer, work.answer_words) for row in rows]
    return filled(rows, [longest(row) for row in rows], work) if work.fill else rows


def with_fixed_answers(row: Row, tokenizer: Any, tokens: int) -> Row:
    """A row whose answers are ids, so many of each: what both sides learn from in the step that is compared."""
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens] for answer in row["answers"]]
    assert {len(ids) for ids in answers} == {tokens}, "a word has a token at least"
    return {**row, "answers": answers}


def record_of(row: Row) -> Any:
    """A row as trimtab's record."""
    from trimtab.records import Demonstration, Preference, Prompt

    prompt = Prompt.from_text(row["prompt"])
    if "chosen" in row:
        return Preference(prompt, row["chosen"], row["rejected"])
    return Demonstration(prompt, row["completion"])


def scaled(work: Work, factor: float) -> Work:
    """The same work with fewer words, for trying things out."""
    words = {name: max(1, round(getattr(work, name) * factor)) for name in ("prompt_words", "answer_words")}
    return replace(work, **words)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as a .jsonl file that both sides read."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
