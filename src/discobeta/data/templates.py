"""How a row is said in the form that a tokenizer brings along: its chat template, or the transcript of hh-rlhf."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from discobeta.data.examples import THOUGHTS, Example, Message, Reason, Response, Unusable, texts_of
from discobeta.data.formats import transcript
from discobeta.errors import UserError, first_line, telling

LONGEST_RENDERING = 5.0
"""Seconds of computing that a chat template may take for one row: templates can loop. A usual one takes 1 ms."""

MOST_ADDED = 1_000_000
"""Characters that a chat template may make of an empty row."""

TODAY = datetime(2024, 7, 26)
"""The day on which chat templates are rendered that print the date: the one that Llama 3's fall back to. With the
day of the run a row would have other tokens tomorrow."""


@dataclass(frozen=True)
class Rendered:
    """An example as the texts that are tokenised.

    lacks_bos: no chat template wrote the special tokens, so the tokenizer's leading ones (BOS) are due.
    closed:    the chat template ends the assistant's turn, so no end-of-sequence token is appended.
    """

    prompt: str
    responses: list[str]
    lacks_bos: bool = True
    closed: bool = False


def render(example: Example, tokenizer: Any) -> Rendered:
    """The prompt's text, ending where the response begins, and the responses' texts.

    A text prompt stays as it is. A conversation goes through the tokenizer's chat template, or, if
    it has none, becomes an hh-rlhf transcript. Raises Unusable when the template refuses the row, leaves out
    something that is said in it, or cannot be split into prompt and response.
    """
    responses = [response for response in (example.chosen, example.rejected) if response is not None]
    if not tokenizer.chat_template or isinstance(example.prompt, str):
        _check_needs_no_template(example, responses)
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
    contents = map(_spoken, messages)
    closed = all(not (text and suffix.endswith(text)) for suffix, text in zip(suffixes, contents, strict=True))
    closed = closed and closing_id(tokenizer) is not None
    return Rendered(prompt, suffixes, lacks_bos=False, closed=closed)


def _spoken(message: Message) -> str:
    return (message.get("content") or "").strip()


def _is_in(text: str, rendered: str) -> bool:
    """Whether a text was rendered, whatever the template does to white space (it trims thoughts, sets them apart)."""
    return text.strip() in rendered or "".join(text.split()) in "".join(rendered.split())


def _check_needs_no_template(example: Example, responses: list[Response]) -> None:
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


def render_or_refuse(example: Example, tokenizer: Any) -> Rendered | Unusable:
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
def ending(what: str) -> Iterator[Any]:
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
    _, separator, closing = text.rstrip().rpartition(content)
    ids = bare_ids(tokenizer, [closing])[0] if separator and closing.strip() else []
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in ids if token in special), ids[0] if len(ids) == 1 else None)


def bare_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
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
