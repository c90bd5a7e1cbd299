"""One row of any known format -> prompt, chosen, rejected.

All formats come down to two questions: does the row state its prompt, and what are its answers? An
answer may be the bare response, or a conversation or transcript that repeats the prompt in front of
it; `_join` is the one place that takes these apart. Known:

    {prompt?, chosen, rejected}              TRL; texts, or lists of messages
    {chosen, rejected}                       hh-rlhf transcripts, "\\n\\nHuman: … \\n\\nAssistant: …"
    {instruction, input?, history?, system?, chosen, rejected}         alpaca; also output: [chosen, rejected]
    {conversations | messages, system?, chosen, rejected}              sharegpt, openai
    {prompt, completion}, {messages}, {text}, alpaca's output, sharegpt's last turn      supervised
    {context, response1, response2, individual_preference}             HelpSteer3; MultiPref likewise (`votes`)
    {prompt}, and every row above but {text}                           prompts

Beside these, `system`, `history`, `tools` and `chat_template_kwargs` shape the prompt in every format but {text}.
What dataset_info.json's `columns` does not name is not read. Pairs may have `annotators`, numbers of people
(`votes.counted`).

A row that cannot be used raises `Unusable` with one of a fixed set of reasons, so that rows can be
counted by reason; it never becomes an Example that is only partly there.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from discobeta.data import votes
from discobeta.data.examples import THOUGHTS, Example, Kind, Message, Prompt, Reason, Response, Unusable, texts_of
from discobeta.data.layouts import MEDIA, Layout, is_given
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.errors import shown

KINDS: dict[str, Kind] = {BASE_STAGE: "supervised", **{name: row.rows for name, row in STAGES.items()}}
"""What each stage trains on."""
FIELDS = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
"""What a message may have beside role and content: chat templates read these."""
OWN_ARGUMENTS = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "sanitize_control_tokens", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "conversations",
)  # fmt: skip
"""What `chat_template_kwargs` cannot set, as it is no variable of a template."""

LONGEST_TRUTH = 1000
"""Characters of a text in `truth`, which is a name or a note."""


def read_example(row: Any, layout: Layout, kind: Kind, source: str = "") -> Example:
    """The row as an Example of the asked kind. Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable(Reason.WRONG_TYPES)
    for name in layout.media:
        if is_given(_readable(row.get(name))):
            raise Unusable(Reason.MEDIA, name)
    if layout.text and kind == "supervised":
        prompt, responses = "", [_text(_value(row, layout.text), layout.text)]
    else:
        prompt, responses = _prompt_and_responses(row, layout, kind)
        if not has_words(prompt):
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
        tools=_tools(row, layout), variables=_variables(row, layout), votes=_votes(row, layout, kind),
    )  # fmt: skip
    _check_encodable([*example.texts(), *truth, *map(str, truth.values()), _rest_of(example)])
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
    elif layout.judged:
        answers = [(column, _value(row, column)) for column in layout.judged.of(row)[:wanted]]
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
        has_role = message.get("role") is not None
        role = message.get(layout.role_key or ("role" if has_role else "from"))
        if not isinstance(role, str):
            raise Unusable(Reason.WRONG_TYPES, column)
        if role not in roles:
            raise Unusable(Reason.UNKNOWN_ROLE, f"{shown(role)} in {column}")
        for name in MEDIA:
            if is_given(message.get(name)):
                raise Unusable(Reason.MEDIA, f"{name} in {column}")
        more = {name: message[name] for name in FIELDS if is_given(_readable(message.get(name)))}
        content = message.get(layout.content_key or ("content" if has_role else "value"))
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
    if not is_given(value):
        return None
    # LLaMA-Factory's are the bare functions.
    return [
        {"type": "function", "function": tool} if "name" in tool and not tool.keys() & {"type", "function"} else tool
        for tool in _objects(value, layout.tools)
    ] or None


def _variables(row: dict[str, Any], layout: Layout) -> dict[str, Any]:
    value = _readable(row.get(layout.variables)) if layout.variables else None
    if not is_given(value):
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


def has_words(prompt: Prompt) -> bool:
    """Whether anybody but the system says something."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any((turn["content"] or "").strip() for turn in prompt if turn["role"] != "system")


def _rest_of(example: Example) -> str:
    """What else the chat template is given: tools, its variables, names and calls of messages."""
    turns = [turn for turn in (example.prompt, example.chosen, example.rejected) if not isinstance(turn, str)]
    return json.dumps([example.tools, example.variables, turns], ensure_ascii=False, default=str)


def _check_encodable(texts: list[str]) -> None:
    """JSON can spell half a surrogate pair ("\\ud83d"), which no tokenizer takes."""
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError:
        raise Unusable(Reason.NOT_UTF8) from None


def _votes(row: dict[str, Any], layout: Layout, kind: Kind) -> votes.Votes | None:
    if kind != "pairs":
        return None
    if layout.judged:
        return layout.judged.of(row).votes
    return votes.counted(_readable(row.get(layout.annotators)), layout.annotators) if layout.annotators else None


def _truth(value: Any) -> dict[str, float | str | int]:
    """What is known about the row's true rewards; passed through, never read here. NaN is a gap, as null is."""
    if _readable(value) is None:
        return {}
    if not isinstance(value, dict):
        raise Unusable(Reason.WRONG_TYPES, "truth")
    truth = {name: item for name, item in value.items() if item is not None and item == item}
    for name, item in truth.items():
        if not isinstance(item, float | str | int):
            raise Unusable(Reason.WRONG_TYPES, f"{shown(name)} in truth")
        if not _can_be_kept(item):
            raise Unusable(Reason.TRUTH_TOO_LARGE, shown(name))
    return truth


def _can_be_kept(item: float | str | int) -> bool:
    """In a column of 64-bit numbers, or of texts that are all as long as the longest."""
    if isinstance(item, str):
        return len(item) <= LONGEST_TRUTH and "\0" not in item
    return math.isfinite(item) if isinstance(item, float) else -(2**63) <= item < 2**63
