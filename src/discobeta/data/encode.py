"""From examples to token ids.

A row is prompt ids and response ids. Prompt and response are tokenised as one text, which is cut where the prompt's
own ids end, so that a response's ids are those that it has behind its prompt. The prompt is never cut; a response is
cut at the right to what cutoff_len leaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from discobeta import progress
from discobeta.data.examples import Example, Kind, Prompt, Reason, Response, Unusable, Votes
from discobeta.data.formats import transcript
from discobeta.data.row_report import RowReport
from discobeta.data.rows import Ragged, Rows
from discobeta.data.templates import Rendered, bare_ids, ending, render_or_refuse
from discobeta.errors import UserError, telling

CHUNK = 1000

QUIET_BELOW = 5000
"""Rows; fewer take a moment and get no progress bar."""


def encode(examples: list[Example], tokenizer: Any, cutoff_len: int, kind: Kind, report: RowReport) -> Rows:
    """Examples as rows of token ids of at most cutoff_len (prompt + response).

    Rows that come to nothing (a prompt that leaves no response token, responses that are equal once
    cut) and responses that were cut, and so have no end-of-sequence token, are counted in `report`.
    Raises UserError for a tokenizer or a chat template that fails on every row, or does not end on one.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token (eos_token)")
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes one of a model's config.json alone
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no vocabulary: "
            "its files (tokenizer.json, tokenizer.model, …) are missing or empty"
        )
    leading = _leading_tokens(tokenizer, next((text for e in examples for text in (e.chosen, e.prompt) if text), "a"))
    columns: list[list[np.ndarray]] = [[] for _ in range({"pairs": 3, "supervised": 2, "prompts": 1}[kind])]
    kept, refusal, refused, forged = [], None, 0, _forged_tokens(tokenizer)
    with progress.bar(len(examples), "tokenising", "row", shown=len(examples) >= QUIET_BELOW) as bar:
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
            bar.update(len(chunk))
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
        votes=_vote_columns([example.votes for example in kept]),
    )


Encoded = tuple[list[list[int]], int]
"""([prompt ids, response ids …], how many of the responses were cut)."""


def _encode_chunk(
    chunk: list[Example], tokenizer: Any, leading: list[int], cutoff_len: int
) -> Iterator[Encoded | Unusable]:
    """For each example its token ids, or why it has none. One call of the tokenizer for all."""
    with ending(f"the chat template of {tokenizer.name_or_path!r}") as watched:
        rendered = [render_or_refuse(example, tokenizer) for example in watched(chunk)]
    usable = [item for item in rendered if isinstance(item, Rendered)]
    ids = iter(token_ids(usable, tokenizer) if usable else [])
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
        if item.lacks_bos and prompt[: len(leading)] != leading:
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


def token_ids(items: list[Rendered], tokenizer: Any) -> Iterator[list[list[int]]]:
    """[prompt ids, response ids …] of each item: prompt and response tokenised as one text, cut at the prompt.

    Where they would merge across the border, the prompt keeps the ids that it has alone, which are those that an
    answer is generated behind, and the response is tokenised apart.
    """
    if tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel":
        # Two words that meet would be one that it does not know: there is nothing to be had from one text.
        ids = iter(bare_ids(tokenizer, [text for item in items for text in (item.prompt, *item.responses)]))
        yield from ([next(ids) for _ in range(1 + len(item.responses))] for item in items)
        return
    prompts = bare_ids(tokenizer, [item.prompt for item in items])
    starts = _starts(tokenizer, [item.prompt for item in items], prompts)
    begun = [(item.prompt[start:], item.responses) for item, (start, _) in zip(items, starts, strict=True)]
    wholes = iter(bare_ids(tokenizer, [prompt + text for prompt, responses in begun for text in responses]))
    rows: list[list[list[int] | str]] = []
    for item, prompt, (_, before) in zip(items, prompts, starts, strict=True):
        parts: list[list[int] | str] = [prompt]
        for text in item.responses:
            whole = before + next(wholes)
            # An unknown token may hide that the prompt's last word has gone on.
            meets = whole[: len(prompt)] == prompt and not (prompt and prompt[-1] == tokenizer.unk_token_id)
            parts.append(whole[len(prompt) :] if meets else text)
        rows.append(parts)
    apart = iter(_ids_apart(tokenizer, [part for parts in rows for part in parts if isinstance(part, str)]))
    for parts in rows:
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
    ends = bare_ids(tokenizer, [text[place:] for text, place in zip(texts, places, strict=True)])
    return [
        (place, whole[: len(whole) - len(end)]) if place and whole[len(whole) - len(end) :] == end else (0, [])
        for place, whole, end in zip(places, ids, ends, strict=True)
    ]


def _marks_beginnings(tokenizer: Any) -> bool:
    """Whether a text begins as if there were a space before it (SentencePiece)."""
    word, both = bare_ids(tokenizer, ["a", "\na"])
    return both[len(both) - len(word) :] != word


def _ids_apart(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that go on from another one: without SentencePiece's mark before a text's first word."""
    if not texts:
        return []
    bare = bare_ids(tokenizer, texts)
    if not _marks_beginnings(tokenizer):
        return bare
    (line,) = bare_ids(tokenizer, ["\n"])
    behind = bare_ids(tokenizer, [f"\n{text}" for text in texts])
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


def _leading_tokens(tokenizer: Any, text: Prompt | Response) -> list[int]:
    """What the tokenizer puts in front of any text by itself: [BOS] or nothing, as a rule."""
    if not isinstance(text, str):
        text = transcript(text if isinstance(text, list) else [text])
    bare = bare_ids(tokenizer, [text])[0]
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


def _vote_columns(votes: list[Votes | None]) -> dict[str, np.ndarray]:
    """Side -> (rows,) int64 numbers of people, 0 where a row has no votes; nothing if none has."""
    if not any(votes):
        return {}
    columns = np.array([of_row or Votes(0, 0) for of_row in votes], np.int64).T
    return dict(zip(Votes._fields, columns, strict=True))
