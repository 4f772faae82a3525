"""Every column format, as strings and as messages, gives the record it means, and comes back from `to_row`."""

from typing import Any

import pytest

from trimtab import data
from trimtab.records import TEXT, Demonstration, Feedback, Message, Preference, Prompt, Ranking, Record

KINDS: list[type[Record]] = [Prompt, Demonstration, Preference, Ranking, Feedback]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ASK = [user("What colour?")]
CHAT = Prompt.from_user("What colour?")
PLAIN = Prompt.from_text("The sky is")
NOTHING = Prompt.from_text("")
TURNS = (Message("user", "What colour?"), Message("assistant", "Of what?"), Message("user", "The sky."))
LONG = [user("What colour?"), assistant("Of what?"), user("The sky.")]
TRANSCRIPT = "\n\nHuman: What colour?\n\nAssistant: Of what?\n\nHuman: The sky.\n\nAssistant:"

FORMATS: dict[str, tuple[dict[str, Any], Record]] = {
    "prompt, text": ({"prompt": "The sky is"}, PLAIN),
    "prompt, messages": ({"prompt": ASK}, CHAT),
    "prompt, transcript": ({"prompt": TRANSCRIPT}, Prompt(TURNS)),
    "prompt, transcript without an open turn": ({"prompt": "\n\nHuman: What colour?"}, CHAT),
    "prompt, answer of a transcript": (
        {"prompt": TRANSCRIPT, "completion": " Blue.\n"},
        Demonstration(Prompt(TURNS), "Blue."),
    ),
    "prompt with answer and user": (
        {"prompt": "The sky is", "answer": 7, "user": "u1"},
        Prompt.from_text("The sky is", answer="7", user="u1"),
    ),
    "messages as a prompt": ({"messages": LONG}, Prompt(TURNS)),
    "messages as a prompt, answered": ({"messages": [*LONG, assistant("Blue.")]}, Prompt(TURNS)),
    "implicit prompt": (
        {"chosen": [*LONG, assistant("Blue.")], "rejected": [*LONG, assistant("Black.")]},
        Prompt(TURNS),
    ),
    "messages": ({"messages": [*LONG, assistant("Blue.")]}, Demonstration(Prompt(TURNS), "Blue.")),
    "messages, turns after the answer": (
        {"messages": [*ASK, assistant("Blue."), user("Thanks.")]},
        Demonstration(CHAT, "Blue."),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Blue."}]},
        Demonstration(CHAT, "Blue."),
    ),
    "parts of text": (
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "colour?"}]}
            ]
        },
        CHAT,
    ),
    "text": ({"text": "The sky is blue."}, Demonstration(NOTHING, "The sky is blue.")),
    "prompt + completion, text": ({"prompt": "The sky is", "completion": " blue"}, Demonstration(PLAIN, " blue")),
    "prompt + completion, messages": (
        {"prompt": ASK, "completion": [assistant("Blue.")], "weight": 2},
        Demonstration(CHAT, "Blue.", 2.0),
    ),
    "prompt text, completion messages": (
        {"prompt": "What colour?", "completion": [assistant("Blue.")]},
        Demonstration(CHAT, "Blue."),
    ),
    "instruction + input + output": (
        {"instruction": "Translate.", "input": "blau", "output": "blue"},
        Demonstration(Prompt.from_text("Translate.\n\nblau"), "blue"),
    ),
    "question + answer": ({"question": "The sky is", "answer": "blue"}, Demonstration(PLAIN, "blue")),
    "question + worked answer": (
        {"question": "2 + 2", "answer": "It is 4", "final_answer": "4"},
        Demonstration(Prompt.from_text("2 + 2", answer="4"), "It is 4"),
    ),
    "chosen as a demonstration": (
        {"prompt": ASK, "chosen": [assistant("Blue.")], "rejected": [assistant("Black.")], "weight": 3},
        Demonstration(CHAT, "Blue.", 3.0),
    ),
    "preference, text": (
        {"prompt": "The sky is", "chosen": " blue", "rejected": " black"},
        Preference(PLAIN, " blue", " black"),
    ),
    "preference, messages": (
        {"prompt": ASK, "chosen": [assistant("Blue.")], "rejected": [assistant("Black.")]},
        Preference(CHAT, "Blue.", "Black."),
    ),
    "preference, all columns": (
        {
            "prompt": ASK,
            "chosen": "Blue.",
            "rejected": "Black.",
            "margin": -1.5,
            "weight": 0,
            "annotator": 17,
            "user": "u1",
            "confidence": 0.75,
            "answer": "blue",
        },
        Preference(
            Prompt.from_user("What colour?", user="u1", answer="blue"), "Blue.", "Black.", "17", 0.75, -1.5, 0.0
        ),
    ),
    "preference, tie": (
        {"prompt": ASK, "chosen": "Blue.", "rejected": "Black.", "confidence": 0.5},
        Preference(CHAT, "Blue.", "Black.", confidence=0.5),
    ),
    "preference, answers repeat the prompt": (
        {"prompt": LONG, "chosen": [*LONG, assistant("Blue.")], "rejected": [*LONG, assistant("Black.")]},
        Preference(Prompt(TURNS), "Blue.", "Black."),
    ),
    "preference, prompt is one of the turns": (
        {
            "prompt": "What colour?",
            "chosen": [{"role": "system", "content": "Be brief."}, *ASK, assistant("Blue.")],
            "rejected": [{"role": "system", "content": "Be brief."}, *ASK, assistant("Black.")],
        },
        Preference(Prompt((Message("system", "Be brief."), *CHAT.messages)), "Blue.", "Black."),
    ),
    "implicit, messages": (
        {"chosen": [*LONG, assistant("Blue.")], "rejected": [*LONG, assistant("Black.")]},
        Preference(Prompt(TURNS), "Blue.", "Black."),
    ),
    "implicit, transcript": (
        {"chosen": f"{TRANSCRIPT} Blue.", "rejected": f"{TRANSCRIPT} Black."},
        Preference(Prompt(TURNS), "Blue.", "Black."),
    ),
    "implicit, transcript with text before it": (
        {"chosen": f"Be brief.{TRANSCRIPT} Blue.", "rejected": f"Be brief.{TRANSCRIPT} Black."},
        Preference(Prompt((Message("system", "Be brief."), *TURNS)), "Blue.", "Black."),
    ),
    "implicit, plain text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        Preference(NOTHING, "The sky is blue.", "The sky is black."),
    ),
    "judged, first": (
        {"prompt": ASK, "output_1": "Blue.", "output_2": "Black.", "label": 1},
        Preference(CHAT, "Blue.", "Black."),
    ),
    "judged, second": (
        {"prompt": ASK, "output_1": "Black.", "output_2": "Blue.", "label": 2},
        Preference(CHAT, "Blue.", "Black."),
    ),
    "judged, tie": (
        {"prompt": ASK, "output_1": "Blue.", "output_2": "Black.", "majority": 0},
        Preference(CHAT, "Blue.", "Black.", confidence=0.5),
    ),
    "judged, no majority": (
        {"prompt": ASK, "output_1": "Blue.", "output_2": "Black.", "majority": None},
        Preference(CHAT, "Blue.", "Black.", confidence=0.5),
    ),
    "ranking, text": (
        {"prompt": "The sky is", "completions": [" blue", " grey", " black"]},
        Ranking(PLAIN, (" blue", " grey", " black")),
    ),
    "ranking, messages": (
        {"prompt": ASK, "completions": [[assistant("Blue.")], [assistant("Black.")]], "annotator": "a", "weight": 2},
        Ranking(CHAT, ("Blue.", "Black."), "a", 2.0),
    ),
    "ranking of a pair": (
        {"prompt": ASK, "chosen": [assistant("Blue.")], "rejected": [assistant("Black.")]},
        Ranking(CHAT, ("Blue.", "Black.")),
    ),
    "feedback, text": (
        {"prompt": "The sky is", "completion": " blue", "label": True},
        Feedback(PLAIN, " blue", True),
    ),
    "feedback, messages": (
        {"prompt": ASK, "completion": [assistant("Black.")], "label": 0, "annotator": "a"},
        Feedback(CHAT, "Black.", False, "a"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_read_as_the_record_it_means(write, name: str):
    row, expected = FORMATS[name]
    loaded = data.load(write(row), type(expected))
    assert loaded.records == [expected]
    assert (loaded.rows, loaded.skipped) == (1, [])


@pytest.mark.parametrize("name", FORMATS)
def test_to_row_comes_back_as_the_same_record(write, name: str):
    row, expected = FORMATS[name]
    [record] = data.load(write({**row, "id": "row-1"}), type(expected)).records
    [again] = data.load(write(data.to_row(record)), type(expected)).records
    assert again == expected
    prompts = [item if isinstance(item, Prompt) else item.prompt for item in (record, again)]
    assert prompts[0].columns == prompts[1].columns
    assert prompts[0].columns["id"] == "row-1"


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".parquet.gz", ".csv.gz"])
@pytest.mark.parametrize("name", [name for name in FORMATS if "parts" not in name and "no majority" not in name])
def test_every_file_format_says_the_same(write, name: str, suffix: str):
    row, expected = FORMATS[name]
    assert data.load(write(row, name=f"rows{suffix}"), type(expected)).records == [expected]


