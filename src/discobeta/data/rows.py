"""Tokenised rows in flat arrays, so that a hundred thousand of them load in well under a second."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from discobeta import seeds
from discobeta.data.row_report import RowReport
from discobeta.errors import UserError


class Ragged(Sequence):
    """N integer sequences as one flat array; item i is the view values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        if isinstance(sequences, Ragged):
            return sequences
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        return cls(np.concatenate([np.empty(0, np.int32), *arrays]), offsets_of([len(array) for array in arrays]))

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
        offsets = offsets_of(lengths)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[places], offsets)

    def update(self, digest: Any) -> None:
        """Feed lengths and values to a hash, as little-endian bytes."""
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.values.astype("<i4").tobytes())


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass
class Rows:
    """Tokenised rows; sequences of (L_i,) int32 arrays, kept as `Ragged`.

    chosen_ids and rejected_ids are None as a whole when the kind has none. `source` says where a
    row stood ("file:line", "hub:index"); `truth` holds columns of what is known about it, with NaN or
    "" where a row says nothing; `votes` how many people took which side of a pair (`examples.Votes`), 0 of a row
    without votes, and nothing if no row has any.
    """

    prompt_ids: Ragged
    chosen_ids: Ragged | None = None
    rejected_ids: Ragged | None = None
    source: list[str] = field(default_factory=list)
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    votes: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_ids = Ragged.of(self.prompt_ids)
        self.chosen_ids = None if self.chosen_ids is None else Ragged.of(self.chosen_ids)
        self.rejected_ids = None if self.rejected_ids is None else Ragged.of(self.rejected_ids)
        self.source = list(self.source) or [""] * len(self)
        for part in (*self.parts().values(), self.source, *self.truth.values(), *self.votes.values()):
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
            votes={name: column[indices] for name, column in self.votes.items()},
        )

    def fingerprints(self) -> np.ndarray:
        """(N,) int64, a hash of each row's token ids: equal rows, and only they, are equal."""
        return fingerprints(list(self.parts().values()))

    def key(self) -> str:
        """sha256 over the token ids of all rows in order."""
        digest = hashlib.sha256()
        for name, column in self.parts().items():
            digest.update(name.encode())
            column.update(digest)
        return digest.hexdigest()


def fingerprints(columns: list[Ragged]) -> np.ndarray:
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


FACTS = {"train": "data", "eval": "held_out", "calibration": "calibration"}
"""Part of the rows -> what a run's provenance calls the hash of its token ids."""


@dataclass
class TokenisedData:
    """Training rows, held-out and calibration rows if any, and the JSON-able account of where they came from."""

    train: Rows
    held_out: Rows | None
    report: dict[str, Any]
    calibration: Rows | None = None

    def parts(self) -> dict[str, Rows]:
        """The rows that are there, as train, eval and calibration."""
        parts = {"train": self.train, "eval": self.held_out, "calibration": self.calibration}
        return {name: rows for name, rows in parts.items() if rows is not None}

    def keys(self) -> dict[str, str]:
        """What a run's provenance says of its rows."""
        return {FACTS[part]: rows.key() for part, rows in self.parts().items()}

    def lines(self) -> list[str]:
        """What the run's log says about the data."""
        reports = [RowReport.of(self.report[part]) for part in FACTS if part in self.report]
        lines = [line for report in reports for line in report.lines()]
        if len(self.parts()) > 1:
            kinds = {"train": "training", "eval": "held-out", "calibration": "calibration"}
            lines.append(", ".join(f"{len(rows)} {kinds[part]} rows" for part, rows in self.parts().items()))
        if shared := self.report.get("shared_calibration"):
            lines.append(f"{shared} calibration rows also are training or held-out rows")
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


def hold_out(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """(train, held-out): a share below 1, or a number of rows, drawn by (seed, "val_size").

    All rows of one prompt fall on the same side, so a held-out prompt is never trained on: prompts
    are drawn in random order, each with all its rows if they fit into the asked number (and at least
    one prompt in any case). Both sides keep the order of the data.
    """
    import torch

    asked = round(val_size * len(rows)) if val_size < 1 else int(val_size)
    _, group = np.unique(fingerprints([rows.prompt_ids]), return_inverse=True)
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
