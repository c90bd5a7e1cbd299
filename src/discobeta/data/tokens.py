"""From examples to token ids: once per (data, tokenizer, cutoff), shared by all arms.

A row is prompt ids and response ids. Prompt and response are tokenised as one text, which is cut where the prompt's
own ids end, so that a response's ids are those that it has behind its prompt. The prompt is never cut; a response is
cut at the right to what cutoff_len leaves. Rows live in flat arrays, so a hundred thousand of them load in well
under a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from discobeta import files, seeds
from discobeta.data.formats import (
    KINDS,
    THOUGHTS,
    Example,
    Kind,
    Message,
    Prompt,
    Reason,
    Response,
    Unusable,
    texts_of,
    transcript,
)
from discobeta.data.sources import RowReport, read_examples, resolve
from discobeta.design.config import RunConfig
from discobeta.errors import UserError, first_line, telling
from discobeta.files import check_regular

LAYOUT = 3
"""Of the folder. Raised when tokenisation or the files change, so that old folders are refused."""
AGAIN = "delete the folder and it is made again"
LONGEST_RENDERING = 5.0
"""Seconds of computing that a chat template may take for one row: templates can loop. A usual one takes 1 ms."""
MOST_ADDED = 1_000_000
"""Characters that a chat template may make of an empty row."""
TODAY = datetime(2024, 7, 26)
"""The day on which chat templates are rendered that print the date: the one that Llama 3's fall back to. With the
day of the run a row would have other tokens tomorrow."""
CHUNK = 1000
QUIET_BELOW = 5000
"""Rows; fewer take a moment and get no progress bar."""


class Ragged(Sequence):
    """N integer sequences as one flat array; item i is the view values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        if isinstance(sequences, Ragged):
            return sequences
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        return cls(np.concatenate([np.empty(0, np.int32), *arrays]), _offsets([len(array) for array in arrays]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # negative indices, and IndexError beyond the end
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: np.ndarray) -> Ragged:
        lengths, starts = self.lengths[indices], self.offsets[:-1][indices]
        offsets = _offsets(lengths)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[places], offsets)

    def update(self, digest: Any) -> None:
        """Feed lengths and values to a hash, as little-endian bytes."""
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.values.astype("<i4").tobytes())


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass
class Rows:
    """Tokenised rows; sequences of (L_i,) int32 arrays, kept as `Ragged`.

    chosen_ids and rejected_ids are None as a whole when the kind has none. `source` says where a
    row stood ("file:line", "hub:index"); `truth` holds columns of what is known about it, with NaN or
    "" where a row says nothing.
    """

    prompt_ids: Ragged
    chosen_ids: Ragged | None = None
    rejected_ids: Ragged | None = None
    source: list[str] = field(default_factory=list)
    truth: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_ids = Ragged.of(self.prompt_ids)
        self.chosen_ids = None if self.chosen_ids is None else Ragged.of(self.chosen_ids)
        self.rejected_ids = None if self.rejected_ids is None else Ragged.of(self.rejected_ids)
        self.source = list(self.source) or [""] * len(self)
        for part in (*self.parts().values(), self.source, *self.truth.values()):
            if len(part) != len(self):
                raise ValueError(f"columns of {len(self)} and {len(part)} rows")

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def parts(self) -> dict[str, Ragged]:
        """The token columns that are there."""
        columns = {"prompt_ids": self.prompt_ids, "chosen_ids": self.chosen_ids, "rejected_ids": self.rejected_ids}
        return {name: column for name, column in columns.items() if column is not None}

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        indices = np.asarray(indices, dtype=np.int64)
        return Rows(
            **{name: column.select(indices) for name, column in self.parts().items()},
            source=[self.source[index] for index in indices],
            truth={name: column[indices] for name, column in self.truth.items()},
        )

    def fingerprints(self) -> np.ndarray:
        """(N,) int64, a hash of each row's token ids: equal rows, and only they, are equal."""
        return _fingerprints(list(self.parts().values()))

    def key(self) -> str:
        """sha256 over the token ids of all rows in order."""
        digest = hashlib.sha256()
        for name, column in self.parts().items():
            digest.update(name.encode())
            column.update(digest)
        return digest.hexdigest()