def test_answers_that_begin_alike_are_whole_answers(write):
    """The known way to get it wrong: a split at the longest common prefix leaves "ack." and "ue."."""
    for chosen, rejected in [
        ([*ASK, assistant("Black.")], [*ASK, assistant("Blue.")]),
        ("\n\nHuman: What colour?\n\nAssistant: Black.", "\n\nHuman: What colour?\n\nAssistant: Blue."),
    ]:
        [pair] = data.load(write({"chosen": chosen, "rejected": rejected}), Preference).records
        assert (pair.prompt, pair.chosen, pair.rejected) == (CHAT, "Black.", "Blue.")
    [pair] = data.load(write({"chosen": "Black.", "rejected": "Blue."}), Preference).records
    assert (pair.prompt, pair.chosen, pair.rejected) == (NOTHING, "Black.", "Blue.")


def test_a_transcript_is_split_at_its_last_assistant_turn(write):
    start = "\n\nHuman: Say Assistant: twice\n\nAssistant: Assistant: one\n\nHuman: Go on\n\nAssistant:"
    [pair] = data.load(write({"chosen": f"{start} two", "rejected": f"{start} three"}), Preference).records
    assert [message.content for message in pair.prompt.messages] == ["Say Assistant: twice", "Assistant: one", "Go on"]
    assert (pair.chosen, pair.rejected) == ("two", "three")


