"""The bridge between text and tensors, and the only file that touches a tokenizer.

Three rules hold for every row made here:

- The prompt's ids are exactly what a sampler feeds (`encode_prompt`), with one beginning-of-sequence token if the
  tokenizer adds one. The answer's ids follow them in token space; no id is ever compared to find the boundary.
- An answer is closed exactly once, by the special token with which the chat template ends an assistant turn, else by
  the end-of-sequence token. That token carries loss, nothing else that the template writes does.
- Masks come from lengths. A pad token that is also the end-of-sequence token hides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jinja2 import TemplateError
from rich.text import Text

from trimtab.batches import DemonstrationBatch, FeedbackBatch, PairBatch, RankingBatch, Tokens
from trimtab.progress import progress_bar
from trimtab.records import TEXT, Demonstration, Feedback, Message, Preference, Prompt, Ranking, Record
from trimtab.untrusted import MOST_TEMPLATE, TEMPLATE_GROWTH, TEMPLATE_MEMORY, TEMPLATE_SECONDS, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate-prompt-left", "truncate-response"]
OVERLONG: tuple[Overlong, ...] = get_args(Overlong)

Turns = Literal["last", "all"]
TURNS: tuple[Turns, ...] = get_args(Turns)

SENTINEL = "trimtabsentinel{}q7x3"
"""Stands in for an answer while a template is rendered, to see what the template writes around it."""

QUESTION = (Message("user", "question"),)
"""The conversation with which a template is tried out."""

ANCHORS = ("", "\n", ".", "a")
"""Texts after which an answer is tokenized when it has to be cut from its prompt: sentencepiece tokenizers write a
space before the first word of a text, and only something in front of the answer keeps them from it."""

FIRST_WORDS = ("a", "the", "yes", "I")
"""Words an answer may begin with, to see whether white space before it merges into them."""

TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, LookupError, ArithmeticError, AttributeError, ValueError, AssertionError),
    *(RuntimeError, SyntaxError, MemoryError, OSError),
)
"""Everything that a template can raise: it is code of somebody else's."""

CHUNK_TEXTS = 512
"""Texts handed to the tokenizer at once: enough to use every core, few enough for the progress bar to move."""


@dataclass(frozen=True)
class Row:
    """One unpadded sequence: its ids, and which of them the policy wrote or is to imitate (never the first)."""

    ids: list[int]
    response: list[bool]


@dataclass(frozen=True)
class Encoded:
    """A record and its rows, which share their first `prompt_length` ids (`bos_length` of them begin the sequence).

    One row for a demonstration; chosen and rejected for a preference; best first for a ranking; the answer and the
    mismatched answer for feedback.
    """

    record: Record
    rows: tuple[Row, ...]
    prompt_length: int
    bos_length: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class OverlongCounts:
    """What `--overlong` did: rows are rows of the data (a pair counts once), lengths are tokens before any cut.

    `cut` rows were shortened and kept; `dropped` rows are gone.
    """

    rows: int
    cut: int
    dropped: int
    longest: int
    max_length: int
    policy: Overlong

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, the longest {self.longest} tokens (--max-length {self.max_length}): "
            f"{self.cut} cut, {self.dropped} dropped (--overlong {self.policy})"
        )


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around an answer.

    `header` is text before it that the generation prompt lacks; `lead` is white space before it that merges with its
    first word into one token, so that the policy has to write it; `closing` is the id that ends it.
    """

    header: str
    lead: str
    closing: int


@dataclass(frozen=True)
class Opening:
    """A tokenized prompt: its text, its ids, which of them carry loss (earlier answers), and how its answer goes on.

    `bos` holds the beginning-of-sequence id where it has to be added in front of `ids`.
    """

    text: str
    bos: list[int]
    ids: list[int]
    response: list[bool]
    lead: str
    closing: int
    is_text: bool

    @property
    def length(self) -> int:
        """Tokens, the beginning-of-sequence token included."""
        return len(self.bos) + len(self.ids)


# ---- What tokenizers say about themselves


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: the tokenizer's pad token, else its end-of-sequence token."""
    given = tokenizer.pad_token_id
    return eos_id(tokenizer) if given is None else _single(given)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token. ValueError if there is none, for then no answer could end."""
    given = tokenizer.eos_token_id
    if given is None:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} has no end-of-sequence token, so no answer could end. "
            'Give "eos_token" in its tokenizer_config.json, or use another model with --model.'
        )
    return _single(given)


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None = None) -> frozenset[int]:
    """The ids that end an answer: end of sequence, the chat template's closing token, the generation config's own."""
    extra = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
    closing = [_chat_format(tokenizer).closing] if tokenizer.chat_template else []
    return frozenset([eos_id(tokenizer), *closing, *extra])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response's ids, without special tokens and without any prettifying of spaces."""
    return _text(tokenizer, ids, skip_special_tokens=True)