def _fingerprints(columns: list[Ragged]) -> np.ndarray:
    # Each part is preceded by its length, so that moving a token across a boundary changes the hash.
    flat = [(column.values.astype("<i4"), column.offsets.tolist()) for column in columns]
    hashes = np.empty(len(columns[0]), np.int64)
    for row in range(len(hashes)):
        digest = hashlib.blake2b(digest_size=8)
        for values, offsets in flat:
            start, end = offsets[row], offsets[row + 1]
            digest.update((end - start).to_bytes(8, "little"))
            digest.update(values[start:end])
        hashes[row] = int.from_bytes(digest.digest(), "little", signed=True)
    return hashes


@dataclass
class TokenisedData:
    """Training rows, held-out rows if any, and the JSON-able account of where they came from."""

    train: Rows
    held_out: Rows | None
    report: dict[str, Any]

    def parts(self) -> dict[str, Rows]:
        """The rows that are there, as train and eval."""
        return {"train": self.train} | ({} if self.held_out is None else {"eval": self.held_out})

    def keys(self) -> dict[str, str]:
        """What a run's provenance says of its rows."""
        return {{"train": "data", "eval": "held_out"}[part]: rows.key() for part, rows in self.parts().items()}

    def lines(self) -> list[str]:
        """What the run's log says about the data."""
        reports = [RowReport.of(self.report[part]) for part in ("train", "eval") if part in self.report]
        lines = [line for report in reports for line in report.lines()]
        if self.held_out is not None:
            lines.append(f"{len(self.train)} training rows, {len(self.held_out)} held-out rows")
        if shared := self.report.get("shared_prompts"):
            lines.append(f"{shared} held-out prompts also occur in the training rows")
        return lines

    def to_answer(self, count: int) -> tuple[Rows, np.ndarray]:
        """The rows that a policy is measured on, held-out ones if there are any, and which of them it answers: of
        each prompt the first, `count` at the most."""
        rows = self.train if self.held_out is None else self.held_out
        first: dict[bytes, int] = {}
        for row, ids in enumerate(rows.prompt_ids):
            if len(first) == count:
                break
            first.setdefault(ids.tobytes(), row)
        return rows, np.array(list(first.values()))


def tokenise(config: RunConfig, tokenizer: Any, kind: Kind | None = None) -> TokenisedData:
    """The run's data as token ids, without touching the disk; kind: default what the stage trains on.

    report: "train" and "eval" (row reports as dicts), "shared_prompts" (distinct held-out prompts
    that also occur in the training rows).
    Raises UserError for data that cannot be read or that has too many unusable rows.
    """
    kind = kind or KINDS[config.stage]
    if not config.dataset:
        raise UserError("dataset is missing: comma-separated names, local files or hub ids")
    train, account = _read_rows(config.dataset, config, tokenizer, split=config.split, kind=kind)
    report: dict[str, Any] = {"train": account.as_dict()}
    held_out = None
    if config.eval_dataset:
        held_out, account = _read_rows(config.eval_dataset, config, tokenizer, split=config.eval_split, kind=kind)
        report["eval"] = account.as_dict()
    elif config.val_size:
        train, held_out = hold_out(train, config.val_size, config.seed)
    if held_out is not None:
        both = [np.unique(_fingerprints([rows.prompt_ids])) for rows in (train, held_out)]
        report["shared_prompts"] = len(np.intersect1d(*both))
    return TokenisedData(train, held_out, report)


