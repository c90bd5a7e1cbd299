"""One row of any known format -> prompt, chosen, rejected.

All formats come down to two questions: does the row state its prompt, and what are its answers? An
answer may be the bare response, or a conversation or transcript that repeats the prompt in front of
it; `_join` is the one place that takes these apart. Known:

    {prompt?, chosen, rejected}              TRL; texts, or lists of messages
    {chosen, rejected}                       hh-rlhf transcripts, "\\n\\nHuman: … \\n\\nAssistant: …"
    {instruction, input?, history?, system?, chosen, rejected}         alpaca; also output: [chosen, rejected]
    {conversations, system?, chosen, rejected}                         sharegpt
    {prompt, completion}, {messages}, {text}, alpaca's output, sharegpt's last turn      supervised
    {prompt}, and every row above but {text}                           prompts

A row that cannot be used raises `Unusable` with one of a fixed set of reasons, so that rows can be
counted by reason; it never becomes an Example that is only partly there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from discobeta.errors import UserError, shorten, shown

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}"""
Prompt = str | list[Message]
Kind = Literal["pairs", "supervised", "prompts"]

KINDS: dict[str, Kind] = {"sft": "supervised", "rm": "pairs", "dpo": "pairs", "ppo": "prompts"}
"""What each stage trains on."""

KNOWN: dict[Kind, str] = {
    "pairs": "{prompt, chosen, rejected}, {chosen, rejected} as messages or \\n\\nHuman: … \\n\\nAssistant: … "
    "transcripts, {instruction, chosen, rejected}, {instruction, output: [chosen, rejected]}, "
    "{conversations, chosen, rejected}",
    "supervised": "{prompt, completion}, {messages}, {text}, {instruction, output}, {conversations}, "
    "and the chosen responses of preference rows",
    "prompts": "{prompt}, {messages}, {instruction}, {conversations}, and the prompts of preference rows",
}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")
COLUMNS = ("prompt", "query", "response", "history", "system", "messages", "chosen", "rejected")

LONGEST_TRUTH = 1000
"""Characters of a text in `truth`, which is a name or a note."""


class Reason(StrEnum):
    """Why a row cannot be used."""

    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not JSON"
    KEY_TWICE = "a key stands twice"
    WRONG_TYPES = "wrong types"
    UNREADABLE = "a value that cannot be read"
    TRUTH_TOO_LARGE = "truth that cannot be kept"
    MISSING_COLUMN = "missing column"
    UNKNOWN_ROLE = "unknown role"
    NOT_ASSISTANT = "last turn is not the assistant's"
    PROMPTS_DIFFER = "prompts differ"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    SAME_RESPONSES = "chosen equals rejected"
    TEMPLATE_REFUSED = "refused by the chat template"
    PROMPT_TOO_LONG = "prompt fills cutoff_len"
    SAME_TOKENS = "chosen equals rejected after tokenisation and truncation"