def _single(value: Any) -> int:
    assert isinstance(value, int), f"a special token has one id, not {value!r}"
    return value


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else type(tokenizer).__name__


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The ids of a text with nothing added. With `special=False`, special tokens in it are ordinary text."""
    return tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=not special)["input_ids"]


def _many_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, progress: bool, description: str
) -> list[list[int]]:
    """`_ids` of many texts."""
    found: list[list[int]] = []
    with progress_bar(description, len(texts)) if progress and texts else nullcontext(_unseen) as advance:
        for start in range(0, len(texts), CHUNK_TEXTS):
            chunk = list(texts[start : start + CHUNK_TEXTS])
            found += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            advance(len(chunk))
    return found


def _unseen(count: int) -> None:
    """Progress that nobody asked to see."""


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence id, if the tokenizer puts it before every text by default."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    return [_single(bos)] if adds else []


# ---- Chat templates


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, generate: bool) -> str:
    """The text that the chat template makes of a conversation."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{_where(prompt)}this is a conversation, and the tokenizer {_name(tokenizer)} has no chat template. "
            "Give data with plain-text columns (strings instead of role/content messages), "
            "or the instruct version of the model with --model."
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    if any(message.role == TEXT for message in prompt.messages):
        raise ValueError(
            f"{_where(prompt)}a prompt is either plain text or a conversation, not both: {messages!r:.300}"
        )
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_MEMORY):
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message.role for message in prompt.messages[:20])
        reason = str(error)[:300] or f"it ends in {type(error).__name__}"
        raise ValueError(
            f"{_where(prompt)}the chat template of {_name(tokenizer)} refuses a conversation of {roles}: {reason}"
        ) from error
    assert isinstance(rendered, str)
    most = MOST_TEMPLATE + TEMPLATE_GROWTH * sum(len(message.content) for message in prompt.messages)
    if len(rendered) > most:
        raise ValueError(
            f"{_where(prompt)}the chat template of {_name(tokenizer)} makes {len(rendered):,} characters of this "
            f"conversation, expected at most {most:,}. Correct its chat_template."
        )
    return rendered


def _where(prompt: Prompt) -> str:
    return f"{prompt.source}: " if prompt.source else ""


def _around_sentinels(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool, source: str
) -> list[str]:
    """The texts that the template writes before, between and after the assistant's messages."""
    count = sum(message.role == "assistant" for message in messages)
    numbers = iter(range(count))
    hidden = tuple(Message(m.role, SENTINEL.format(next(numbers))) if m.role == "assistant" else m for m in messages)
    rest, segments = _render(tokenizer, Prompt(hidden, source=source), generate=generate), []
    for i in range(count):
        segment, found, rest = rest.partition(SENTINEL.format(i))
        if not found or SENTINEL.format(i) in rest:
            raise ValueError(
                f"{_where(Prompt(hidden, source=source))}the chat template of {_name(tokenizer)} does not write the "
                "content of each assistant message exactly once, so the answer's tokens cannot be found. "
                "Correct its chat_template, or give plain-text columns."
            )
        segments.append(segment)
    return [*segments, rest]