def hold_out(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """(train, held-out): a share below 1, or a number of rows, drawn by (seed, "val_size").

    All rows of one prompt fall on the same side, so a held-out prompt is never trained on: prompts
    are drawn in random order, each with all its rows if they fit into the asked number (and at least
    one prompt in any case). Both sides keep the order of the data.
    """
    import torch

    asked = round(val_size * len(rows)) if val_size < 1 else int(val_size)
    _, group = np.unique(_fingerprints([rows.prompt_ids]), return_inverse=True)
    order = torch.randperm(group.max() + 1, generator=seeds.generator(seed, "val_size")).tolist()
    if asked >= len(rows) or len(order) < 2:
        raise UserError(
            f"val_size: {val_size:g} leaves nothing to train on: {len(rows)} usable rows, {len(order)} prompts"
        )
    sizes, taken, room = np.bincount(group).tolist(), [], asked
    for prompt in order:
        if sizes[prompt] <= room:
            taken.append(prompt)
            room -= sizes[prompt]
    mask = np.isin(group, taken or order[:1])
    return rows.select(np.flatnonzero(~mask)), rows.select(np.flatnonzero(mask))


def _read_rows(names: str, config: RunConfig, tokenizer: Any, *, split: str, kind: Kind) -> tuple[Rows, RowReport]:
    examples, report = read_examples(names, config, split=split, kind=kind)
    rows = encode(examples, tokenizer, config.cutoff_len, kind, report)
    report.check(config.max_unusable_rows)
    return rows, report


def encode(examples: list[Example], tokenizer: Any, cutoff_len: int, kind: Kind, report: RowReport) -> Rows:
    """Examples as rows of token ids of at most cutoff_len (prompt + response).

    Rows that come to nothing (a prompt that leaves no response token, responses that are equal once
    cut) and responses that were cut, and so have no end-of-sequence token, are counted in `report`.
    Raises UserError for a tokenizer or a chat template that fails on every row, or does not end on one.
    """
    from tqdm import tqdm

    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token (eos_token)")
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes one of a model's config.json alone
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no vocabulary: "
            "its files (tokenizer.json, tokenizer.model, …) are missing or empty"
        )
    leading = _leading_tokens(tokenizer, next((text for e in examples for text in (e.chosen, e.prompt) if text), "a"))
    quiet = True if len(examples) < QUIET_BELOW else None  # None: quiet unless on a terminal
    columns: list[list[np.ndarray]] = [[] for _ in range({"pairs": 3, "supervised": 2, "prompts": 1}[kind])]
    kept, refusal, refused, forged = [], None, 0, _forged_tokens(tokenizer)
    with tqdm(total=len(examples), desc="tokenising", unit="rows", disable=quiet) as progress:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            for example, outcome in zip(chunk, _encode_chunk(chunk, tokenizer, leading, cutoff_len), strict=True):
                if isinstance(outcome, Unusable):
                    if outcome.reason in (Reason.TEMPLATE_REFUSED, Reason.NO_BORDER):
                        refusal, refused = refusal or outcome, refused + 1
                    report.count_unusable(outcome, example.source)
                    continue
                ids, cut = outcome
                if spelt := forged(example):
                    report.count_forged(spelt, example.source)
                report.truncated_responses += cut
                kept.append(example)
                for column, sequence in zip(columns, ids, strict=True):
                    column.append(np.array(sequence, np.int32))
            progress.update(len(chunk))
    if refusal and refused == len(examples):
        fault = "renders none of the {} conversations"
        if refusal.reason is Reason.NO_BORDER:
            fault = "renders none of the {} conversations as the prompt followed by the response"
        raise UserError(
            f"{report.dataset}: the chat template of {tokenizer.name_or_path!r} {fault.format(len(examples))}: "
            f"{refusal.detail}"
        )
    return Rows(
        *map(Ragged.of, columns),
        source=[example.source for example in kept],
        truth=_truth_columns([example.truth for example in kept], report.dataset),
    )


Encoded = tuple[list[list[int]], int]
"""([prompt ids, response ids …], how many of the responses were cut)."""


def _encode_chunk(
    chunk: list[Example], tokenizer: Any, leading: list[int], cutoff_len: int
) -> Iterator[Encoded | Unusable]:
    """For each example its token ids, or why it has none. One call of the tokenizer for all."""
    with _ending(f"the chat template of {tokenizer.name_or_path!r}") as watched:
        rendered = [_render_or_refuse(example, tokenizer) for example in watched(chunk)]
    usable = [item for item in rendered if isinstance(item, Rendered)]
    ids = iter(_ids_of(usable, tokenizer) if usable else [])
    for example, item in zip(chunk, rendered, strict=True):
        if isinstance(item, Unusable):
            yield item
            continue
        prompt, *responses = next(ids)
        if not prompt and example.prompt:
            yield Unusable(Reason.EMPTY_PROMPT)
            continue
        if not all(responses):
            yield Unusable(Reason.EMPTY_RESPONSE)
            continue
        if item.plain and prompt[: len(leading)] != leading:
            prompt = leading + prompt
        if not item.closed:
            end = tokenizer.eos_token_id
            responses = [response if response[-1] == end else [*response, end] for response in responses]
        room = cutoff_len - len(prompt)
        cut = [response[:room] for response in responses]
        if room < 1:
            yield Unusable(Reason.PROMPT_TOO_LONG)
        elif len(cut) == 2 and cut[0] == cut[1]:
            yield Unusable(Reason.SAME_TOKENS)
        else:
            yield [prompt, *cut], sum(len(response) > room for response in responses)