def test_plain_text_that_only_mentions_a_human_stays_text(write):
    for text in ["Human: A History of a Word", "He said:\n\nAssistant: no", "To err is Human: so it goes"]:
        [prompt] = data.load(write({"prompt": text}), Prompt).records
        assert prompt.messages == (Message(TEXT, text),)


def test_whitespace_of_plain_answers_is_kept(write):
    [pair] = data.load(write({"prompt": "a ", "chosen": " b\n", "rejected": "\tc"}), Preference).records
    assert (pair.prompt.text, pair.chosen, pair.rejected) == ("a ", " b\n", "\tc")


def test_all_further_columns_are_kept_with_the_prompt(write):
    row = {
        "id": 3,
        "prompt": ASK,
        "chosen": "Blue.",
        "rejected": "Black.",
        "margin": 1,
        "subset": "s",
        "votes": [[1, 0]],
    }
    path = write(row)
    [pair] = data.load(path, Preference).records
    assert pair.prompt.columns == {"id": 3, "subset": "s", "votes": [[1, 0]]}
    assert pair.prompt.source == f"{path}:1"
    [prompt] = data.load(path, Prompt).records
    assert set(prompt.columns) == {"id", "subset", "votes"}  # what is said of answers does not go on to others


def test_both_answers_of_a_worked_problem_survive_a_round_trip(write):
    path = write({"question": "2 + 2", "answer": "It is 4", "final_answer": "4"})
    [prompt] = data.load(path, Prompt).records
    assert (prompt.answer, prompt.columns) == ("4", {"answer": "It is 4"})
    [again] = data.load(write(data.to_row(prompt)), Prompt).records
    assert (again.answer, again.columns) == ("4", {"answer": "It is 4"})


def test_a_ranking_gives_all_its_pairs(write):
    loaded = data.load(write({"prompt": "p", "completions": ["a", "b", "c"], "annotator": "x"}), Preference)
    assert [(pair.chosen, pair.rejected, pair.annotator) for pair in loaded.records] == [
        ("a", "b", "x"),
        ("a", "c", "x"),
        ("b", "c", "x"),
    ]
    assert loaded.rows == 1
    assert loaded.notes[0] == "1 of 1 rows: every ranking gives all its pairs"