def _chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """How the tokenizer's template writes an answer, seen from a small conversation."""
    eos_id(tokenizer)  # without one a template fails too, but says less
    before, after = _around_sentinels(tokenizer, (*QUESTION, Message("assistant", "")), generate=False, source="")
    header, lead = _header(tokenizer, before)
    return ChatFormat(header, lead, _closing(tokenizer, after))


def _header(tokenizer: PreTrainedTokenizerBase, before: str) -> tuple[str, str]:
    """What the template writes before an answer beyond its generation prompt, as header and lead.

    A template that ignores `add_generation_prompt` would leave its assistant marker out, so it is taken from a
    rendered answer. Where a template does write a generation prompt, only white space after it counts: the rest (an
    empty thought, say) is the policy's to write or not.
    """
    generated = _render(tokenizer, Prompt(QUESTION), generate=True)
    missing = before.removeprefix(generated) if before.startswith(generated) else ""
    supported = generated != _render(tokenizer, Prompt(QUESTION), generate=False)
    if not missing or (supported and not missing.isspace()):
        return "", ""
    start = _ids(tokenizer, before)
    if all(_ids(tokenizer, before + word)[: len(start)] == start for word in FIRST_WORDS):
        return missing, ""
    header = missing.rstrip(" ")
    return header, missing[len(header) :]


def _closing(tokenizer: PreTrainedTokenizerBase, after: str) -> int:
    """The id that ends an answer: the special token that follows it in the template, else the end of sequence."""
    eos = eos_id(tokenizer)
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    added[str(tokenizer.eos_token)] = eos
    fits = [token for token in added if after.lstrip().startswith(token)]
    return added[max(fits, key=len)] if fits else eos


# ---- Prompts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids that a sampler feeds: a conversation with its generation prompt, or plain text as it stands.

    There is exactly one beginning-of-sequence id if the tokenizer adds one by default, whether or not the template
    writes it too. An empty text has no ids with a tokenizer that adds none.
    """
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """`encode_prompt` for many prompts, several times faster than one by one."""
    openings = _openings(tokenizer, prompts, turns="last", progress=False)
    return [[*openings[prompt.messages].bos, *openings[prompt.messages].ids] for prompt in prompts]


def _openings(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, turns: Turns, progress: bool
) -> dict[tuple[Message, ...], Opening]:
    """Every different prompt, tokenized once."""
    unique = {prompt.messages: prompt for prompt in prompts}
    chat = _chat_format(tokenizer) if any(not prompt.is_text for prompt in unique.values()) else None
    texts = [_prompt_text(tokenizer, prompt, chat) for prompt in unique.values()]
    bos, eos = _added_bos(tokenizer), eos_id(tokenizer)
    openings = {}
    encoded = _many_ids(tokenizer, texts, progress=progress, description="tokenizing prompts")
    for prompt, text, ids in zip(unique.values(), texts, encoded, strict=True):
        row = Row(ids, [False] * len(ids))
        if turns == "all" and chat and any(message.role == "assistant" for message in prompt.messages):
            row = _with_earlier_turns(tokenizer, prompt, text, chat)
        openings[prompt.messages] = Opening(
            text=text,
            bos=[] if row.ids[:1] == bos else bos,
            ids=row.ids,
            response=row.response,
            lead="" if prompt.is_text or chat is None else chat.lead,
            closing=eos if prompt.is_text or chat is None else chat.closing,
            is_text=prompt.is_text,
        )
    return openings


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: ChatFormat | None) -> str:
    if prompt.is_text:
        return "".join(message.content for message in prompt.messages)
    assert chat is not None
    return _render(tokenizer, prompt, generate=True) + chat.header


def _with_earlier_turns(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, chat: ChatFormat) -> Row:
    """A prompt whose assistant turns carry loss, each with its closing token if the template writes one."""
    ids: list[int] = []
    response: list[bool] = []
    done = ""
    for piece, carries_loss in _pieces(tokenizer, prompt, text, chat):
        whole = _ids(tokenizer, done + piece)
        added = _after(tokenizer, ids, whole, piece) if piece else []
        ids, response, done = ids + added, response + [carries_loss] * len(added), done + piece
    return Row(ids, response)


def _pieces(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, chat: ChatFormat) -> list[tuple[str, bool]]:
    """A prompt's text in consecutive pieces, each with whether it carries loss."""
    segments = _around_sentinels(tokenizer, prompt.messages, generate=True, source=prompt.source)
    segments[-1] += chat.header
    contents = [message.content for message in prompt.messages if message.role == "assistant"]
    closing = _text(tokenizer, [chat.closing])
    pieces, position = [(segments[0], False)], len(segments[0])
    for content, segment in zip(contents, segments[1:], strict=True):
        written = _as_written(text, position, content, segment)
        if written is None or not text.startswith(segments[0]):
            raise ValueError(
                f"{_where(prompt)}the chat template of {_name(tokenizer)} rewrites earlier assistant messages, so "
                'their tokens cannot be found: train on the last answer only (turns "last")'
            )
        before, closed, after = (
            segment.partition(closing) if segment.lstrip().startswith(closing) else ("", "", segment)
        )
        position += len(written) + len(segment)
        previous = pieces.pop()[0]
        lead = chat.lead if previous.endswith(chat.lead) else ""
        pieces += [(previous.removesuffix(lead), False), (lead + written, True)]
        pieces += [(before, False), (closed, True), (after, False)]
    return pieces


