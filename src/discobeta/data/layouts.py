"""Which columns of a dataset hold what: said by its entry in dataset_info.json, or by their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from discobeta.data import votes
from discobeta.data.examples import Kind, Votes
from discobeta.errors import UserError, shorten, shown

KNOWN: dict[Kind, str] = {
    "pairs": "{prompt, chosen, rejected}, {chosen, rejected} as messages or \\n\\nHuman: … \\n\\nAssistant: … "
    "transcripts, {instruction, chosen, rejected}, {instruction, output: [chosen, rejected]}, "
    "{conversations, chosen, rejected}, "
    + ", ".join(f"{{{', '.join((form.prompt, *form.responses, *form.lists))}}}" for form in votes.KNOWN),
    "supervised": "{prompt, completion}, {messages}, {text}, {instruction, output}, {conversations}, "
    "and the chosen responses of preference rows",
    "prompts": "{prompt}, {messages}, {instruction}, {conversations}, and the prompts of preference rows",
}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"tool": "tool"}
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
SHAPING = ("instruction", "input", "history", "system", "tools", "chat_template_kwargs")
"""Columns of whose presence the report speaks where they are not read."""
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")
COLUMNS = ("prompt", "query", "response", "history", "system", "tools", "messages", "chosen", "rejected")
COLUMNS += ("images", "videos", "audios", "kto_tag", "annotators")


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
    judged: votes.Judgements | None = None
    """Two responses in columns of their own, and what people said of them, in the place of chosen and rejected."""
    annotators: str | None = None
    """A column that holds {chosen: …, rejected: …, tie: …}, numbers of people."""
    text: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    roles: tuple[tuple[str, str], ...] = tuple(ROLES.items())
    not_read: tuple[str, ...] = ()
    """Columns that would shape the prompt, or count votes, if the dataset's entry named them."""
    no_votes: str | None = None
    """A column that is called like one of votes, and holds none."""

    @property
    def in_turns(self) -> bool:
        """Whether a text prompt is what the user says, and not the text that the model continues."""
        return bool(self.instruction or self.conversation or self.history or self.system or self.tools or self.judged)

    def holds(self, kind: Kind) -> bool:
        preference = bool(self.chosen and self.rejected or self.ranked or self.judged)
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
    ranked_output = has_votes = has_people = False
    named = {role: name for role, name in (entry.get("columns") or {}).items() if name}
    output, people = named.get("response", "output"), named.get("annotators", "annotators")
    for row in rows:
        columns.update(dict.fromkeys(row))
        filled.update(name for name in SHAPING if name not in filled and is_given(row.get(name)))
        ranked_output = ranked_output or isinstance(row.get(output), list)
        has_people = has_people or is_given(row.get(people))
        has_votes = has_votes or (isinstance(row.get(people), dict) and bool(set(Votes._fields) & set(row[people])))
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

    fields: dict[str, Any] = {"chosen": column("chosen", "chosen"), "rejected": column("rejected", "rejected")}
    fields |= _tags(entry.get("tags") or {})
    fields["media"] = tuple(dict.fromkeys(name for name in (*map(named.get, MEDIA), *MEDIA) if name in columns))
    if has_votes or "annotators" in named:
        fields["annotators"] = column("annotators", "annotators")
    style = entry.get("formatting")
    free = not (named or style or (fields["chosen"] and fields["rejected"]))
    judged = next((form for form in votes.KNOWN if free and form.columns <= set(columns)), None)
    if judged:
        fields |= {"judged": judged, "prompt": judged.prompt}
    elif style in ("sharegpt", "openai") or "messages" in named or (style is None and "conversations" in columns):
        default = "messages" if style == "openai" and "conversations" not in columns else "conversations"
        fields["conversation"] = column("messages", default)
    elif "prompt" in named or "instruction" in columns:
        fields |= {"instruction": column("prompt", "instruction"), "query": column("query", "input")}
        fields["ranked" if ranked_output else "completion"] = column("response", "output")
    elif (fields["chosen"] and fields["rejected"]) or "prompt" in columns:
        fields |= {"prompt": column("prompt", "prompt"), "completion": column("response", "completion")}
        if not fields["prompt"]:
            fields["conversation"] = column("messages", "messages")
    elif "messages" in columns:
        fields["conversation"] = "messages"
    elif "text" in columns:
        fields["text"] = "text"
    if not fields.get("text"):
        # LLaMA-Factory's own defaults for an entry without `columns` name none of these.
        theirs = entry and not entry.get("columns") and (fields.get("instruction") or style)
        if not theirs:
            fields |= {name: shaping(name) for name in ("history", "system", "tools")}
        if not entry.get("columns") and "chat_template_kwargs" in columns:
            fields["variables"] = "chat_template_kwargs"
    read = set(filter(None, (fields.get(name) for name in ("instruction", "query", "history", "system", "tools",
                                                           "variables", "prompt", "text"))))  # fmt: skip
    unread = [name for name in SHAPING if name in filled - read]
    is_lost = has_people and kind == "pairs" and not (fields.get("annotators") or judged)
    if is_lost and entry.get("columns"):
        unread.append(people)
    fields["no_votes"] = people if is_lost and not entry.get("columns") else None
    layout = Layout(**fields, not_read=tuple(unread))
    if not layout.holds(kind):
        raise UserError(f"{there}, which is no known format of {kind}{_unnamed(entry, columns)}.\nKnown: {KNOWN[kind]}")
    return layout


def is_given(value: Any) -> bool:
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