class Unusable(Exception):
    """This row cannot be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """A usable row. Preference rows have both responses, supervised rows `chosen` only, prompts neither."""

    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    truth: dict[str, float | str | int] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Layout:
    """Which columns of a dataset hold what; None: it has no such column."""

    prompt: str | None = None
    instruction: str | None = None
    query: str | None = None
    history: str | None = None
    system: str | None = None
    conversation: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    ranked: str | None = None
    """A column that holds [chosen, rejected]."""
    text: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    roles: tuple[tuple[str, str], ...] = tuple(ROLES.items())

    def holds(self, kind: Kind) -> bool:
        preference = bool(self.chosen and self.rejected or self.ranked)
        if kind == "pairs":
            return preference
        supervised = preference or bool(self.completion or self.conversation)
        if kind == "supervised":
            return supervised or bool(self.text)
        return supervised or bool(self.prompt or self.instruction)


def find_layout(rows: Iterable[dict[str, Any]], entry: dict[str, Any], kind: Kind, where: str) -> Layout:
    """The layout that `entry` (of dataset_info.json) and the columns of `rows` imply.

    Raises UserError, with the columns that are there and the formats that are known, when no row of
    the whole dataset could be of the asked kind.
    """
    columns: dict[str, None] = {}
    ranked_output = False
    named = entry.get("columns") or {}
    output = named.get("response", "output")
    for row in rows:
        columns.update(dict.fromkeys(row))
        ranked_output = ranked_output or isinstance(row.get(output), list)
    there = f"{where} has the columns {shorten(', '.join(map(str, columns))) or '(none)'}"

    def column(role: str, default: str) -> str | None:
        name = named.get(role) or default
        if named.get(role) and name not in columns:
            raise UserError(f"{there}; its entry says that {role} is the column {shown(name)}")
        return name if name in columns else None

    found: dict[str, Any] = {"chosen": column("chosen", "chosen"), "rejected": column("rejected", "rejected")}
    found |= _tags(entry.get("tags") or {})
    style = entry.get("formatting")
    if style == "sharegpt" or (style is None and "conversations" in columns):
        found |= {"conversation": column("messages", "conversations"), "system": column("system", "system")}
    elif "prompt" in named or "instruction" in columns:
        found |= {"instruction": column("prompt", "instruction"), "query": column("query", "input")}
        found |= {"history": column("history", "history"), "system": column("system", "system")}
        found["ranked" if ranked_output else "completion"] = column("response", "output")
    elif (found["chosen"] and found["rejected"]) or "prompt" in columns:
        found |= {"prompt": column("prompt", "prompt"), "completion": column("response", "completion")}
    elif "messages" in columns:
        found["conversation"] = "messages"
    elif "text" in columns:
        found["text"] = "text"
    layout = Layout(**found)
    if not layout.holds(kind):
        raise UserError(f"{there}, which is no known format of {kind}.\nKnown: {KNOWN[kind]}")
    return layout


def _tags(tags: dict[str, str]) -> dict[str, Any]:
    """Keys and role names of messages; without tags both from/value and role/content are read."""
    if not tags:
        return {}
    spoken = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "role_key": tags.get("role_tag", "from"),
        "content_key": tags.get("content_tag", "value"),
        "roles": tuple((tags.get(f"{role}_tag", name), role) for role, name in spoken.items()),
    }


def read_example(row: Any, layout: Layout, kind: Kind, source: str = "") -> Example:
    """The row as an Example of the asked kind. Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable(Reason.WRONG_TYPES)
    if layout.text and kind == "supervised":
        prompt, responses = "", [_text(_value(row, layout.text))]
    else:
        prompt, responses = _prompt_and_responses(row, layout, kind)
        if not _has_words(prompt):
            raise Unusable(Reason.EMPTY_PROMPT)
    if not all(response.strip() for response in responses):
        raise Unusable(Reason.EMPTY_RESPONSE)
    if len({response.strip() for response in responses}) < len(responses):
        raise Unusable(Reason.SAME_RESPONSES)
    truth = _truth(row.get("truth"))
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    _check_encodable([*turns, *responses, *truth, *map(str, truth.values())])
    return Example(prompt, *responses, truth=truth, source=source)


