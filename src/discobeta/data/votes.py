"""How many people took which side of a pair; and data sets that hold what each of them said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from discobeta.data.examples import Reason, Unusable, Votes
from discobeta.errors import shown

MOST_VOTES = 10**6
"""On one side of one pair. More are no people."""


def counted(value: Any, column: str) -> Votes | None:
    """Votes from {chosen: 3, rejected: 1, tie: 0}, in which a side may be missing or null; None from null.

    Raises Unusable where a number is no count, and where more did not take the chosen response than took the other.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Unusable(Reason.WRONG_TYPES, column)
    for name in value:
        if name not in Votes._fields:
            raise Unusable(Reason.WRONG_TYPES, f"{shown(name)} in {column}")
    votes = Votes(*(_count(value.get(side), f"{side} in {column}") for side in Votes._fields))
    if not sum(votes):
        raise Unusable(Reason.NO_VOTES)
    if votes.chosen == votes.rejected:
        raise Unusable(Reason.NO_MAJORITY)
    if votes.chosen < votes.rejected:
        raise Unusable(Reason.MINORITY)
    return votes


def _count(value: Any, where: str) -> int:
    if value is None or value != value:  # gaps have made the others fractions, and are NaN
        return 0
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole or not 0 <= value <= MOST_VOTES:
        raise Unusable(Reason.NO_COUNT, f"{where}: {shown(value)}")
    return int(value)


class Judged(NamedTuple):
    """A pair by the columns that hold its responses, the one that more people took first, and the votes."""

    chosen: str
    rejected: str
    votes: Votes


@dataclass(frozen=True)
class Judgements:
    """Rows of a prompt, two responses, and lists of what people said of them, one by one."""

    prompt: str
    responses: tuple[str, str]
    lists: tuple[str, ...]
    """Columns that hold a list of judgements each. Every judgement is one vote, whoever gave it."""
    key: str
    """Of a judgement, under which its verdict stands."""
    first: tuple[Any, ...]
    """Verdicts for the first response; and so on."""
    second: tuple[Any, ...]
    tie: tuple[Any, ...]

    @property
    def columns(self) -> set[str]:
        return {self.prompt, *self.responses, *self.lists}

    def of(self, row: dict[str, Any]) -> Judged:
        """The pair as most people saw it. How much better they found a response does not count.

        Raises Unusable where nobody said anything, where as many took one response as the other, and for a verdict
        that the data set does not know.
        """
        verdicts = [verdict for column in self.lists for verdict in self._verdicts(row.get(column), column)]
        first, second, tie = (
            sum(verdict in side for verdict in verdicts) for side in (self.first, self.second, self.tie)
        )
        if not verdicts:
            raise Unusable(Reason.NO_VOTES)
        if first == second:
            raise Unusable(Reason.NO_MAJORITY)
        if first > second:
            return Judged(*self.responses, Votes(first, second, tie))
        return Judged(*reversed(self.responses), Votes(second, first, tie))

    def _verdicts(self, judgements: Any, column: str) -> list[Any]:
        if isinstance(judgements, Unusable):  # a cell that could not be read
            raise judgements
        if not isinstance(judgements, list | None) or not all(isinstance(one, dict) for one in judgements or ()):
            raise Unusable(Reason.WRONG_TYPES, column)
        verdicts = [one[self.key] for one in judgements or () if one.get(self.key) is not None]
        for verdict in verdicts:
            if isinstance(verdict, bool) or verdict not in (*self.first, *self.second, *self.tie):
                raise Unusable(Reason.UNKNOWN_VERDICT, f"{shown(verdict)} for {self.key} in {column}")
        return verdicts


HELPSTEER3 = Judgements(
    prompt="context",
    responses=("response1", "response2"),
    lists=("individual_preference",),
    key="score",
    first=(-3, -2, -1),
    second=(1, 2, 3),
    tie=(0,),
)
"""nvidia/HelpSteer3, subset preference (arXiv:2505.11475): up to three scores, negative where response1 is better."""

MULTIPREF = Judgements(
    prompt="text",
    responses=("completion_a", "completion_b"),
    lists=("normal_worker_annotations", "expert_worker_annotations"),
    key="overall_pref",
    first=("A-is-clearly-better", "A-is-slightly-better"),
    second=("B-is-clearly-better", "B-is-slightly-better"),
    tie=("Tie",),
)
"""allenai/multipref (arXiv:2410.19133): two crowd workers and two experts a pair."""

KNOWN = (HELPSTEER3, MULTIPREF)
