"""The account of a dataset's rows: how many are used, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from discobeta.data.examples import Reason, Unusable
from discobeta.errors import UserError, shorten


@dataclass
class RowReport:
    """How many rows of a dataset are used, and which are not, by reason."""

    dataset: str
    total: int = 0
    truncated_responses: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> where the first few such rows stand."""
    not_read: list[str] = field(default_factory=list)
    """Columns that would shape the prompt, or count votes, and that the dataset's entry does not name."""
    no_votes: list[str] = field(default_factory=list)
    """Columns that are called like one of votes, and hold none."""
    forged: dict[str, int] = field(default_factory=dict)
    """Control token -> rows whose texts spell it, so that it becomes the token itself."""
    first_forged: list[str] = field(default_factory=list)

    SHOWN = 3
    DETAILS = 8
    """Most details told apart within one reason; rows of further ones are counted under the reason alone."""

    @property
    def usable(self) -> int:
        return self.total - sum(self.reasons.values())

    def count_unusable(self, unusable: Unusable, source: str) -> None:
        reason = shorten(str(unusable), 160)
        start = unusable.reason.value
        if reason not in self.reasons and sum(other.startswith(f"{start}: ") for other in self.reasons) >= self.DETAILS:
            reason = start
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        shown = self.first.setdefault(reason, [])
        if len(shown) < self.SHOWN:
            shown.append(source)

    def count_forged(self, tokens: Iterable[str], source: str) -> None:
        for token in tokens:
            self.forged[token] = self.forged.get(token, 0) + 1
        if len(self.first_forged) < self.SHOWN:
            self.first_forged.append(source)

    def lines(self) -> list[str]:
        """What the run's log says: one line, and one more per reason and warning."""
        truncated = f"; {self.truncated_responses} responses cut at cutoff_len" if self.truncated_responses else ""
        return [
            f"{self.dataset}: {self.usable} of {self.total} rows are usable{truncated}",
            *self._reason_lines(),
            *self._warnings(),
        ]

    def _warnings(self) -> Iterator[str]:
        if self.not_read:
            yield f"  not read: {', '.join(self.not_read)} (not named by the dataset's entry in its `columns`)"
        for name in self.no_votes:
            yield f"  not read: {name}, which holds no {{chosen: 3, rejected: 1}}, numbers of people"
        if self.forged:
            spelt = ", ".join(f"{token!r} in {count} rows" for token, count in sorted(self.forged.items())[:5])
            yield (
                f"  control tokens spelt in the rows' texts become the tokens themselves: {spelt} "
                f"({', '.join(self.first_forged)}, …)"
            )

    def _reason_lines(self) -> list[str]:
        order = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"  {reason}: {count} ({', '.join(self.first[reason])}{', …' if count > len(self.first[reason]) else ''})"
            for reason, count in order
        ]

    def check(self, most: float) -> None:
        """Raise UserError when no row is usable, or more than the share `most` is not."""
        reasons = "\n".join(["", *self._reason_lines()])
        hint = " (a larger cutoff_len keeps more)" if Reason.PROMPT_TOO_LONG in self.reasons else ""
        if not self.total:
            raise UserError(f"{self.dataset} has no rows")
        if not self.usable:
            raise UserError(f"{self.dataset}: none of the {self.total} rows is usable{hint}:{reasons}")
        if self.total - self.usable > most * self.total:
            raise UserError(
                f"{self.dataset}: {self.total - self.usable} of {self.total} rows are unusable, "
                f"more than max_unusable_rows: {most:g} allows{hint}:{reasons}"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"usable": self.usable}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> RowReport:
        return cls(**{name: value for name, value in saved.items() if name != "usable"})
