"""Each known format, and each reason for which a row is unusable."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from discobeta.data.examples import Reason, Unusable
from discobeta.data.formats import read_example
from discobeta.data.layouts import find_layout
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
    (GOOD, {"tools": [{"name": "f", "description": "\ud83d"}]}, "not UTF-8"),
    (GOOD, {"chat_template_kwargs": {"date": "\ud83d"}}, "not UTF-8"),
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
    (TALK, {"rejected": [{"role": "user", "content": None, "name": "b"}, GO]}, "wrong types"),
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


# --- what shapes the prompt

TOOL = {"type": "function", "function": {"name": "look_up_tide", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look_up_tide", "arguments": {"port": "P"}}}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "content": "high"}
WORDS = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
MESSAGES = {"prompt": [USER], "chosen": [HELLO], "rejected": [GO]}
EXCHANGE = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def example_of(row, kind="pairs", entry=None):
    return read_example(row, find_layout([row], entry or {}, kind, "data"), kind)


def reason_of(row, kind="pairs", entry=None, beside=()):
    """Why the row cannot be used: the reason, and what it is about. beside: other rows of the data set."""
    layout = find_layout([row, *beside], entry or {}, kind, "data")
    with pytest.raises(Unusable) as caught:
        read_example(row, layout, kind)
    return caught.value.reason.value, caught.value.detail


IN_FRONT = {
    "text": WORDS,
    "messages": MESSAGES,
    "implicit": {"chosen": [USER, HELLO], "rejected": [USER, GO]},
    "transcript": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
    "alpaca": {"instruction": "hi", "chosen": "hello", "rejected": "go away"},
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD},
    "openai": {"messages": [USER], "chosen": HELLO, "rejected": GO},
    "prompt repeated": {"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, GO]},
}


@pytest.mark.parametrize("name", IN_FRONT)
@pytest.mark.parametrize("kind", ["pairs", "supervised", "prompts"])
def test_system_and_history_stand_in_front_in_every_format(name, kind):
    row = IN_FRONT[name] | {"system": "be brief", "history": [["one", "two"]]}
    assert read(row, kind)[0] == [SYSTEM, *EXCHANGE, USER]
    assert read(IN_FRONT[name] | {"system": "be brief"}, kind)[0] == [SYSTEM, USER]


@pytest.mark.parametrize("empty", [None, ""])
def test_a_text_prompt_stays_text_where_no_row_has_a_system(empty):
    assert read(WORDS | {"system": empty, "history": [], "tools": empty})[0] == "hi"
    layout = find_layout([WORDS | {"system": empty}, WORDS | {"system": "be brief"}], {}, "pairs", "data")
    assert read_example(WORDS | {"system": empty}, layout, "pairs").prompt == [USER]  # like the other rows


def test_a_system_that_the_conversation_repeats_stands_once_and_another_one_is_unusable():
    row = {"prompt": [SYSTEM, USER], "chosen": [HELLO], "rejected": [GO]}
    assert read(row | {"system": "be brief"})[0] == [SYSTEM, USER]
    assert reason_of(row | {"system": "be long"}) == ("prompt stated twice, differently", "system")


@pytest.mark.parametrize("tools", [[TOOL], TOOL, '[{"type": "function", "function": {"name": "look_up_tide", '
                                   '"parameters": {"type": "object"}}}]', [TOOL["function"]]])  # fmt: skip
def test_tools_are_kept_whatever_their_form(tools):
    example = example_of(MESSAGES | {"tools": tools})
    assert example.tools == [TOOL] and example.prompt == [USER]
    assert example_of(WORDS | {"tools": tools}).prompt == [USER]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tools):
    assert example_of(MESSAGES | {"tools": tools}).tools is None


@pytest.mark.parametrize("tools", ["{", 3, ["look_up_tide"], "3"])
def test_tools_that_are_none_are_wrong_types(tools):
    assert reason_of(MESSAGES | {"tools": tools}) == ("wrong types", "tools")


def test_variables_of_the_template_are_kept():
    example = example_of(MESSAGES | {"chat_template_kwargs": {"enable_thinking": True, "gap": None}})
    assert example.variables == {"enable_thinking": True}
    for name in ("tokenize", "add_generation_prompt", "messages"):
        assert reason_of(MESSAGES | {"chat_template_kwargs": {name: True}}) == (
            "wrong types",
            f"chat_template_kwargs: {name}",
        )


def test_calls_of_tools_and_thoughts_stay_in_their_messages():
    chosen = HELLO | {"thinking": "a friend", "weight": 1}
    example = example_of({"prompt": [USER, ASKED, ANSWERED], "chosen": [chosen], "rejected": [GO], "tools": [TOOL]})
    assert example.prompt == [USER, ASKED, ANSWERED]
    assert example.chosen == HELLO | {"thinking": "a friend"} and example.rejected == "go away"
    example = example_of({"prompt": [USER], "chosen": [ASKED], "rejected": [GO]})
    assert example.chosen == ASKED
    silent = {key: value for key, value in ASKED.items() if key != "content"}
    assert example_of({"prompt": [USER], "chosen": [silent], "rejected": [GO]}).chosen == silent | {"content": None}


def test_text_in_parts_is_text():
    parts = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}
    assert read({"prompt": [parts], "chosen": [said], "rejected": [GO]}) == ([USER], "hello", "go away")


@pytest.mark.parametrize("name", ["images", "image", "videos", "audios"])
@pytest.mark.parametrize("entry", [None, {"columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}])
def test_rows_with_pictures_and_sounds_are_unusable_by_name(name, entry):
    reason, detail = reason_of(WORDS | {name: ["a.jpg"]}, entry=entry)
    assert (reason, detail) == ("images, videos or audios, which are not read", name)
    assert example_of(WORDS | {name: []}, entry=entry).chosen == "hello"
    part = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
    assert reason_of(MESSAGES | {"prompt": [part]})[1] == "'image' in prompt"
    named = {"formatting": "sharegpt", "columns": {"messages": "turns", "chosen": "a", "rejected": "b", "images": "p"}}
    assert reason_of({"turns": [HUMAN], "a": GPT, "b": BAD, "p": ["x.jpg"]}, entry=named)[1] == "p"


# --- the prompt stated twice

TALL, WELL, AND = "How tall is it?", "Quite tall.", "And wide?"
FIRST, LAST = {"role": "user", "content": TALL}, {"role": "user", "content": AND}
LONG = [FIRST, {"role": "assistant", "content": WELL}, LAST]
TWICE = "prompt stated twice, differently"


def answers(before):
    return {"chosen": [*before, HELLO], "rejected": [*before, GO]}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": TALL, **answers(LONG)}, LONG, "hello"),
        ({"prompt": AND, **answers(LONG)}, LONG, "hello"),
        ({"prompt": LONG, **answers(LONG)}, LONG, "hello"),
        ({"prompt": [LAST], **answers(LONG)}, LONG, "hello"),
        ({"prompt": "\n\nHuman: How tall is it?\n\nAssistant:", **answers([FIRST])}, [FIRST], "hello"),
        ({"prompt": TALL, "chosen": f"{TALL} 2 m", "rejected": f"{TALL} No idea."}, TALL, " 2 m"),
        ({"instruction": TALL, "chosen": f"{TALL} 2 m", "rejected": f"{TALL} No idea."}, [FIRST], "2 m"),
        (
            {
                "prompt": f"\n\nHuman: {TALL}\n\nAssistant:",
                "chosen": f"\n\nHuman: {TALL}\n\nAssistant: 2 m",
                "rejected": f"\n\nHuman: {TALL}\n\nAssistant: No",
            },
            f"\n\nHuman: {TALL}\n\nAssistant:",
            " 2 m",
        ),
        (
            {
                "prompt": TALL,
                "chosen": f"\n\nHuman: {TALL}\n\nAssistant: 2 m",
                "rejected": f"\n\nHuman: {TALL}\n\nAssistant: No",
            },
            [FIRST],
            "2 m",
        ),
    ],
)
def test_a_prompt_that_is_repeated_to_the_letter_is_taken_once(row, prompt, chosen):
    assert read(row)[:2] == (prompt, chosen)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALL, **answers([{"role": "user", "content": f"{TALL} \n"}])},
        {"prompt": f"### Question: {TALL}\n### Answer:", **answers([FIRST])},
        {"prompt": [SYSTEM, FIRST], **answers([FIRST])},
        {"prompt": [FIRST], **answers([{"role": "user", "content": f"{TALL} "}])},
        {"prompt": [FIRST], **answers([SYSTEM, LAST])},
        {"prompt": WELL, **answers(LONG)},  # what the assistant said
        {"prompt": AND, **answers([FIRST, GO, LAST, GO, USER])},  # neither the first nor the last
        {"messages": [FIRST], "chosen": "\n\nHuman: x\n\nAssistant: 0", "rejected": "\n\nHuman: x\n\nAssistant: no"},
    ],
)
@pytest.mark.parametrize("kind", ["pairs", "supervised", "prompts"])
def test_a_prompt_that_is_stated_in_other_words_is_unusable(row, kind):
    assert reason_of(row, kind)[0] == TWICE


def test_what_is_no_second_prompt_goes_on_from_the_first():
    more = [HELLO, {"role": "user", "content": "more"}]
    row = {"prompt": [FIRST], "chosen": [*more, HELLO], "rejected": [*more, GO]}
    assert read(row)[0] == [FIRST, *more] == read(row | {"prompt": TALL})[0]
    assert read({"prompt": [FIRST, GO], **answers([LAST])})[0] == [FIRST, GO, LAST]
    assert read({"prompt": "hi", "chosen": "hi there", "rejected": "hi, go away"})[1] == "hi there"  # one word
    assert read({"prompt": TALL, "chosen": f"{TALL} 2 m", "rejected": "No idea."})[1] == f"{TALL} 2 m"  # quoted


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": BAD},
        {"prompt": [USER, HELLO], "chosen": [HELLO], "rejected": [GO]},
        {"chosen": [USER, HELLO, HELLO], "rejected": [USER, HELLO, GO]},
        {"messages": [USER, HELLO], "chosen": HELLO, "rejected": GO},
    ],
)
@pytest.mark.parametrize("kind", ["pairs", "supervised", "prompts"])
def test_a_conversation_that_ends_with_the_assistant_before_the_answers_is_unusable(row, kind):
    assert reason_of(row, kind)[0] == "the conversation ends with the assistant before the answers"


# --- entries of dataset_info.json

ALPACA_COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
FULL = {"instruction": "hi", "input": "NOTE", "system": "NOTE", "history": [["NOTE", "NOTE"]], "tools": [TOOL]}
FULL |= {"chosen": "hello", "rejected": "go away"}


@pytest.mark.parametrize("more", [{}, {"query": ""}, {"system": None}])
def test_columns_that_an_entry_does_not_name_are_not_read(more):
    entry = {"ranking": True, "columns": ALPACA_COLUMNS | more}
    assert read(FULL, entry=entry) == ([USER], "hello", "go away")
    assert find_layout([FULL], entry, "pairs", "data").not_read == ("input", "history", "system", "tools")
    talk = {"conversations": [HUMAN], "system": "NOTE", "chosen": GPT, "rejected": BAD}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    assert read(talk, entry={"formatting": "sharegpt", "columns": columns})[0] == [USER]
    named = {"formatting": "sharegpt", "columns": columns | {"system": "system"}}
    assert read(talk, entry=named)[0] == [{"role": "system", "content": "NOTE"}, USER]
    with pytest.raises(UserError, match=r"no known format of pairs \(its entry's `columns` does not name rejected\)"):
        find_layout([FULL], {"columns": {"prompt": "instruction", "chosen": "chosen"}}, "pairs", "data")


def test_an_entry_without_columns_has_the_defaults_of_llamafactory():
    row = {"instruction": "hi", "input": "there", "system": "NOTE", "output": "hello"}
    assert read(row, "supervised", {"file_name": "a.json"})[0] == [{"role": "user", "content": "hi\nthere"}]
    assert read(row, "supervised")[0][0]["role"] == "system"  # a file without an entry


def test_openai_formatting_and_a_messages_column_beside_the_answers():
    row = {"messages": [SYSTEM, USER], "chosen": HELLO, "rejected": GO}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    for entry in (None, {"formatting": "openai"}, {"formatting": "openai", "columns": columns, "tags": tags}):
        assert read(row, entry=entry) == ([SYSTEM, USER], "hello", "go away")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (WORDS | {"chosen": 3}, ("wrong types", "chosen")),
        (WORDS | {"prompt": {"a": 1}}, ("wrong types", "prompt")),
        (MESSAGES | {"chosen": [{"role": "critic", "content": "b"}]}, ("unknown role", "'critic' in chosen")),
        (MESSAGES | {"rejected": [USER]}, ("last turn is not the assistant's", "rejected")),
        (MESSAGES | {"rejected": [{"role": "assistant", "content": 3}]}, ("wrong types", "rejected")),
        (WORDS | {"truth": "no"}, ("wrong types", "truth")),
        (WORDS | {"truth": {"topic": "a", "noise": [1]}}, ("wrong types", "'noise' in truth")),
        (WORDS | {"truth": {"price": Decimal("1.5")}}, ("wrong types", "'price' in truth")),
        (WORDS | {"truth": {"id": 2**64}}, ("truth that cannot be kept", "'id'")),
    ],
)
def test_reasons_name_the_column_and_the_role(row, reason):
    assert reason_of(row) == reason
