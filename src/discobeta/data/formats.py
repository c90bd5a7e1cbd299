"""One row of any known format -> prompt, chosen, rejected.

All formats come down to two questions: does the row state its prompt, and what are its answers? An
answer may be the bare response, or a conversation or transcript that repeats the prompt in front of
it; `_join` is the one place that takes these apart. Known:

    {prompt?, chosen, rejected}              TRL; texts, or lists of messages
    {chosen, rejected}                       hh-rlhf transcripts, "\\n\\nHuman: … \\n\\nAssistant: …"
    {instruction, input?, history?, system?, chosen, rejected}         alpaca; also output: [chosen, rejected]
    {conversations | messages, system?, chosen, rejected}              sharegpt, openai
    {prompt, completion}, {messages}, {text}, alpaca's output, sharegpt's last turn      supervised
    {prompt}, and every row above but {text}                           prompts

Beside these, `system`, `history`, `tools` and `chat_template_kwargs` shape the prompt in every format but {text}.
What dataset_info.json's `columns` does not name is not read.

A row that cannot be used raises `Unusable` with one of a fixed set of reasons, so that rows can be
counted by reason; it never becomes an Example that is only partly there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from discobeta.errors import UserError, shorten, shown

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text or None}, and of `FIELDS` those that are there."""
Prompt = str | list[Message]
Response = str | Message
"""A message where it holds more than its text: thoughts, calls of tools."""
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
ROLES |= {"tool": "tool"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
FIELDS = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
"""Of a message, beside role and content: chat templates read these."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
SHAPING = ("instruction", "input", "history", "system", "tools", "chat_template_kwargs")
"""Columns of whose presence the report speaks where they are not read."""
OWN_ARGUMENTS = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "sanitize_control_tokens", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "conversations",
)  # fmt: skip
"""What `chat_template_kwargs` cannot set, as it is no variable of a template."""
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")
COLUMNS = ("prompt", "query", "response", "history", "system", "tools", "messages", "chosen", "rejected")
COLUMNS += ("images", "videos", "audios", "kto_tag")

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
    ENDS_WITH_ASSISTANT = "the conversation ends with the assistant before the answers"
    PROMPTS_DIFFER = "prompts differ"
    PROMPT_TWICE = "prompt stated twice, differently"
    MEDIA = "images, videos or audios, which are not read"
    NEEDS_TEMPLATE = "what only a chat template can render"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    SAME_RESPONSES = "chosen equals rejected"
    TEMPLATE_REFUSED = "refused by the chat template"
    LEFT_OUT = "left out by the chat template"
    NO_BORDER = "not rendered as the prompt followed by the response"
    PROMPT_TOO_LONG = "prompt fills cutoff_len"
    SAME_TOKENS = "chosen equals rejected after tokenisation and truncation"


class Unusable(Exception):
    """This row cannot be used. detail: which column, role or field it is about, or what a template says."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Example:
    """A usable row. Preference rows have both responses, supervised rows `chosen` only, prompts neither."""

    prompt: Prompt
    chosen: Response | None = None
    rejected: Response | None = None
    truth: dict[str, float | str | int] = field(default_factory=dict)
    source: str = ""
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Of the chat template, beside messages and tools (chat_template_kwargs)."""

    def texts(self) -> list[str]:
        """Everything that somebody says in it."""
        turns = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [text for turn in (*turns, self.chosen, self.rejected) for text in texts_of(turn)]


def texts_of(turn: Response | None) -> list[str]:
    """A response's, or a message's, content and thoughts."""
    if turn is None or isinstance(turn, str):
        return [] if turn is None else [turn]
    return [turn[key] for key in ("content", *THOUGHTS) if isinstance(turn.get(key), str)]


@dataclass(frozen=True)
class Layout:
    """Which columns of a dataset hold what; None: it has no such column."""

    prompt: str | None = None
    instruction: str | None = None
    query: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None
    variables: str | None = None
    media: tuple[str, ...] = ()
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
    not_read: tuple[str, ...] = ()
    """Columns that would shape the prompt if the dataset's entry named them."""

    @property
    def in_turns(self) -> bool:
        """Whether a text prompt is what the user says, and not the text that the model continues."""
        return bool(self.instruction or self.conversation or self.history or self.system or self.tools)

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
    filled: set[str] = set()
    ranked_output = False
    named = {role: name for role, name in (entry.get("columns") or {}).items() if name}
    output = named.get("response", "output")
    for row in rows:
        columns.update(dict.fromkeys(row))
        filled.update(name for name in SHAPING if name not in filled and _is_given(row.get(name)))
        ranked_output = ranked_output or isinstance(row.get(output), list)
    there = f"{where} has the columns {shorten(', '.join(map(str, columns))) or '(none)'}"

    def column(role: str, default: str) -> str | None:
        if role in named and named[role] not in columns:
            raise UserError(f"{there}; its entry says that {role} is the column {shown(named[role])}")
        # An entry's `columns` are complete, as in LLaMA-Factory.
        name = named.get(role) if entry.get("columns") else default
        return name if name in columns else None

    def shaping(role: str) -> str | None:
        name = column(role, role)
        return name if name in filled or role in named else None

    found: dict[str, Any] = {"chosen": column("chosen", "chosen"), "rejected": column("rejected", "rejected")}
    found |= _tags(entry.get("tags") or {})
    found["media"] = tuple(dict.fromkeys(name for name in (*map(named.get, MEDIA), *MEDIA) if name in columns))
    style = entry.get("formatting")
    if style in ("sharegpt", "openai") or "messages" in named or (style is None and "conversations" in columns):
        default = "messages" if style == "openai" and "conversations" not in columns else "conversations"
        found["conversation"] = column("messages", default)
    elif "prompt" in named or "instruction" in columns:
        found |= {"instruction": column("prompt", "instruction"), "query": column("query", "input")}
        found["ranked" if ranked_output else "completion"] = column("response", "output")
    elif (found["chosen"] and found["rejected"]) or "prompt" in columns:
        found |= {"prompt": column("prompt", "prompt"), "completion": column("response", "completion")}
        if not found["prompt"]:
            found["conversation"] = column("messages", "messages")
    elif "messages" in columns:
        found["conversation"] = "messages"
    elif "text" in columns:
        found["text"] = "text"
    if not found.get("text"):
        # LLaMA-Factory's own defaults for an entry without `columns` name none of these.
        theirs = entry and not entry.get("columns") and (found.get("instruction") or style)
        if not theirs:
            found |= {name: shaping(name) for name in ("history", "system", "tools")}
        if not entry.get("columns") and "chat_template_kwargs" in columns:
            found["variables"] = "chat_template_kwargs"
    read = set(filter(None, (found.get(name) for name in ("instruction", "query", "history", "system", "tools",
                                                           "variables", "prompt", "text"))))  # fmt: skip
    layout = Layout(**found, not_read=tuple(name for name in SHAPING if name in filled - read))
    if not layout.holds(kind):
        raise UserError(f"{there}, which is no known format of {kind}{_unnamed(entry, columns)}.\nKnown: {KNOWN[kind]}")
    return layout


def _is_given(value: Any) -> bool:
    return value not in (None, "", [], {})


def _unnamed(entry: dict[str, Any], columns: Iterable[str]) -> str:
    named = entry.get("columns") or {}
    missing = [name for name in ("chosen", "rejected") if name in columns and name not in named.values()]
    return f" (its entry's `columns` does not name {' and '.join(missing)})" if named and missing else ""


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
    for name in layout.media:
        if _is_given(_readable(row.get(name))):
            raise Unusable(Reason.MEDIA, name)
    if layout.text and kind == "supervised":
        prompt, responses = "", [_text(_value(row, layout.text), layout.text)]
    else:
        prompt, responses = _prompt_and_responses(row, layout, kind)
        if not _has_words(prompt):
            raise Unusable(Reason.EMPTY_PROMPT)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise Unusable(Reason.ENDS_WITH_ASSISTANT)
    for response in responses:
        if not any(text.strip() for text in texts_of(response)) and not _calls(response):
            raise Unusable(Reason.EMPTY_RESPONSE)
    if len(responses) == 2 and _trimmed(responses[0]) == _trimmed(responses[1]):
        raise Unusable(Reason.SAME_RESPONSES)
    truth = _truth(row.get("truth"))
    example = Example(
        prompt, *responses, truth=truth, source=source,
        tools=_tools(row, layout), variables=_variables(row, layout),
    )  # fmt: skip
    _check_encodable([*example.texts(), *truth, *map(str, truth.values())])
    return example


def _trimmed(response: Response) -> Response:
    return response.strip() if isinstance(response, str) else response


def _calls(response: Response) -> bool:
    return isinstance(response, dict) and bool(response.get("tool_calls"))


def _prompt_and_responses(row: dict[str, Any], layout: Layout, kind: Kind) -> tuple[Prompt, list[Response]]:
    """(prompt, responses): two responses for pairs, one for supervised, none for prompts."""
    stated = _stated_prompt(row, layout)
    if kind == "prompts" and stated is not None:
        answer = row.get(layout.chosen or layout.completion)
        repeats = isinstance(answer, list) or (isinstance(answer, str) and _is_transcript(answer))
        prompt = _join(stated, answer, layout, layout.chosen or layout.completion)[0] if repeats else stated
        return _behind_the_rest(prompt, row, layout), []
    wanted = 2 if kind == "pairs" else 1
    if layout.ranked:
        answers = _value(row, layout.ranked)
        if not isinstance(answers, list) or len(answers) < 2:
            raise Unusable(Reason.WRONG_TYPES, layout.ranked)
        answers = [(layout.ranked, answer) for answer in answers]
    elif layout.chosen and layout.rejected:
        answers = [(column, _value(row, column)) for column in (layout.chosen, layout.rejected)[:wanted]]
    else:
        column = layout.completion or layout.conversation
        answers = [(column, _value(row, column))]
    answers = answers[:wanted]
    if kind == "prompts" and layout.conversation:
        turns = _messages(answers[0][1], layout, layout.conversation)
        prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        return _behind_the_rest(prompt, row, layout), []
    prompts, responses = zip(*(_join(stated, answer, layout, column) for column, answer in answers), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise Unusable(Reason.PROMPTS_DIFFER)
    prompt, responses = prompts[0], _without_prompt(prompts[0], list(responses), layout)
    return _behind_the_rest(prompt, row, layout), [] if kind == "prompts" else responses


def _stated_prompt(row: dict[str, Any], layout: Layout) -> Prompt | None:
    """The prompt that the row gives apart from its answers; None: the answers carry it."""
    if layout.instruction:
        value = _value(row, layout.instruction)
        asked = [value if isinstance(value, str) else _text(value, layout.instruction)]
        if layout.query and (query := row.get(layout.query)):
            asked.append(_text(query, layout.query))
        return "\n".join(filter(None, asked))
    if layout.conversation and layout.chosen and layout.rejected:
        return _messages(_value(row, layout.conversation), layout, layout.conversation)
    if layout.prompt:
        value = _value(row, layout.prompt)
        return value if isinstance(value, str) else _messages(value, layout, layout.prompt)
    return None


def _behind_the_rest(prompt: Prompt, row: dict[str, Any], layout: Layout) -> Prompt:
    """The prompt behind what the columns `system` and `history` put in front of it."""
    if not layout.in_turns:
        return prompt
    turns = [_turn("user", prompt)] if isinstance(prompt, str) else prompt
    system, history = _system(row, layout), []
    for question, answer in _history(row, layout):
        history += [_turn("user", _text(question, layout.history)), _turn("assistant", _text(answer, layout.history))]
    if turns and turns[0]["role"] == "system":
        if system and system[0] != turns[0]:
            raise Unusable(Reason.PROMPT_TWICE, "system")
        system, turns = turns[:1], turns[1:]
    if turns[: len(history)] == history:
        history = []
    return [*system, *history, *turns]


def _join(stated: Prompt | None, answer: Any, layout: Layout, column: str) -> tuple[Prompt, Response]:
    """(prompt, response) from the stated prompt, if any, and one answer that may repeat it.

    An exact repeat is taken once. Raises Unusable for an answer that states the prompt in other words.
    """
    if isinstance(answer, str):
        if stated is None:
            return _split_transcript(answer, column)
        if not _is_transcript(answer) or (isinstance(stated, str) and answer.startswith(stated)):
            return stated, answer
        before, response = _split_transcript(answer, column)
    else:
        turns = _messages([answer] if isinstance(answer, dict) else answer, layout, column)
        if not turns or turns[-1]["role"] != "assistant":
            raise Unusable(Reason.NOT_ASSISTANT, column)
        before, last = turns[:-1], turns[-1]
        response = last["content"] if last.keys() == {"role", "content"} else last
    if stated is None:
        return before, response
    users = [turn["content"] for turn in before if turn["role"] == "user"]
    if isinstance(stated, str):
        if not before or before[0]["role"] == "assistant":
            return [_turn("user", stated), *before], response
        if not users:
            return [*before, _turn("user", stated)], response
        if stated in (users[0], users[-1]) or stated.strip() == transcript(before).strip():
            return before, response
        raise Unusable(Reason.PROMPT_TWICE)
    if not stated or stated in (before[: len(stated)], before[len(before) - len(stated) :]):
        return before, response
    goes_on = before[:1] and (before[0]["role"] == "assistant") != (stated[-1]["role"] == "assistant")
    if not before or (goes_on and before[0] not in stated):
        return stated + before, response
    raise Unusable(Reason.PROMPT_TWICE)


def _without_prompt(prompt: Prompt, responses: list[Response], layout: Layout) -> list[Response]:
    """Text responses that all begin with the very prompt, without it.

    A prompt of one word is no evidence: "Hi" may well be answered "Hi there".
    """
    asked = prompt if isinstance(prompt, str) else next((t["content"] for t in reversed(prompt)), "")
    if not asked or len(asked.split()) < 2:
        return responses
    if not all(isinstance(response, str) and response.startswith(asked) for response in responses):
        return responses
    cut = [response[len(asked) :] for response in responses]
    return [text.lstrip() for text in cut] if layout.in_turns or not isinstance(prompt, str) else cut


def transcript(messages: list[Message]) -> str:
    """hh-rlhf's form of a conversation that the assistant is about to continue."""
    speakers = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
    turns = [f"\n\n{speakers[message['role']]}: {message.get('content') or ''}" for message in messages]
    return "".join([*turns, "\n\nAssistant:"])


def _is_transcript(text: str) -> bool:
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def _split_transcript(text: str, column: str) -> tuple[list[Message], str]:
    """The turns of "\\n\\nHuman: … \\n\\nAssistant: …" before the last answer, and that answer."""
    preamble, *rest = re.split(r"\n\n(Human|Assistant):", text if text.startswith("\n\n") else f"\n\n{text}")
    speakers, contents = rest[::2], [content.strip() for content in rest[1::2]]
    if not speakers or speakers[-1] != "Assistant":
        raise Unusable(Reason.NOT_ASSISTANT, column)
    turns = [_turn("system", preamble.strip())] if preamble.strip() else []
    turns += [
        _turn("user" if speaker == "Human" else "assistant", content)
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    return turns[:-1], contents[-1]


def _messages(value: Any, layout: Layout, column: str) -> list[Message]:
    if not isinstance(_readable(value), list):
        raise Unusable(Reason.WRONG_TYPES, column)
    roles, turns = dict(layout.roles), []
    for message in value:
        if not isinstance(message, dict):
            raise Unusable(Reason.WRONG_TYPES, column)
        plain = message.get("role") is not None
        role = message.get(layout.role_key or ("role" if plain else "from"))
        if not isinstance(role, str):
            raise Unusable(Reason.WRONG_TYPES, column)
        if role not in roles:
            raise Unusable(Reason.UNKNOWN_ROLE, f"{shown(role)} in {column}")
        for name in MEDIA:
            if _is_given(message.get(name)):
                raise Unusable(Reason.MEDIA, f"{name} in {column}")
        more = {name: message[name] for name in FIELDS if _is_given(_readable(message.get(name)))}
        content = message.get(layout.content_key or ("content" if plain else "value"))
        if not (content is None and roles[role] == "assistant" and more.keys() - {"name"}):
            content = _content(content, column)
        if "tool_calls" in more:
            more["tool_calls"] = _objects(more["tool_calls"], f"tool_calls in {column}")
        turns.append(_turn(roles[role], content) | more)
    return turns


def _content(value: Any, column: str) -> str:
    """A message's text, which may come in parts: [{"type": "text", "text": ...}]."""
    if not isinstance(_readable(value), list) or not all(isinstance(part, dict) for part in value):
        return _text(value, column)
    for part in value:
        if part.get("type", "text") != "text":
            raise Unusable(Reason.MEDIA, f"{shown(part['type'])} in {column}")
    return "".join(_text(part.get("text"), column) for part in value)


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of JSON objects, which may be JSON in a text; without the nulls that Arrow fills gaps with."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(Reason.WRONG_TYPES, where) from None
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(Reason.WRONG_TYPES, where)
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else _readable(value)


def _tools(row: dict[str, Any], layout: Layout) -> list[dict[str, Any]] | None:
    value = _readable(row.get(layout.tools)) if layout.tools else None
    if not _is_given(value):
        return None
    # LLaMA-Factory's are the bare functions.
    return [
        {"type": "function", "function": tool} if "name" in tool and not tool.keys() & {"type", "function"} else tool
        for tool in _objects(value, layout.tools)
    ] or None


def _variables(row: dict[str, Any], layout: Layout) -> dict[str, Any]:
    value = _readable(row.get(layout.variables)) if layout.variables else None
    if not _is_given(value):
        return {}
    variables = _objects(value, layout.variables)
    if len(variables) != 1:
        raise Unusable(Reason.WRONG_TYPES, layout.variables)
    for name in variables[0]:
        if name in OWN_ARGUMENTS:
            raise Unusable(Reason.WRONG_TYPES, f"{layout.variables}: {name}")
    return variables[0]


def _system(row: dict[str, Any], layout: Layout) -> list[Message]:
    content = row.get(layout.system) if layout.system else None
    return [_turn("system", _text(content, layout.system))] if content else []


def _history(row: dict[str, Any], layout: Layout) -> list[list[Any]]:
    exchanges = (_readable(row.get(layout.history)) if layout.history else None) or []
    if not isinstance(exchanges, list) or not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
        raise Unusable(Reason.WRONG_TYPES, layout.history)
    return exchanges


def _turn(role: str, content: str | None) -> Message:
    return {"role": role, "content": content}


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise Unusable(Reason.MISSING_COLUMN, column)
    return _readable(row[column])


def _readable(value: Any) -> Any:
    if isinstance(value, Unusable):  # a cell that could not be read
        raise value
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(_readable(value), str):
        raise Unusable(Reason.WRONG_TYPES, column)
    return value


def _has_words(prompt: Prompt) -> bool:
    """Whether anybody but the system says something."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any((turn["content"] or "").strip() for turn in prompt if turn["role"] != "system")


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
        raise Unusable(Reason.WRONG_TYPES, "truth")
    known = {name: item for name, item in value.items() if item is not None and item == item}
    for name, item in known.items():
        if not isinstance(item, float | str | int):
            raise Unusable(Reason.WRONG_TYPES, f"{shown(name)} in truth")
        if not _can_be_kept(item):
            raise Unusable(Reason.TRUTH_TOO_LARGE, shown(name))
    return known


def _can_be_kept(item: float | str | int) -> bool:
    """In a column of 64-bit numbers, or of texts that are all as long as the longest."""
    if isinstance(item, str):
        return len(item) <= LONGEST_TRUTH and "\0" not in item
    return math.isfinite(item) if isinstance(item, float) else -(2**63) <= item < 2**63
