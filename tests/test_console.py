"""What is shown while Snakemake works: told of events by hand, with a clock that goes when it is told to."""

import io

import pytest

from discobeta.report import console


@pytest.fixture
def clock(clock_of):
    return clock_of(console)


@pytest.fixture
def view(clock):
    """Of four rm runs and two evaluations, of which two rm runs have taken ten seconds each, side by side."""
    view = console.Console(io.StringIO())
    view.end.set()  # no lines by themselves
    view.thread.join()
    view.planned({"train_rm": 4, "evaluate": 2, "all": 1, "total": 7})
    begin(view, 1, 2)
    clock.now += 10
    view.finished(1)
    view.finished(2)
    return view


def begin(view, *numbers, rule="train_rm"):
    view.started(numbers)
    for number in numbers:
        wildcards = {"arm": "baseline", "variant": "/probit", "seed": str(number), "proof": "/proof"}
        view.described(number, rule, wildcards, [f"results/x/seed-{number}/provenance.json"])


def test_the_first_line_says_what_is_to_be_done(view):
    assert view.stream.getvalue().splitlines()[0] == "6 jobs: rm 4, evaluate 2"


def test_the_line_counts_and_estimates_from_what_has_finished(view, clock):
    """Two of rm are left, 10 s each, both under way for 4 s: 12 s, two at a time. No evaluation was measured."""
    begin(view, 3, 4)
    clock.now += 4
    assert view.line() == "2 of 6 jobs (33 %), 14 s, at least 6 s left: rm 2 of 4"
    shown = view.line(with_running=True).partition(" | ")[2]
    assert shown == "rm baseline probit seed-3 proof; rm baseline probit seed-4 proof"
    view.finished(3)
    view.finished(4)
    begin(view, 5, rule="evaluate")
    assert view.line().endswith(": evaluate 0 of 2")  # under way
    clock.now += 3
    view.finished(5)  # 3 s, and one more of it is left
    assert view.line() == "5 of 6 jobs (83 %), 17 s, about 3 s left: evaluate 1 of 2"


def test_a_failed_job_is_no_longer_under_way_and_is_counted(view, clock, tmp_path):
    begin(view, 3)
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(20)))
    view.study = ["--configfile", "a b.yaml"]
    view.failed(3, "train_rm", ["results/x/seed-3/provenance.json"], [str(log)])
    assert view.stream.getvalue().splitlines()[1:] == [
        "FAILED: rm baseline probit seed-3 proof",
        f"  the end of {log}:",
        *(f"  | line {number}" for number in range(12, 20)),
        "  again: the same command, which goes on with the rest too; it alone: "
        "snakemake results/x/seed-3/provenance.json --cores all --configfile 'a b.yaml'",
    ]
    assert view.line() == "2 of 6 jobs (33 %), 10 s, at least 20 s left, 1 failed: rm 2 of 4"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Nothing to be done (all requested files are present and up to date).", True),
        ("Select jobs to execute...", False),
        ("Trying to restart job 7.", True),
        ("Complete log(s): /x/y.log", "Snakemake's log: /x/y.log"),
    ],
)
def test_of_snakemakes_notes_those_are_shown_that_somebody_needs(view, text, shown):
    before = view.stream.getvalue()
    view.told(text)
    assert view.stream.getvalue().removeprefix(before) == (f"{text if shown is True else shown}\n" if shown else "")


def test_elsewhere_than_on_a_terminal_lines_are_rare(view, clock):
    """At 5 % more, but not within 5 s; else after half a minute, and after hours every ten minutes."""
    view.printed, view.printed_at = 2, clock.now
    clock.now += 4.9
    begin(view, 3)
    view.finished(3)
    assert not view._is_due()
    clock.now += 0.2
    assert view._is_due()
    view.printed, view.printed_at = 3, clock.now
    clock.now += 29
    assert not view._is_due()
    clock.now += 1.1
    assert view._is_due()
    clock.now += 5 * 3600
    view.printed_at = clock.now
    clock.now += 599
    assert not view._is_due()
    clock.now += 1.1
    assert view._is_due()
