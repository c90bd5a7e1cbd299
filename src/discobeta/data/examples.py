"""What a row becomes that can be used, and the reasons why one cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text or None}, and what it has of `formats.FIELDS`."""
Prompt = str | list[Message]
Response = str | Message
"""A message where it holds more than its text: thoughts, calls of tools."""
Kind = Literal["pairs", "supervised", "prompts"]
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Reason(StrEnum):
    """Why a row cannot be used."""

    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not JSON"
    KEY_TWICE = "a key stands twice"
    WRONG_TYPES = "wrong types"
    UNREADABLE = "a value that cannot be read"
    TRUTH_TOO_LARGE = "truth that cannot be kept"
    NO_COUNT = "votes that are no counts"
    NO_VOTES = "no votes"
    NO_MAJORITY = "no majority of the annotators"
    MINORITY = "more annotators for rejected than for chosen"
    UNKNOWN_VERDICT = "unknown verdict"
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


class Votes(NamedTuple):
    """How many people found the chosen response better, how many the rejected one, how many neither."""

    chosen: int
    rejected: int
    tie: int = 0


@dataclass(frozen=True)
class Example:
    """A usable row. Preference rows have both responses, supervised rows `chosen` only, prompts neither."""

    prompt: Prompt
    chosen: Response | None = None
    rejected: Response | None = None
    truth: dict[str, float | str | int] = field(default_factory=dict)
    source: str = ""
    votes: Votes | None = None
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given beside messages and tools (chat_template_kwargs)."""

    def texts(self) -> list[str]:
        """Everything that somebody says in it."""
        turns = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [text for turn in (*turns, self.chosen, self.rejected) for text in texts_of(turn)]


def texts_of(turn: Response | None) -> list[str]:
    """A response's, or a message's, content and thoughts."""
    if turn is None or isinstance(turn, str):
        return [] if turn is None else [turn]
    return [turn[key] for key in ("content", *THOUGHTS) if isinstance(turn.get(key), str)]