@dataclass(frozen=True)
class Rendered:
    """An example as the texts that are tokenised.

    plain:  no chat template wrote the special tokens, so the tokenizer's leading ones (BOS) are due.
    closed: the chat template ends the assistant's turn, so no end-of-sequence token is appended.
    """

    prompt: str
    responses: list[str]
    plain: bool = True
    closed: bool = False


def render(example: Example, tokenizer: Any) -> Rendered:
    """The prompt's text, ending where the response begins, and the responses' texts.

    A text prompt stays as it is. A conversation goes through the tokenizer's chat template, or, if
    it has none, becomes an hh-rlhf transcript. Raises Unusable when the template refuses the row, leaves out
    something that is said in it, or cannot be split into prompt and response.
    """
    responses = [response for response in (example.chosen, example.rejected) if response is not None]
    if not tokenizer.chat_template or isinstance(example.prompt, str):
        _check_plain(example, responses)
        texts = [response["content"] if isinstance(response, dict) else response for response in responses]
        if isinstance(example.prompt, str):
            return Rendered(example.prompt, texts)
        return Rendered(transcript(example.prompt), [f" {text}" for text in texts])
    # Preference data holds no thoughts, so a template that can think is told not to, and the empty
    # thought is part of the prompt. Responses that do hold thoughts take the other form.
    messages = [
        response if isinstance(response, dict) else {"role": "assistant", "content": response} for response in responses
    ]
    for thinking in (False, True):
        prompt = _apply_template(tokenizer, example, [], thinking)
        wholes = [_apply_template(tokenizer, example, [message], thinking) for message in messages]
        if all(whole.startswith(prompt) for whole in wholes):
            break
    else:
        message, whole = next(pair for pair in zip(messages, wholes, strict=True) if not pair[1].startswith(prompt))
        if not all(_is_in(text, whole) for text in texts_of(message)):
            raise Unusable(Reason.LEFT_OUT, "the response, or its thoughts")
        raise Unusable(
            Reason.NO_BORDER,
            f"the prompt ends {prompt[-30:]!r}, the conversation goes on {_where_they_part(prompt, whole)!r}",
        )
    suffixes = [whole[len(prompt) :].rstrip() for whole in wholes]
    _check_whole(example, messages, prompt, suffixes)
    said = map(_spoken, messages)
    closed = all(not (text and suffix.endswith(text)) for suffix, text in zip(suffixes, said, strict=True))
    closed = closed and closing_id(tokenizer) is not None
    return Rendered(prompt, suffixes, plain=False, closed=closed)


def _spoken(message: Message) -> str:
    return (message.get("content") or "").strip()


def _is_in(text: str, rendered: str) -> bool:
    """Whether a text was rendered, whatever the template does to white space (it trims thoughts, sets them apart)."""
    return text.strip() in rendered or "".join(text.split()) in "".join(rendered.split())


def _check_plain(example: Example, responses: list[Response]) -> None:
    """Raise Unusable for what has no form in a text or a transcript."""
    turns = [] if isinstance(example.prompt, str) else example.prompt
    for name, is_there in (
        ("tools", bool(example.tools)),
        ("chat_template_kwargs", bool(example.variables)),
        *((f"{key} of a message", True) for turn in turns for key in turn.keys() & {"tool_calls", *THOUGHTS}),
        *(
            (f"{key} of a response", True)
            for r in responses
            if isinstance(r, dict)
            for key in r.keys() & {"tool_calls", *THOUGHTS}
        ),
        ("a turn of a tool", any(turn["role"] == "tool" for turn in turns)),
    ):
        if is_there:
            raise Unusable(Reason.NEEDS_TEMPLATE, name)


