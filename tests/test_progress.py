"""Progress: a bar where somebody looks, plain lines where a log is kept."""

import io
import sys

import pytest

from discobeta import progress


@pytest.fixture
def clock(clock_of):
    return clock_of(progress)


def test_a_log_gets_a_line_now_and_then(clock, monkeypatch):
    """100 steps of a second each, from step 100 on: a line after 30, 60 and 90 seconds."""
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with progress.bar(200, "dpo baseline", "step", done=100) as bar:
        for step in range(100):
            clock.now += 1
            bar.set_postfix({"loss": f"0.{step}"})
            bar.update()
    assert written.getvalue().splitlines() == [
        "dpo baseline: step 130 of 200, about 1 min 10 s left; loss 0.29",
        "dpo baseline: step 160 of 200, about 40 s left; loss 0.59",
        "dpo baseline: step 190 of 200, about 10 s left; loss 0.89",
    ]


def test_what_is_quick_leaves_no_line(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with progress.bar(5, "entropies", "batch") as bar:
        for _ in range(5):
            clock.now += 5.9
            bar.update()
    assert written.getvalue() == ""


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, True), (True, False), (False, False)])
def test_a_terminal_gets_a_bar_and_who_is_not_to_show_any_shows_none(monkeypatch, is_terminal, shown):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr(sys, "stderr", written := Stream())
    with progress.bar(5, "entropies", "batch", shown=shown) as bar:
        bar.update(5)
        bar.set_postfix({"loss": "1"})
    assert ("\rentropies" in written.getvalue()) == shown and bool(written.getvalue()) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (12_000, "3 h 20 min"),
     (86_400 * 2 + 3600 * 4 + 59, "2 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds, text):
    assert progress.duration(seconds) == text