def test_a_pair_gives_two_pieces_of_feedback(write):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "x", "weight": 2}
    assert data.load(write(row), Feedback).records == [
        Feedback(Prompt.from_text("p"), "a", True, "x", 2.0),
        Feedback(Prompt.from_text("p"), "b", False, "x", 2.0),
    ]


@pytest.mark.parametrize("kind", [Ranking, Feedback])
def test_a_tie_is_neither_a_ranking_nor_feedback(write, kind: type[Record]):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.5}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: confidence: found 0\.5 .* more than 0\.5"):
        data.load(write(row), kind)


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (True, True),
        (1, True),
        (1.0, True),
        ("true", True),
        ("True", True),
        ("1", True),
        (False, False),
        (0, False),
        ("false", False),
    ],
)
def test_labels_may_be_written_in_several_ways(write, label: Any, desirable: bool):
    [feedback] = data.load(write({"prompt": "p", "completion": "c", "label": label}), Feedback).records
    assert feedback.desirable is desirable


def test_numbers_of_csv_files_are_numbers_and_empty_cells_are_nothing(write, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,margin,weight,annotator\np,a,b,0.5,,\n", encoding="utf-8")
    assert data.load(path, Preference).records == [Preference(Prompt.from_text("p"), "a", "b", margin=0.5)]


@pytest.mark.parametrize(
    ("kind", "row", "note"),
    [
        (
            Demonstration,
            {"prompt": ASK, "chosen": "a", "rejected": "b"},
            "pairs are read as demonstrations of their chosen",
        ),
        (
            Demonstration,
            {"prompt": ASK, "completions": ["a", "b"]},
            "rankings are read as demonstrations of their best",
        ),
        (
            Demonstration,
            {"messages": [*ASK, assistant("a"), user("b")]},
            "turns after the last assistant turn are dropped",
        ),
        (Demonstration, {"prompt": ASK, "completion": "a", "label": False}, "undesirable and is imitated"),
        (Feedback, {"prompt": ASK, "chosen": "a", "rejected": "b"}, "a desirable and an undesirable answer"),
        (Prompt, {"prompt": "p"}, "prompts are plain text: no chat template"),
    ],
)
def test_notes_say_how_rows_were_read(write, kind: type[Record], row: dict[str, Any], note: str):
    [found] = data.load(write(row, row), kind).notes
    assert found.startswith("2 of 2 rows: ")
    assert note in found


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (Prompt, {"prompt": ASK}),
        (Preference, {"prompt": ASK, "chosen": "a", "rejected": "b"}),
        (Demonstration, {"messages": [*ASK, assistant("a")]}),
        (Demonstration, {"text": "a"}),
        (Demonstration, {"prompt": ASK, "completion": "a", "label": True}),
    ],
)
def test_what_is_read_as_it_is_needs_no_note(write, kind: type[Record], row: dict[str, Any]):
    assert data.load(write(row), kind).notes == []


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name.split(",")[0] in ("preference", "judged", "ranking", "feedback", "text")]
)
def test_the_kind_of_a_file_is_told_from_its_columns(write, name: str):
    row, expected = FORMATS[name]
    assert data.kind_of(write(row)) is type(expected)


def test_empty_answers_are_answers(write):
    """A model may say nothing: the end-of-sequence token is the answer. `data check` counts them."""
    [pair] = data.load(write({"prompt": "p", "chosen": "", "rejected": "b"}), Preference).records
    assert pair.chosen == ""


def test_a_file_may_mix_formats(write):
    path = write({"prompt": ASK, "completion": "a"}, {"messages": [*ASK, assistant("b")]}, {"text": "c"})
    assert [record.response for record in data.load(path, Demonstration).records] == ["a", "b", "c"]


def test_null_columns_make_way_for_filled_ones(write):
    """Tables have every column in every row, so the other formats' columns are null."""
    path = write({"messages": None, "prompt": ASK, "completion": "a", "text": None})
    assert data.load(path, Demonstration).records == [Demonstration(CHAT, "a")]