def _as_written(text: str, position: int, content: str, segment: str) -> str | None:
    """A message's content as the template wrote it at `position`: unchanged or trimmed."""
    forms = (content, content.strip(), content.lstrip(), content.rstrip())
    return next((form for form in forms if text.startswith(form + segment, position)), None)


# ---- Answers


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, *, turns: Turns = "last") -> Row:
    """A prompt and one answer: the ids of `encode_prompt`, the answer's own, and its closing token once.

    `turns="all"` also trains on the assistant's earlier turns in the prompt; where one of them merges with the
    template's text into one token, its tokens are kept apart, and the prompt's ids differ from the sampler's there.
    """
    [encoded] = tokenize(tokenizer, [Demonstration(prompt, response)], turns=turns)
    return encoded.rows[0]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, turns: Turns = "last", progress: bool = False
) -> list[Encoded]:
    """The rows of records at full length, whatever that is; `fit` makes them fit.

    Feedback has one row here; `encode_feedback` adds the mismatched one.
    """
    asked = [(_prompt_of(record), _responses_of(record)) for record in records]
    answered = _answers(tokenizer, asked, turns=turns, progress=progress)
    bos = tokenizer.bos_token_id
    return [
        Encoded(record, ended_as_told(record, rows), length, bos_length=int(length > 0 and rows[0].ids[0] == bos))
        for record, (rows, length) in zip(records, answered, strict=True)
    ]