def _check_whole(example: Example, messages: list[Message], prompt: str, suffixes: list[str]) -> None:
    """Raise Unusable if the template left out what somebody says.

    Thoughts of past turns may go, as they go when the model is asked, and what a tool says may be written anew.
    """
    begun = "<think>" if prompt.rstrip().endswith("<think>") else ""  # as part of the prompt
    for message, suffix in zip(messages, suffixes, strict=True):
        if not all(_is_in(text.lstrip().removeprefix(begun), suffix) for text in texts_of(message)):
            raise Unusable(Reason.LEFT_OUT, "the response, or its thoughts")
        _check_calls(message, suffix)
    for turn in example.prompt:
        if turn["role"] in ("system", "user") and not _is_in(turn["content"], prompt):
            raise Unusable(Reason.LEFT_OUT, turn["role"])
        _check_calls(turn, prompt)
    for tool in example.tools or ():
        name = tool.get("function", tool)
        if isinstance(name := name.get("name") if isinstance(name, dict) else None, str) and name not in prompt:
            raise Unusable(Reason.LEFT_OUT, "tools")


def _check_calls(message: Message, rendered: str) -> None:
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(Reason.WRONG_TYPES, "tool_calls")
        if function["name"] not in rendered:
            raise Unusable(Reason.LEFT_OUT, "tool_calls")


def _where_they_part(prompt: str, whole: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return whole[place : place + 30]


def _render_or_refuse(example: Example, tokenizer: Any) -> Rendered | Unusable:
    try:
        return render(example, tokenizer)
    except Unusable as unusable:
        return unusable


def _apply_template(tokenizer: Any, example: Example, answer: list[Message], thinking: bool) -> str:
    """The prompt, as it stands before an answer is generated, or, with an answer, the whole conversation."""
    messages = [*example.prompt, *answer]
    try:
        _freeze_clock(tokenizer, bool(example.tools))
        text = tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            tokenize=False,
            add_generation_prompt=not answer,
            **{"enable_thinking": thinking, "date_string": TODAY.strftime("%d %b %Y")} | example.variables,
        )
        if not isinstance(text, str):
            raise TypeError(f"it gives a {type(text).__name__} and no text")
        if len(text) > MOST_ADDED + 100 * sum(len(text) for message in messages for text in texts_of(message)):
            raise ValueError(f"it makes {len(text):,} characters of a row")
    except Exception as error:  # a template is a program that came with the tokenizer
        raise Unusable(Reason.TEMPLATE_REFUSED, first_line(error)) from error
    return text


def _freeze_clock(tokenizer: Any, tools: bool) -> None:
    """strftime_now(format), which templates may call, says `TODAY`: a global of the compiled template."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return
    from transformers.utils import chat_template_utils

    template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    chat_template_utils._compile_jinja_template(template).globals["strftime_now"] = TODAY.strftime


class _DoesNotEnd(BaseException):
    """Not an Exception, so that nothing in a template's own machinery catches it."""


