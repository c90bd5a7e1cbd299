"""From tokenised rows to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from discobeta.data.rows import Rows


@dataclass
class Batch:
    """N responses with their prompts, as R rows of T tokens. Of B pairs N = 2B, the B chosen responses first.

    A row is a prompt and a response; or a prompt and several responses to it, one after the other, each of which sees
    the prompt and itself, at the positions that it would have alone (`segment_ids`). Places are counted over the
    flattened (R * T). They come from the lengths of prompt and response, never from a pad id: a pad id may also be an
    ordinary token, or the end of a response. They are made here, on the host, because finding them on the device
    would wait for it.
    """

    input_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T) from 0 at the first real token; those of a response go on from its prompt's
    attention_mask: Tensor | None  # (R, T); None if padding is on the right, where causality hides it
    segment_ids: Tensor | None  # (R, T) 0 in the prompt, k in the row's k-th response; None with one response a row
    prompt_end: Tensor  # (N,) place of the last prompt token
    response_end: Tensor  # (N,) place of the last response token
    response_lengths: Tensor  # (N,) tokens of each response
    target_index: Tensor  # (M,) place of each response token, response after response
    target_ids: Tensor  # (M,) the response tokens
    predictor_index: Tensor  # (M,) place of the token before each: its own response's, or the end of the prompt
    sequence_index: Tensor  # (M,) whose response each token belongs to
    columns: dict[str, Tensor]  # what the stage asked for beside the tokens: (B, ...) per pair, or (M,) per target

    @property
    def responses(self) -> int:
        return len(self.response_end)

    @property
    def pairs(self) -> int:
        return self.responses // 2

    def to(self, device: torch.device | str) -> Batch:
        """The batch, from the host, on a device; without waiting for it."""

        def moved(value: Tensor) -> Tensor:
            value = value.pin_memory() if torch.device(device).type == "cuda" else value
            return value.to(device, non_blocking=True)

        mine = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tensors = {name: moved(value) for name, value in mine.items() if isinstance(value, Tensor)}
        return replace(self, **tensors, columns={name: moved(value) for name, value in self.columns.items()})


def pack(
    prompts: Sequence[np.ndarray],
    *responses: Sequence[np.ndarray],
    columns: dict[str, Tensor] | None = None,
    pad_to: int = 0,
    side: str = "right",
) -> Batch:
    """R prompts, each with one response or several, a row each, as one batch of K * R responses, with `columns`.

    responses: K sequences of R responses.
    pad_to:    least width T; side: where the padding goes. Neither changes what a model says.
    """
    count = len(prompts)
    of_prompt = np.array([len(ids) for ids in prompts])
    of_response = np.array([[len(ids) for ids in column] for column in responses])  # (K, R)
    begins = of_prompt + np.cumsum(of_response, 0) - of_response  # (K, R) where a response begins in its row
    lengths = of_prompt + of_response.sum(0)
    width = max(int(lengths.max()), pad_to)
    starts = width - lengths if side == "left" else np.zeros_like(lengths)

    input_ids = np.zeros((count, width), dtype=np.int64)
    for row, ids in enumerate(zip(prompts, *responses, strict=True)):
        input_ids[row, starts[row] : starts[row] + lengths[row]] = np.concatenate(ids)
    place = np.arange(width)[None, :] - starts[:, None]  # 0 at the first real token
    real = (place >= 0) & (place < lengths[:, None])
    segment = (place >= begins[:, :, None]).sum(0)  # (R, T) 0 in the prompt; of padding on the right, the last one's
    shift = np.concatenate([np.zeros_like(begins[:1]), begins - of_prompt])  # by which a segment stands further right
    positions = place - np.take_along_axis(shift.T, segment, 1)
    last = (positions * real).max()  # padding has none beyond: a model may have none, or turn otherwise if it has one

    row, column = np.nonzero(real & (segment > 0))
    nth = segment[row, column] - 1
    order = np.argsort(nth, kind="stable")
    row, column, nth = row[order], column[order], nth[order]
    target = row * width + column
    is_first = column - starts[row] == begins[nth, row]
    prompt_end = np.arange(count) * width + starts + of_prompt - 1
    response_end = np.arange(count) * width + starts + begins + of_response - 1

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions.clip(0, last)),
        attention_mask=torch.from_numpy(real.astype(np.int64)) if side == "left" else None,
        segment_ids=torch.from_numpy(segment) if len(responses) > 1 else None,
        prompt_end=torch.from_numpy(np.tile(prompt_end, len(responses))),
        response_end=torch.from_numpy(response_end.ravel()),
        response_lengths=torch.from_numpy(of_response.ravel()),
        target_index=torch.from_numpy(target),
        target_ids=torch.from_numpy(input_ids.ravel()[target]),
        predictor_index=torch.from_numpy(np.where(is_first, prompt_end[row], target - 1)),
        sequence_index=torch.from_numpy(nth * count + row),
        columns=columns or {},
    )


class Pairs:
    """Rows with the per-row tensors that a stage takes along, made into batches on demand.

    shared: a pair is one row of the batch, its prompt once, and else two.
    Rows of prompts alone have lengths too; their responses are yet to be given.
    """

    def __init__(self, rows: Rows, columns: dict[str, Tensor] | None = None, *, shared: bool = False):
        self.rows, self.columns, self.shared = rows, columns or {}, shared
        prompts, *responses = (column.lengths for column in rows.parts().values())
        self.lengths = prompts + (np.max(responses, axis=0) if responses else 0)  # of a pair's longer sequence
        self.sizes = len(responses) * prompts + sum(responses)  # tokens of a pair's sequences
        self.places = prompts + sum(responses) if shared else len(responses) * self.lengths  # that it takes in a batch

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, **padding) -> Batch:
        """The pairs at `indices`; padding: as for `pack`."""
        prompts, chosen, rejected = ([column[i] for i in indices] for column in self.rows.parts().values())
        columns = {name: value[torch.from_numpy(indices)] for name, value in self.columns.items()}
        sequences = (prompts, chosen, rejected) if self.shared else (prompts * 2, chosen + rejected)
        return pack(*sequences, columns=columns, **padding)

    def tokens(self, indices: np.ndarray) -> int:
        return int(self.sizes[indices].sum())


@dataclass
class PerToken:
    """What is known of each token of N responses, response after response, in one tensor."""

    values: Tensor  # (M, ...), M the sum of
    sizes: np.ndarray  # (N,) tokens of each response

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Tensor:
        """(its tokens, ...) of one response."""
        return self.of(np.array([range(len(self))[row]]))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def of(self, rows: np.ndarray) -> Tensor:
        """(m, ...) of the m tokens of `rows`, in their order."""
        return self.values.index_select(0, self.places(rows))

    def taken(self, rows: np.ndarray) -> PerToken:
        """`rows` alone, in their order."""
        return PerToken(self.of(rows), self.sizes[rows])

    def places(self, rows: np.ndarray) -> Tensor:
        """(m,) where the m tokens of `rows` stand in `values`."""
        sizes, begin = self.sizes[rows], np.cumsum(self.sizes) - self.sizes
        shift = begin[rows] - (np.cumsum(sizes) - sizes)  # from a token's place among those of `rows`
        return torch.from_numpy(np.repeat(shift, sizes) + np.arange(sizes.sum()))


def joined(parts: Sequence[PerToken]) -> PerToken:
    """Those of all parts, one after the other."""
    return PerToken(torch.cat([part.values for part in parts]), np.concatenate([part.sizes for part in parts]))


@dataclass
class Responses:
    """N prompts, each with one response, as token ids, made into batches on demand."""

    prompts: Sequence[np.ndarray]
    responses: Sequence[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(a) + len(b) for a, b in zip(self.prompts, self.responses, strict=True)])

    @property
    def sizes(self) -> np.ndarray:
        """(N,) tokens of each response."""
        return np.array([len(ids) for ids in self.responses])

    def batch(self, indices: np.ndarray, columns: dict[str, Tensor] | None = None) -> Batch:
        return pack([self.prompts[i] for i in indices], [self.responses[i] for i in indices], columns=columns)


def cut(
    rows: np.ndarray, places: np.ndarray, most_places: int | None, most_rows: int | None = None
) -> list[np.ndarray]:
    """`rows` in passes, the longest rows first: so that a pass pads little, and running out of memory shows at once.

    places: of every row there is, those that it takes in a batch. A pass takes at most `most_places`, padding
    included, and `most_rows` rows, where these are given; but one row at least.
    """
    rows = rows[np.argsort(-places[rows], kind="stable")]
    passes = []
    while len(rows):
        size = most_rows or len(rows)
        if most_places:
            size = min(size, max(1, most_places // int(places[rows[0]])))
        passes.append(rows[:size])
        rows = rows[size:]
    return passes