def _prompt_and_responses(row: dict[str, Any], layout: Layout, kind: Kind) -> tuple[Prompt, list[str]]:
    """(prompt, responses): two responses for pairs, one for supervised, none for prompts."""
    stated = _stated_prompt(row, layout)
    if kind == "prompts" and stated is not None:
        answer = row.get(layout.chosen or layout.completion)
        in_turns = isinstance(stated, str) and isinstance(answer, list)
        return (_join(stated, answer, layout)[0] if in_turns else stated), []
    wanted = 2 if kind == "pairs" else 1
    if layout.ranked:
        answers = _value(row, layout.ranked)
        if not isinstance(answers, list) or len(answers) < 2:
            raise Unusable(Reason.WRONG_TYPES)
    elif layout.chosen and layout.rejected:
        answers = [_value(row, column) for column in (layout.chosen, layout.rejected)[:wanted]]
    else:
        answers = [_value(row, layout.completion or layout.conversation)]
    answers = answers[:wanted]
    if kind == "prompts" and layout.conversation:
        turns = _system(row, layout) + _messages(answers[0], layout)
        return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns, []
    prompts, responses = zip(*(_join(stated, answer, layout) for answer in answers), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise Unusable(Reason.PROMPTS_DIFFER)
    prompt = prompts[0]
    if layout.conversation and stated is None:
        prompt = _system(row, layout) + prompt
    return prompt, [] if kind == "prompts" else list(responses)


def _stated_prompt(row: dict[str, Any], layout: Layout) -> Prompt | None:
    """The prompt that the row gives apart from its answers; None: the answers carry it."""
    if layout.instruction:
        asked = [_text(_value(row, layout.instruction))]
        if layout.query and (query := row.get(layout.query)):
            asked.append(_text(query))
        turns = _system(row, layout)
        for question, answer in _history(row, layout):
            turns += [_turn("user", _text(question)), _turn("assistant", _text(answer))]
        return [*turns, _turn("user", "\n".join(filter(None, asked)))]
    if layout.conversation and layout.chosen and layout.rejected:
        return _system(row, layout) + _messages(_value(row, layout.conversation), layout)
    if layout.prompt:
        value = _value(row, layout.prompt)
        return value if isinstance(value, str) else _messages(value, layout)
    return None


def _join(stated: Prompt | None, answer: Any, layout: Layout) -> tuple[Prompt, str]:
    """(prompt, response) from the stated prompt, if any, and one answer that may repeat it."""
    if isinstance(answer, str):
        return _split_transcript(answer) if stated is None else (stated, answer)
    turns = _messages([answer] if isinstance(answer, dict) else answer, layout)
    if not turns or turns[-1]["role"] != "assistant":
        raise Unusable(Reason.NOT_ASSISTANT)
    before, response = turns[:-1], turns[-1]["content"]
    if isinstance(stated, str):
        repeated = any(turn["content"] == stated for turn in before)
        return (before if repeated else [_turn("user", stated), *before]), response
    if not stated or before[: len(stated)] == stated:
        return before, response
    return stated + before, response


def _split_transcript(text: str) -> tuple[list[Message], str]:
    """The turns of "\\n\\nHuman: … \\n\\nAssistant: …" before the last answer, and that answer."""
    preamble, *rest = re.split(r"\n\n(Human|Assistant):", text if text.startswith("\n\n") else f"\n\n{text}")
    speakers, contents = rest[::2], [content.strip() for content in rest[1::2]]
    if not speakers or speakers[-1] != "Assistant":
        raise Unusable(Reason.NOT_ASSISTANT)
    turns = [_turn("system", preamble.strip())] if preamble.strip() else []
    turns += [
        _turn("user" if speaker == "Human" else "assistant", content)
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    return turns[:-1], contents[-1]


def _messages(value: Any, layout: Layout) -> list[Message]:
    if not isinstance(value, list):
        raise Unusable(Reason.WRONG_TYPES)
    roles, turns = dict(layout.roles), []
    for message in value:
        if not isinstance(message, dict):
            raise Unusable(Reason.WRONG_TYPES)
        plain = message.get("role") is not None
        role = message.get(layout.role_key or ("role" if plain else "from"))
        content = _text(message.get(layout.content_key or ("content" if plain else "value")))
        if not isinstance(role, str):
            raise Unusable(Reason.WRONG_TYPES)
        if role not in roles:
            raise Unusable(Reason.UNKNOWN_ROLE)
        turns.append(_turn(roles[role], content))
    return turns


def _system(row: dict[str, Any], layout: Layout) -> list[Message]:
    content = row.get(layout.system) if layout.system else None
    return [_turn("system", _text(content))] if content else []


def _history(row: dict[str, Any], layout: Layout) -> list[list[Any]]:
    exchanges = (row.get(layout.history) if layout.history else None) or []
    if not isinstance(exchanges, list) or not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
        raise Unusable(Reason.WRONG_TYPES)
    return exchanges


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise Unusable(Reason.MISSING_COLUMN)
    return _readable(row[column])


def _readable(value: Any) -> Any:
    if isinstance(value, Unusable):  # a cell that could not be read
        raise value
    return value


def _text(value: Any) -> str:
    if not isinstance(_readable(value), str):
        raise Unusable(Reason.WRONG_TYPES)
    return value


def _has_words(prompt: Prompt) -> bool:
    """Whether anybody but the system says something."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(turn["content"].strip() for turn in prompt if turn["role"] != "system")


def _check_encodable(texts: list[str]) -> None:
    """JSON can spell half a surrogate pair ("\\ud83d"), which no tokenizer takes."""
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError:
        raise Unusable(Reason.NOT_UTF8) from None


def _truth(value: Any) -> dict[str, float | str | int]:
    """What is known about the row's true rewards; passed through, never read here. NaN is a gap, as null is."""
    if _readable(value) is None:
        return {}
    if not isinstance(value, dict):
        raise Unusable(Reason.WRONG_TYPES)
    known = {name: item for name, item in value.items() if item is not None and item == item}
    if not all(isinstance(item, float | str | int) for item in known.values()):
        raise Unusable(Reason.WRONG_TYPES)
    if not all(_can_be_kept(item) for item in known.values()):
        raise Unusable(Reason.TRUTH_TOO_LARGE)
    return known


def _can_be_kept(item: float | str | int) -> bool:
    """In a column of 64-bit numbers, or of texts that are all as long as the longest."""
    if isinstance(item, str):
        return len(item) <= LONGEST_TRUTH and "\0" not in item
    return math.isfinite(item) if isinstance(item, float) else -(2**63) <= item < 2**63