@contextmanager
def _ending(what: str) -> Iterator[Any]:
    """A pass over examples none of which may take `LONGEST_RENDERING` seconds twice over, or UserError.

    Of computing, not of time: a suspended process has not looped. One timer for all looks whether they move on, which
    costs a row nothing. Signals reach the main thread only, so there is no limit in another one.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield iter
        return
    current, seen = None, None

    def watched(examples: list[Example]) -> Iterator[Example]:
        nonlocal current
        for current in enumerate(examples):  # noqa: B007
            yield current[1]

    def look(number: int, frame: Any) -> None:
        nonlocal seen
        if current is not None and current is seen:
            raise _DoesNotEnd
        seen = current

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_RENDERING, LONGEST_RENDERING)
    try:
        yield watched
    except _DoesNotEnd:
        place = current[1].source or "a row"
        raise UserError(f"{what} has not rendered {place} after {LONGEST_RENDERING:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def closing_id(tokenizer: Any) -> int | None:
    """The token that closes an assistant's turn in the chat template, such as <|im_end|>; None: nothing does.

    Of several the first that is a special one, as generation ends there. Several ordinary ones are no sign to stop at.
    """
    return _closing_id(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None


@lru_cache(maxsize=8)
def _closing_id(tokenizer: Any, template: str) -> int | None:
    content = "qzx"
    example = Example([{"role": "user", "content": "a"}])
    try:
        text = _apply_template(tokenizer, example, [{"role": "assistant", "content": content}], False)
    except Unusable:
        return None
    _, said, closing = text.rstrip().rpartition(content)
    ids = _bare_ids(tokenizer, [closing])[0] if said and closing.strip() else []
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in ids if token in special), ids[0] if len(ids) == 1 else None)


def _ids_of(items: list[Rendered], tokenizer: Any) -> Iterator[list[list[int]]]:
    """[prompt ids, response ids …] of each item: prompt and response tokenised as one text, cut at the prompt.

    Where they would merge across the border, the prompt keeps the ids that it has alone, which are those that an
    answer is generated behind, and the response is tokenised apart.
    """
    if tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel":
        # Two words that meet would be one that it does not know: there is nothing to be had from one text.
        ids = iter(_bare_ids(tokenizer, [text for item in items for text in (item.prompt, *item.responses)]))
        yield from ([next(ids) for _ in range(1 + len(item.responses))] for item in items)
        return
    prompts = _bare_ids(tokenizer, [item.prompt for item in items])
    starts = _starts(tokenizer, [item.prompt for item in items], prompts)
    begun = [(item.prompt[start:], item.responses) for item, (start, _) in zip(items, starts, strict=True)]
    wholes = iter(_bare_ids(tokenizer, [prompt + text for prompt, responses in begun for text in responses]))
    found: list[list[list[int] | str]] = []
    for item, prompt, (_, before) in zip(items, prompts, starts, strict=True):
        parts: list[list[int] | str] = [prompt]
        for text in item.responses:
            whole = before + next(wholes)
            # An unknown token may hide that the prompt's last word has gone on.
            meets = whole[: len(prompt)] == prompt and not (prompt and prompt[-1] == tokenizer.unk_token_id)
            parts.append(whole[len(prompt) :] if meets else text)
        found.append(parts)
    apart = iter(_ids_apart(tokenizer, [part for parts in found for part in parts if isinstance(part, str)]))
    for parts in found:
        yield [next(apart) if isinstance(part, str) else part for part in parts]


def _starts(tokenizer: Any, texts: list[str], ids: list[list[int]]) -> list[tuple[int, list[int]]]:
    """(the character at which a text's last special token begins, the ids before it); (0, []) where it has none.

    A tokenizer takes a text apart at its special tokens before anything else, so that what goes on from the last one
    needs not be tokenised together with all that stands before it.
    """
    added = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
    special = [token.content for token in added if token.special and not token.normalized]
    special = [one for one in special if not any(one in other.content and one != other.content for other in added)]
    if not special:
        return [(0, [])] * len(texts)
    last = re.compile(f"(?s:.*)({'|'.join(map(re.escape, special))})")
    places = [match.start(1) if (match := last.match(text)) else 0 for text in texts]
    ends = _bare_ids(tokenizer, [text[place:] for text, place in zip(texts, places, strict=True)])
    return [
        (place, whole[: len(whole) - len(end)]) if place and whole[len(whole) - len(end) :] == end else (0, [])
        for place, whole, end in zip(places, ids, ends, strict=True)
    ]


def _marks_beginnings(tokenizer: Any) -> bool:
    """Whether a text begins as if there were a space before it (SentencePiece)."""
    word, both = _bare_ids(tokenizer, ["a", "\na"])
    return both[len(both) - len(word) :] != word


def _ids_apart(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that go on from another one: without SentencePiece's mark before a text's first word."""
    if not texts:
        return []
    bare = _bare_ids(tokenizer, texts)
    if not _marks_beginnings(tokenizer):
        return bare
    (line,) = _bare_ids(tokenizer, ["\n"])
    behind = _bare_ids(tokenizer, [f"\n{text}" for text in texts])
    return [new[len(line) :] if new[: len(line)] == line else old for old, new in zip(bare, behind, strict=True)]


def _forged_tokens(tokenizer: Any) -> Callable[[Example], set[str]]:
    """Which control tokens the texts of an example spell.

    A text prompt may be rendered already, so of it only <bos> and <eos> count, where they do not stand at its ends.
    """
    unknown = tokenizer.unk_token
    ends = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token and token != unknown}
    every = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special} - {unknown}
    in_text, in_turns = (
        re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        for tokens in (ends, every | ends)
    )

    def spelt(example: Example) -> set[str]:
        if isinstance(example.prompt, str):
            first, last = tokenizer.bos_token or "", tokenizer.eos_token or ""
            texts = [text.strip().removeprefix(first).removesuffix(last) for text in example.texts()]
            return {token for text in texts for token in in_text.findall(text)}
        return {token for text in example.texts() for token in in_turns.findall(text)}

    return spelt


