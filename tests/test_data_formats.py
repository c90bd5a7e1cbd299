"""Each known format, and each reason for which a row is unusable."""

from __future__ import annotations

import math

import pytest

from discobeta.data.formats import Reason, Unusable, find_layout, read_example
from discobeta.errors import UserError

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
HELLO, GO = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "go away"}
HUMAN, GPT, BAD = (
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
    {"from": "gpt", "value": "go away"},
)


def read(row, kind="pairs", entry=None):
    """(prompt, chosen, rejected) of one row that stands alone in its dataset."""
    example = read_example(row, find_layout([row], entry or {}, kind, "data"), kind)
    return example.prompt, example.chosen, example.rejected


PAIRS = {
    "text": ({"prompt": "hi", "chosen": "hello", "rejected": "go away"}, "hi"),
    "messages, explicit prompt": ({"prompt": [USER], "chosen": [HELLO], "rejected": [GO]}, [USER]),
    "messages, explicit prompt repeated": ({"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, GO]}, [USER]),
    "messages, implicit prompt": ({"chosen": [USER, HELLO], "rejected": [USER, GO]}, [USER]),
    "messages, prompt as text": ({"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, GO]}, [USER]),
    "messages, prompt as text, apart": ({"prompt": "hi", "chosen": [HELLO], "rejected": [GO]}, [USER]),
    "message prompt, text responses": ({"prompt": [USER], "chosen": "hello", "rejected": "go away"}, [USER]),
    "alpaca": ({"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"}, [USER]),
    "alpaca, older": ({"instruction": "hi", "output": ["hello", "go away"]}, [USER]),
    "sharegpt": ({"conversations": [HUMAN], "chosen": GPT, "rejected": BAD}, [USER]),
    "transcript": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
        [USER],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_preference_format_gives_the_same_pair(name):
    row, prompt = PAIRS[name]
    assert read(row) == (prompt, "hello", "go away")
    assert read(row, "supervised") == (prompt, "hello", None)
    assert read(row, "prompts") == (prompt, None, None)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi", "completion": "hello"}, "hi"),
        ({"prompt": [USER], "completion": [HELLO]}, [USER]),
        ({"messages": [USER, HELLO]}, [USER]),
        ({"instruction": "hi", "output": "hello"}, [USER]),
        ({"conversations": [HUMAN, GPT]}, [USER]),
    ],
)
def test_supervised_formats(row, prompt):
    assert read(row, "supervised") == (prompt, "hello", None)
    assert read(row, "prompts") == (prompt, None, None)
    with pytest.raises(UserError, match="no known format of pairs"):
        read(row, "pairs")


def test_plain_text_is_all_response():
    assert read({"text": "hello"}, "supervised") == ("", "hello", None)


@pytest.mark.parametrize("row", [{"prompt": "hi"}, {"prompt": [USER]}, {"instruction": "hi"}, {"messages": [USER]}])
def test_prompt_only_formats(row):
    assert read(row, "prompts")[0] in ("hi", [USER])


def test_alpaca_joins_system_history_instruction_and_input():
    row = {"instruction": "add", "input": "1 2", "system": "be brief", "history": [["hi", "hello"]], "output": "3"}
    assert read(row, "prompts")[0] == [
        SYSTEM,
        USER,
        HELLO,
        {"role": "user", "content": "add\n1 2"},
    ]


def test_alpaca_columns_can_be_named():
    entry = {"columns": {"prompt": "question", "system": "role", "chosen": "good", "rejected": "bad"}}
    row = {"question": "hi", "role": "be brief", "good": "hello", "bad": "go away"}
    assert read(row, entry=entry) == ([SYSTEM, USER], "hello", "go away")


def test_sharegpt_columns_and_tags_can_be_named():
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "chosen": "good", "rejected": "bad", "system": "role"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    }
    row = {
        "turns": [{"who": "me", "says": "hi"}],
        "role": "be brief",
        "good": {"who": "it", "says": "hello"},
        "bad": {"who": "it", "says": "go away"},
    }
    assert read(row, entry=entry) == ([SYSTEM, USER], "hello", "go away")


def test_transcript_keeps_all_turns_before_the_last_answer():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    prompt, chosen, rejected = read({"chosen": f"{start} a", "rejected": f"{start} b\nHuman: no turn"})
    assert prompt == [USER, HELLO, {"role": "user", "content": "and?"}]
    assert (chosen, rejected) == ("a", "b\nHuman: no turn")


def test_truth_passes_through():
    row = {
        "prompt": "hi",
        "chosen": "a",
        "rejected": "b",
        "truth": {"topic": "t", "noise": 0.5, "level": 2, "no": None},
    }
    example = read_example(row, find_layout([row], {}, "pairs", "data"), "pairs", "file:3")
    assert example.truth == {"topic": "t", "noise": 0.5, "level": 2}
    assert example.source == "file:3"


def test_gaps_of_truth_and_the_limits_of_what_it_keeps():
    truth = {"gap": math.nan, "none": None, "flag": True, "low": -(2**63), "high": 2**63 - 1, "text": "x" * 1000}
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", "truth": truth}
    kept = read_example(row, find_layout([row], {}, "pairs", "data"), "pairs").truth
    assert kept == {"flag": True, "low": -(2**63), "high": 2**63 - 1, "text": "x" * 1000}


GOOD = {"prompt": "hi", "chosen": "a", "rejected": "b"}
TALK = {"chosen": [USER, HELLO], "rejected": [USER, GO]}
SCRIPT = {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}
ALPACA = {"instruction": "hi", "chosen": "a", "rejected": "b"}
UNUSABLE = [
    (GOOD, {"prompt": "  "}, "empty prompt"),
    (GOOD, {"chosen": " \n"}, "empty response"),
    (GOOD, {"rejected": ""}, "empty response"),
    (GOOD, {"rejected": "a "}, "chosen equals rejected"),
    (GOOD, {"prompt": None}, "wrong types"),
    (GOOD, {"chosen": 3}, "wrong types"),
    (GOOD, {"truth": [1]}, "wrong types"),
    (GOOD, {"truth": {"noise": [1]}}, "wrong types"),
    (GOOD, {"chosen": "half a pair: \ud83d"}, "not UTF-8"),
    (GOOD, {"prompt": "\ud83d"}, "not UTF-8"),
    (GOOD, {"truth": {"topic": "\ud83d"}}, "not UTF-8"),
    (GOOD, {"truth": {"\ud83d": 1}}, "not UTF-8"),
    (GOOD, {"truth": {"noise": {"a": 1}}}, "wrong types"),
    (GOOD, {"truth": "noise"}, "wrong types"),
    (GOOD, {"truth": {"id": 2**63}}, "truth that cannot be kept"),
    (GOOD, {"truth": {"id": -(2**63) - 1}}, "truth that cannot be kept"),
    (GOOD, {"truth": {"noise": math.inf}}, "truth that cannot be kept"),
    (GOOD, {"truth": {"topic": "x" * 1001}}, "truth that cannot be kept"),
    (GOOD, {"truth": {"topic": "a\0"}}, "truth that cannot be kept"),
    (GOOD, {"truth": Unusable(Reason.KEY_TWICE)}, "a key stands twice"),
    (GOOD, {"prompt": Unusable(Reason.UNREADABLE)}, "a value that cannot be read"),
    (ALPACA, {"input": Unusable(Reason.UNREADABLE)}, "a value that cannot be read"),
    (GOOD, {"rejected": ...}, "missing column"),
    (TALK, {"rejected": [{"role": "user", "content": "ho"}, GO]}, "prompts differ"),
    (TALK, {"rejected": [USER]}, "last turn is not the assistant's"),
    (TALK, {"rejected": []}, "last turn is not the assistant's"),
    (TALK, {"rejected": [USER, {"role": "critic", "content": "b"}]}, "unknown role"),
    (TALK, {"rejected": [USER, {"role": "assistant", "content": None}]}, "wrong types"),
    (TALK, {"rejected": [USER, "b"]}, "wrong types"),
    (TALK, {"chosen": [SYSTEM, HELLO], "rejected": [SYSTEM, GO]}, "empty prompt"),
    (SCRIPT, {"rejected": "\n\nHuman: ho\n\nAssistant: b"}, "prompts differ"),
    (SCRIPT, {"rejected": "\n\nHuman: hi\n\nAssistant: b\n\nHuman: no"}, "last turn is not the assistant's"),
    (SCRIPT, {"rejected": "hi there"}, "last turn is not the assistant's"),
    (SCRIPT, {"rejected": "\n\nHuman: hi\n\nAssistant:"}, "empty response"),
    (ALPACA, {"history": [["one"]]}, "wrong types"),
    (ALPACA, {"history": 3}, "wrong types"),
    (ALPACA, {"input": 3}, "wrong types"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "change", "reason"), UNUSABLE)
def test_unusable_rows_say_why(row, change, reason):
    broken = {key: value for key, value in (row | change).items() if value is not ...}
    layout = find_layout([row | dict.fromkeys(change), broken], {}, "pairs", "data")
    assert read_example(row, layout, "pairs").chosen
    with pytest.raises(Unusable) as caught:
        read_example(broken, layout, "pairs")
    assert caught.value.reason == reason


def test_only_what_the_kind_needs_must_be_there():
    layout = find_layout([SCRIPT], {}, "supervised", "data")
    row = SCRIPT | {"rejected": "\n\nHuman: ho\n\nAssistant:"}
    assert read_example(row, layout, "supervised").chosen == "a"


def test_a_dataset_without_the_columns_is_refused_as_a_whole():
    with pytest.raises(
        UserError, match=r"data has the columns a, b, which is no known format of pairs.\nKnown: {prompt,"
    ):
        find_layout([{"a": 1}, {"b": 2}], {}, "pairs", "data")
    with pytest.raises(UserError, match="messages is the column 'turns'"):
        find_layout([{"a": 1}], {"formatting": "sharegpt", "columns": {"messages": "turns"}}, "pairs", "data")