def ended_as_told(record: Record, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a record without the closing token where its answer was cut; an answer of nothing else keeps it."""
    match record:
        case Demonstration() | Feedback():
            finished: tuple[bool, ...] = (record.finished,)
        case Preference():
            finished = (record.chosen_finished, record.rejected_finished)
        case _:
            return rows
    return tuple(
        row if done or sum(row.response) == 1 else Row(row.ids[:-1], row.response[:-1])
        for row, done in zip(rows, finished, strict=True)
    )


def _prompt_of(record: Record) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt


def _responses_of(record: Record) -> tuple[str, ...]:
    match record:
        case Demonstration() | Feedback():
            return (record.response,)
        case Preference():
            return (record.chosen, record.rejected)
        case Ranking():
            return record.responses
    raise ValueError(f"{_where(record)}a prompt alone has no answer to learn from; use encode_prompt")


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Prompt, tuple[str, ...]]],
    *,
    turns: Turns,
    progress: bool,
) -> Iterator[tuple[tuple[Row, ...], int]]:
    """For each prompt and its answers: their rows, and how many tokens the prompt has."""
    _check("turns", turns, TURNS)
    openings = _openings(tokenizer, [prompt for prompt, _ in asked], turns=turns, progress=progress)
    flat = [(openings[prompt.messages], response) for prompt, responses in asked for response in responses]
    rows = _rows(tokenizer, flat, progress=progress)
    for prompt, responses in asked:
        yield tuple(next(rows) for _ in responses), openings[prompt.messages].length


def _rows(tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[Opening, str]], *, progress: bool) -> Iterator[Row]:
    """The row of each prompt and answer."""
    eos = eos_id(tokenizer)
    endings = {closing: _texts(tokenizer, {closing, eos}) for closing in {opening.closing for opening, _ in asked}}
    tails = _tails(tokenizer, [opening for opening, _ in asked])
    answers = [
        opening.lead + _open_ended(tokenizer, opening, response, endings[opening.closing])
        for opening, response in asked
    ]
    texts = [tails[opening.text][0] + answer for (opening, _), answer in zip(asked, answers, strict=True)]
    wholes = _many_ids(tokenizer, texts, progress=progress, description="tokenizing answers")
    marks = _texts(tokenizer, {eos, *_special_ids(tokenizer)})
    for (opening, _), answer, whole in zip(asked, answers, wholes, strict=True):
        spelled = not opening.is_text and any(mark in answer for mark in {*marks, *endings[opening.closing]})
        added = _after(tokenizer, tails[opening.text][1], whole, answer, special=not spelled)
        yield _closed(opening, added)


def _closed(opening: Opening, answer: list[int]) -> Row:
    ids = [*opening.bos, *opening.ids, *answer, opening.closing]
    response = [False] * len(opening.bos) + opening.response + [True] * (len(answer) + 1)
    return Row(ids, [False, *response[1:]])


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> set[str]:
    return {_text(tokenizer, [number]) for number in ids}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [_single(number) for number in tokenizer.all_special_ids]


def _tails(tokenizer: PreTrainedTokenizerBase, openings: Iterable[Opening]) -> dict[str, tuple[str, list[int]]]:
    """The end of each prompt from its last special token on, as text and ids.

    A special token splits a text before anything else does, so an answer's ids depend on nothing further left, and
    long prompts are not tokenized again with each of their answers.
    """
    specials = [text for text in _texts(tokenizer, _special_ids(tokenizer)) if text.strip()]
    known: dict[str, list[int]] = {}
    tails = {}
    for opening in {opening.text: opening for opening in openings}.values():
        text = opening.text[max([0, *(opening.text.rfind(special) for special in specials)]) :]
        if not text or len(text) == len(opening.text):
            tails[opening.text] = (opening.text, opening.ids)
            continue
        if text not in known:
            known[text] = _ids(tokenizer, text)
        agrees = opening.ids[-len(known[text]) :] == known[text]
        tails[opening.text] = (text, known[text]) if agrees else (opening.text, opening.ids)
    return tails


def _open_ended(tokenizer: PreTrainedTokenizerBase, opening: Opening, response: str, endings: Iterable[str]) -> str:
    """An answer without the closing token (and white space behind it) that its author may have spelled out.

    A text without a prompt also loses a spelled-out beginning-of-sequence token where the tokenizer adds it anyway.
    """
    if opening.bos and not opening.text:
        response = response.removeprefix(str(tokenizer.bos_token))
    while any(response.rstrip().endswith(ending) for ending in endings):
        response = response.rstrip()
        ending = max((ending for ending in endings if response.endswith(ending)), key=len)
        response = response.removesuffix(ending)
    return response


def _after(
    tokenizer: PreTrainedTokenizerBase, start: list[int], whole: list[int], text: str, *, special: bool = True
) -> list[int]:
    """The ids of `text` after `start`, where `whole` are the ids of both tokenized together.

    Usually the rest of `whole`. Where a token of `whole` straddles the boundary, `text` is tokenized on its own, so
    that `start` stays what a sampler would see, in the first way that reads the same after `start`. With
    `special=False`, special tokens that `text` spells out are ordinary text.
    """
    if special and whole[: len(start)] == start:
        return whole[len(start) :]
    expected = _text(tokenizer, whole)
    candidates = [ids for anchor in ANCHORS if (ids := _anchored(tokenizer, anchor, text, special)) is not None]
    return next((ids for ids in candidates if _text(tokenizer, start + ids) == expected), candidates[0])


def _anchored(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str, special: bool) -> list[int] | None:
    """The ids of `text` as they follow those of `anchor`; None where the two merge."""
    start, whole = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text, special=special)
    return whole[len(start) :] if whole[: len(start)] == start else None


# ---- Rows that are too long


def encode(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_length: int,
    overlong: Overlong = "error",
    turns: Turns = "last",
    progress: bool = False,
) -> tuple[list[Encoded], OverlongCounts]:
    """Records as rows of at most `max_length` tokens, and what that took (see `fit`).

    ValueError if nothing is left.
    """
    _check_fit(max_length, overlong)
    items = tokenize(tokenizer, records, turns=turns, progress=progress)
    fitting, counts = fit(items, max_length, overlong)
    if items and not fitting:
        raise ValueError(f"nothing is left to learn from: {counts}. Type --max-length {counts.longest}.")
    return fitting, counts


def encode_feedback(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Feedback],
    *,
    seed: int,
    max_length: int,
    overlong: Overlong = "error",
    turns: Turns = "last",
    progress: bool = False,
) -> tuple[list[Encoded], OverlongCounts]:
    """Feedback as two rows an item: its answer, and a mismatched answer to the same prompt (see `mismatched`).

    `overlong` is about the answer. A mismatched one is never a reason to drop or refuse anything: it follows the same
    (perhaps cut) prompt and loses its end where it is too long, for only its log-probability is asked.
    """
    items, counts = encode(tokenizer, records, max_length=max_length, overlong=overlong, turns=turns, progress=progress)
    others = mismatched([item.record for item in items if isinstance(item.record, Feedback)], seed)
    paired = []
    for item, other in zip(items, tokenize(tokenizer, others, turns=turns, progress=progress), strict=True):
        excess = other.prompt_length - item.prompt_length
        row = _head(_without_start(other.rows[0], item.bos_length, excess), max_length)
        paired.append(replace(item, rows=(*item.rows, row)))
    return paired, counts


def _check_fit(max_length: int, overlong: str) -> None:
    _check("overlong", overlong, OVERLONG)
    if max_length < 2:
        raise ValueError(
            f"--max-length is {max_length}: a row needs at least 2 tokens, one of prompt and one of answer"
        )


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: give one of {', '.join(allowed)}")


def fit(items: Sequence[Encoded], max_length: int, overlong: Overlong) -> tuple[list[Encoded], OverlongCounts]:
    """The items that fit into `max_length` tokens, cut where `overlong` says so, and the counts.

    - `error`: ValueError if any is too long.
    - `drop`: an item with a row that is too long is dropped.
    - `truncate-prompt-left`: the prompt loses its beginning (but keeps its beginning-of-sequence token), by the same
      amount in all rows of an item. Dropped where not even one token of prompt fits beside the answer.
    - `truncate-response`: answers lose their end, closing token included. Dropped where the prompt leaves no room, and
      where two cut answers of a pair or ranking have become the same.

    An item without any token to learn from (an empty text) is an error or dropped likewise.
    """
    _check_fit(max_length, overlong)
    if overlong == "error":
        _refuse_any(items, max_length)
    fitted = [_fitted(item, max_length, overlong) for item in items]
    kept = [item for item in fitted if item is not None]
    cut = sum(after is not None and after is not before for before, after in zip(items, fitted, strict=True))
    longest = max((item.longest for item in items), default=0)
    return kept, OverlongCounts(len(items), cut, len(items) - len(kept), longest, max_length, overlong)


def _fitted(item: Encoded, max_length: int, overlong: Overlong) -> Encoded | None:
    """An item that fits: itself, a cut one, or None."""
    cuts = {"truncate-prompt-left": _cut_prompt, "truncate-response": _cut_responses}
    if not _has_responses(item):
        return None
    if item.longest <= max_length:
        return item
    return cuts[overlong](item, max_length) if overlong in cuts else None


def _refuse_any(items: Sequence[Encoded], max_length: int) -> None:
    """ValueError if any item is too long or has nothing to learn from."""
    hopeless = [item for item in items if not _has_responses(item)]
    if hopeless:
        raise ValueError(
            f"{len(hopeless)} of {len(items)} rows have no token to learn from, the first one "
            f"{_place(hopeless[0])}: give it a prompt or an answer, or type --overlong drop"
        )
    too_long = [item for item in items if item.longest > max_length]
    if too_long:
        worst = max(too_long, key=lambda item: item.longest)
        raise ValueError(
            f"{len(too_long)} of {len(items)} rows are longer than --max-length {max_length} tokens, the longest "
            f"{worst.longest} ({_place(worst)}). Type --max-length {worst.longest}, or one of "
            "--overlong drop, --overlong truncate-prompt-left, --overlong truncate-response."
        )


def _place(item: Encoded) -> str:
    prompt = _prompt_of(item.record)
    return prompt.source or repr(prompt.text[:60])


def _has_responses(item: Encoded) -> bool:
    return all(any(row.response) for row in item.rows)


def _cut_prompt(item: Encoded, max_length: int) -> Encoded | None:
    excess = item.longest - max_length
    if item.prompt_length - excess < 1:
        return None
    rows = tuple(_without_start(row, item.bos_length, excess) for row in item.rows)
    return replace(item, rows=rows, prompt_length=item.prompt_length - excess)


def _without_start(row: Row, keep: int, excess: int) -> Row:
    """A row without `excess` tokens behind its first `keep`; its new first token carries no loss."""
    response = row.response[:keep] + row.response[keep + excess :]
    return Row(row.ids[:keep] + row.ids[keep + excess :], [False, *response[1:]])


def _cut_responses(item: Encoded, max_length: int) -> Encoded | None:
    rows = tuple(_head(row, max_length) for row in item.rows)
    compared = isinstance(item.record, Preference | Ranking)
    same = compared and len({tuple(row.ids) for row in rows}) < len(rows)
    return None if item.prompt_length >= max_length or same else replace(item, rows=rows)


def _head(row: Row, length: int) -> Row:
    return Row(row.ids[:length], row.response[:length])


# ---- Mismatched answers


def mismatched(records: Sequence[Feedback], seed: int) -> list[Feedback]:
    """The same prompts, each with another row's answer: KTO's sample of answers that do not belong to their prompts.

    A derangement of the rows: each answer is used once, never after its own prompt's row, and after a different
    prompt wherever the data allow it. ValueError for fewer than two rows.
    """
    if len(records) < 2:
        raise ValueError(f"mismatched answers need at least 2 rows of feedback, and there are {len(records)}")
    groups: dict[tuple[Message, ...], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.prompt.messages, []).append(i)
    generator = random.Random(seed)
    shuffled = generator.sample(list(groups.values()), len(groups))
    order = [i for group in shuffled for i in generator.sample(group, len(group))]
    # Rows of one prompt are neighbours, so a shift by the largest such group leaves every group, unless one prompt
    # has more than half of all rows.
    shift = max(len(group) for group in groups.values()) % len(order) or 1
    partner = {i: order[(place + shift) % len(order)] for place, i in enumerate(order)}
    others = (records[partner[i]] for i in range(len(records)))
    return [
        replace(record, response=other.response, finished=other.finished)
        for record, other in zip(records, others, strict=True)
    ]


# ---- Batches


def pad(rows: Sequence[Row], pad_id: int, *, side: Literal["left", "right"] = "right") -> Tokens:
    """Rows filled up with `pad_id` to the length of the longest; both masks come from lengths."""
    _check("side", side, ("left", "right"))
    width = max((len(row.ids) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    response_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        assert len(row.ids) == len(row.response), "one flag a token"
        assert not any(row.response[:1]), "no policy wrote the first token"
        start = width - len(row.ids) if side == "left" else 0
        columns = slice(start, start + len(row.ids))
        ids[i, columns] = torch.tensor(row.ids, dtype=torch.long)
        attention_mask[i, columns] = True
        response_mask[i, columns] = torch.tensor(row.response, dtype=torch.bool)
    return Tokens(ids, attention_mask, response_mask)


def demonstration_batch(items: Sequence[Encoded], pad_id: int) -> DemonstrationBatch:
    """Demonstrations as one batch, one row each."""
    records = [item.record for item in items if isinstance(item.record, Demonstration)]
    return DemonstrationBatch(_tokens(items, len(records), pad_id), _numbers(record.weight for record in records))


def pair_batch(items: Sequence[Encoded], pad_id: int) -> PairBatch:
    """Preferences as one batch: rows chosen, rejected, chosen, rejected, ..."""
    records = [item.record for item in items if isinstance(item.record, Preference)]
    return PairBatch(
        _tokens(items, 2 * len(records), pad_id),
        weights=_numbers(record.weight for record in records),
        confidence=_numbers(record.confidence for record in records),
        margin=_numbers(record.margin for record in records),
    )


def ranking_batch(items: Sequence[Encoded], pad_id: int) -> RankingBatch:
    """Rankings as one batch: the rows of each are neighbours, best first."""
    records = [item.record for item in items if isinstance(item.record, Ranking)]
    sizes = [len(record.responses) for record in records]
    weights = _numbers(record.weight for record in records)
    return RankingBatch(_tokens(items, sum(sizes), pad_id), torch.tensor(sizes, dtype=torch.long), weights)


def feedback_batch(items: Sequence[Encoded], pad_id: int) -> FeedbackBatch:
    """Feedback of `encode_feedback` as one batch: rows answer, mismatched answer, answer, ..."""
    records = [item.record for item in items if isinstance(item.record, Feedback)]
    return FeedbackBatch(
        _tokens(items, 2 * len(records), pad_id),
        desirable=torch.tensor([record.desirable for record in records], dtype=torch.bool),
        weights=_numbers(record.weight for record in records),
    )


def _tokens(items: Sequence[Encoded], expected_rows: int, pad_id: int) -> Tokens:
    rows = [row for item in items for row in item.rows]
    assert len(rows) == expected_rows, f"{len(rows)} rows where this kind of record makes {expected_rows}"
    return pad(rows, pad_id)


def _numbers(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float32)


# ---- For people to read


def show(tokenizer: PreTrainedTokenizerBase, tokens: Tokens | Sequence[Row]) -> Text:
    """Rows as coloured text: the prompt dim, what carries loss green, the special token that closes it highlighted.

    Special tokens are written out and newlines are marked; padding is left out.
    """
    rows = _unpadded(tokens) if isinstance(tokens, Tokens) else tokens
    special = {eos_id(tokenizer), *tokenizer.added_tokens_decoder}
    text = Text()
    for number, row in enumerate(rows):
        text.append(f"row {number}: {len(row.ids)} tokens, {sum(row.response)} with loss\n", style="bold")
        for ids, style in _runs(row, special):
            text.append(_text(tokenizer, ids).replace("\n", "\u21b5\n"), style=style)
        text.append("\n\n" if number + 1 < len(rows) else "\n")
    return text


def _runs(row: Row, special: set[int]) -> Iterator[tuple[list[int], str]]:
    """Consecutive ids of one style: letters of more than one token can only be read together."""
    run, last = [], ""
    for token, carries_loss in zip(row.ids, row.response, strict=True):
        closes = carries_loss and token in special
        style = "bold black on green" if closes else "green" if carries_loss else "dim"
        if run and style != last:
            yield run, last
            run = []
        run, last = [*run, token], style
    yield run, last


def _unpadded(tokens: Tokens) -> list[Row]:
    return [
        Row(ids[real].tolist(), response[real].tolist())
        for ids, real, response in zip(tokens.ids, tokens.attention_mask, tokens.response_mask, strict=True)
    ]