def _bare_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    with telling(f"the tokenizer {tokenizer.name_or_path!r} cannot encode"):
        return tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _leading_tokens(tokenizer: Any, text: Prompt | Response) -> list[int]:
    """What the tokenizer puts in front of any text by itself: [BOS] or nothing, as a rule."""
    if not isinstance(text, str):
        text = transcript(text if isinstance(text, list) else [text])
    bare = _bare_ids(tokenizer, [text])[0]
    with telling(f"the tokenizer {tokenizer.name_or_path!r} cannot encode"):
        whole = tokenizer(text, verbose=False)["input_ids"]
    starts = [start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _truth_columns(truths: list[dict[str, float | str | int]], where: str) -> dict[str, np.ndarray]:
    """Row dicts as columns: int64 or float64 (NaN where absent) if all are numbers, else text ("").

    Raises UserError for an integer that float64 would round, in a column that gaps or fractions make one of floats.
    """
    columns = {}
    for name in sorted({name for truth in truths for name in truth}):
        values = [truth.get(name) for truth in truths]
        if any(isinstance(value, str) for value in values):
            columns[name] = np.array(["" if value is None else str(value) for value in values])
        elif all(isinstance(value, int) for value in values):
            columns[name] = np.array(values, np.int64)
        else:
            rounded = next((value for value in values if isinstance(value, int) and int(float(value)) != value), None)
            if rounded is not None:
                raise UserError(
                    f"{where}: truth: {name}: {rounded} would be rounded, as the column has gaps or fractions: "
                    "write it as text"
                )
            columns[name] = np.array([np.nan if value is None else value for value in values], np.float64)
    return columns


# --- the folder of tokenised rows


def load_or_tokenise(
    config: RunConfig, tokenizer: Any, kind: Kind | None = None, *, write: bool = True
) -> TokenisedData:
    """`tokenise`, through the folder config.tokenized_path when that is set: read if there, else written.

    The folder holds train.parquet, eval.parquet (if there are held-out rows) and tokens.json (what they were made
    from, and their sha256; sealed). Raises UserError, naming what differs, for a folder that was made from something
    else, and for one that was changed since. Without `dataset` the folder is taken for what it says it is.
    write: False leaves the disk alone; rows that are not there are made in memory.
    """
    kind = kind or KINDS[config.stage]
    if not config.tokenized_path:
        return tokenise(config, tokenizer, kind)
    folder = Path(config.tokenized_path)
    if write:
        files.sweep(folder)
    if os.path.lexists(folder / "tokens.json"):
        return load(folder, config, tokenizer, kind)
    _check_free(folder)
    if not write:
        return tokenise(config, tokenizer, kind)
    recipe = made_from(config, tokenizer, kind)
    data = tokenise(config, tokenizer, kind)
    if made_from(config, tokenizer, kind) != recipe:
        raise UserError(f"dataset: {config.dataset} was changed while it was being read")
    try:
        with files.replacing(folder, lambda: _check_free(folder)) as temporary:
            temporary.mkdir()
            _write(data, recipe, temporary)
    except UserError:
        if not os.path.lexists(folder / "tokens.json"):
            raise
        return load(folder, config, tokenizer, kind)  # another process has written it meanwhile: its is kept
    return data


def _check_free(folder: Path) -> None:
    """Refuse to write a folder that is there, unless it is empty."""
    with telling(f"tokenized_path: cannot read {folder}"):
        is_free = not os.path.lexists(folder) or folder.is_dir() and not any(folder.iterdir())
    if not is_free:
        raise UserError(f"tokenized_path: {folder} is there and holds no tokenised rows (no tokens.json)")


def made_from(config: RunConfig, tokenizer: Any, kind: Kind) -> dict[str, Any]:
    """Everything that the tokenised rows depend on. The seed is part of it only where it draws a split."""
    recipe = {"layout": LAYOUT, "kind": kind, "cutoff_len": config.cutoff_len, "tokenizer": tokenizer_hash(tokenizer)}
    recipe["date_string"] = TODAY.strftime("%d %b %Y")
    if config.dataset:
        recipe["dataset"] = [source.identity() for source in resolve(config.dataset, config, config.split)]
        recipe["max_samples"] = config.max_samples
        recipe["val_size"] = config.val_size
        recipe["seed"] = config.seed if config.val_size else None
        recipe["eval_dataset"] = [
            source.identity() for source in resolve(config.eval_dataset, config, config.eval_split)
        ] if config.eval_dataset else []  # fmt: skip
    return recipe


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides the token ids: the backend, the special tokens, the chat template.

    Equal in every process, and after saving and loading. Padding and truncation are left out: they
    are a call's settings that the backend happens to remember.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend |= {"padding": None, "truncation": None}
    else:
        backend = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = json.dumps([backend, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def load(folder: Path, config: RunConfig, tokenizer: Any, kind: Kind = "pairs") -> TokenisedData:
    """The rows of a folder, after checking that they are what this run would make, and what was written."""
    try:
        check_regular(folder / "tokens.json")
        saved = files.read_sealed(folder / "tokens.json")
    except UserError as error:
        raise UserError(f"tokenized_path: {error}; {AGAIN}") from None
    try:
        _check_recipe(saved["made_from"], made_from(config, tokenizer, kind), folder)
        report, digests = saved["report"], saved["files"]
        for part in report.keys() & {"train", "eval"}:
            RowReport.of(report[part]).check(config.max_unusable_rows)
        rows = {part: _read(folder / f"{part}.parquet", digests[part]) for part in digests}
        return TokenisedData(rows["train"], rows.get("eval"), report)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder}/tokens.json is incomplete; {AGAIN}") from None


def _check_recipe(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    differing = [name for name, value in asked.items() if _content(saved[name]) != _content(value)]
    if differing:
        details = "; ".join(_difference(name, saved[name], asked[name]) for name in differing)
        raise UserError(
            f"tokenized_path: {folder} was made from something else: {details}.\n"
            "Name another folder, or delete this one and it is made again"
        )


def _content(value: Any) -> Any:
    """What a dataset is, whatever it is called: a file that was moved is still the same rows."""
    if not isinstance(value, list):
        return value
    return [{key: item for key, item in source.items() if key != "name"} for source in value]


def _difference(name: str, saved: Any, asked: Any) -> str:
    if name == "tokenizer":
        return f"another tokenizer (hash {saved[:8]}, here {asked[:8]})"
    if name in ("dataset", "eval_dataset"):
        if [source["name"] for source in saved] == [source["name"] for source in asked]:
            return f"{name} has changed since ({', '.join(source['name'] for source in asked)})"
        saved, asked = (", ".join(source["name"] for source in sources) or "none" for sources in (saved, asked))
    return f"{name} was {saved}, here {asked}"


def _write(data: TokenisedData, recipe: dict[str, Any], folder: Path) -> None:
    for part, rows in data.parts().items():
        _write_rows(rows, folder / f"{part}.parquet")
    files.write_sealed(
        folder / "tokens.json",
        {
            "made_from": recipe,
            "counts": {part: len(rows) for part, rows in data.parts().items()},
            "keys": {part: rows.key() for part, rows in data.parts().items()},
            "files": {part: files.sha256(folder / f"{part}.parquet") for part in data.parts()},
            "report": data.report,
        },
    )


def _write_rows(rows: Rows, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.LargeListArray.from_arrays(pa.array(part.offsets), pa.array(part.values))
        for name, part in rows.parts().items()
    }
    columns["source"] = pa.array(rows.source, pa.large_string())
    columns |= {f"truth.{name}": pa.array(column) for name, column in rows.truth.items()}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _read(path: Path, digest: str) -> Rows:
    """The rows of a file whose sha256 is `digest`. It is read once, so what is checked is what is used."""
    import pyarrow.parquet as pq

    check_regular(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path} was changed after it was written; {AGAIN}")
    with telling(f"cannot read {path}"):
        table = pq.read_table(io.BytesIO(content))
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        truth = {name: column for name, column in columns.items() if name.startswith("truth.")}
        return Rows(
            **{name: _ragged(column) for name, column in columns.items() if name not in truth and name != "source"},
            source=columns["source"].to_pylist(),
            truth={name.removeprefix("truth."): _truth_array(column) for name, column in truth.items()},
        )


def _ragged(column: Any) -> Ragged:
    # Arrow's memory is read-only, and torch warns of tensors over such memory: copy once.
    values = column.flatten().to_numpy(zero_copy_only=False, writable=True)
    return Ragged(values, _offsets(column.value_lengths().to_numpy()))


def _truth_array(column: Any) -> np.ndarray:
    array = column.to_numpy(zero_copy_only=False)
    return array.astype(str) if array.dtype == object else array
