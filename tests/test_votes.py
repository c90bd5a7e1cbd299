"""Votes of several people: how rows carry them, and what an evaluation makes of them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import preference_rows, write_rows

from discobeta.data.examples import Unusable, Votes
from discobeta.data.formats import read_example
from discobeta.data.layouts import find_layout
from discobeta.data.row_report import RowReport
from discobeta.data.sources import read_examples
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.model.pretrained import load_tokenizer
from discobeta.run.evaluate import evaluate, preference_metrics
from discobeta.run.votes import vote_metrics

PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
USER = {"role": "user", "content": "hi"}


def read(row, kind="pairs", entry=None, others=()):
    return read_example(row, find_layout([row, *others], entry or {}, kind, "data"), kind)


def helpsteer3(*scores):
    return {
        "domain": "general", "language": "english", "context": [USER], "response1": "hello", "response2": "go away",
        "overall_preference": 0,
        "individual_preference": [
            {"score": score, "reasoning": "so", "feedback1": "good", "feedback2": "bad"} for score in scores
        ],
    }  # fmt: skip


WORDS = {"A": "A-is-clearly-better", "a": "A-is-slightly-better", "=": "Tie"}
WORDS |= {"b": "B-is-slightly-better", "B": "B-is-clearly-better"}


def multipref(normal, expert):
    def said(letters):
        return [{"evaluator": "x", "overall_pref": WORDS.get(letter), "helpful_pref": "Tie"} for letter in letters]

    return {
        "comparison_id": "1", "text": "hi", "completion_a": "hello", "completion_b": "go away", "model_a": "m",
        "normal_worker_annotations": said(normal), "expert_worker_annotations": said(expert),
    }  # fmt: skip


# --- rows


@pytest.mark.parametrize(
    ("annotators", "votes"),
    [
        ({"chosen": 3, "rejected": 1}, (3, 1, 0)),
        ({"chosen": 2, "rejected": 1, "tie": 4}, (2, 1, 4)),
        ({"chosen": 1}, (1, 0, 0)),
        ({"chosen": 2.0, "rejected": None, "tie": math.nan}, (2, 0, 0)),
    ],
)
def test_a_pair_may_carry_how_many_people_took_which_side(annotators, votes):
    assert read(PAIR | {"annotators": annotators}).votes == Votes(*votes)


@pytest.mark.parametrize(
    ("annotators", "reason"),
    [
        ({"chosen": 1, "rejected": 3}, "more annotators for rejected than for chosen"),
        ({"chosen": 2, "rejected": 2, "tie": 1}, "no majority of the annotators"),
        ({"chosen": 0, "rejected": 0}, "no votes"),
        ({"chosen": 0, "tie": 2}, "no majority of the annotators"),
        ({"chosen": 3, "rejected": -1}, "votes that are no counts: rejected in annotators: -1"),
        ({"chosen": "3", "rejected": 1}, "votes that are no counts: chosen in annotators: '3'"),
        ({"chosen": 2.5}, "votes that are no counts: chosen in annotators: 2.5"),
        ({"chosen": True}, "votes that are no counts: chosen in annotators: True"),
        ({"chosen": math.inf}, "votes that are no counts: chosen in annotators: inf"),
        ({"chosen": 10**6 + 1}, "votes that are no counts: chosen in annotators: 1000001"),
        ({"chosen": [1]}, "votes that are no counts: chosen in annotators: [1]"),
        ({"chosen": 3, "rejcted": 1}, "wrong types: 'rejcted' in annotators"),
        ([3, 1], "wrong types: annotators"),
    ],
)
def test_votes_that_cannot_be_or_say_something_else_than_the_row_make_it_unusable(annotators, reason):
    others = [PAIR | {"annotators": {"chosen": 1, "rejected": 0}}]
    with pytest.raises(Unusable) as caught:
        read(PAIR | {"annotators": annotators}, others=others)
    assert str(caught.value) == reason
    assert read(PAIR | {"annotators": annotators}, "supervised", others=others).chosen == "hello"


FORMS = [["ann", "bob"], "ann", {"name": "ann"}, 3, '{"chosen": 3}', {"Chosen": 3, "Rejected": 1}, [("chosen", 3)]]


@pytest.mark.parametrize("annotators", [*FORMS, None])
def test_a_column_of_that_name_without_votes_is_not_read_and_said(annotators):
    row = PAIR | {"annotators": annotators}
    assert read(row).votes is None
    for kind, entry in (("pairs", {}), ("prompts", {})):
        named = "annotators" if annotators is not None and kind == "pairs" else None
        assert find_layout([PAIR, row], entry, kind, "data").no_votes == named
    report = RowReport("data", no_votes=["annotators"])
    assert report.lines()[1] == "  not read: annotators, which holds no {chosen: 3, rejected: 1}, numbers of people"


def test_votes_that_an_entry_does_not_name_are_said_to_be_not_read():
    row = {"question": "hi", "good": "hello", "bad": "go away", "annotators": {"chosen": 2, "rejected": 1}}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    layout = find_layout([row], {"columns": columns}, "pairs", "data")
    assert (layout.annotators, layout.not_read, layout.no_votes) == (None, ("annotators",), None)
    named = find_layout([row], {"columns": columns | {"annotators": "annotators"}}, "pairs", "data")
    assert (named.annotators, named.not_read, named.no_votes) == ("annotators", (), None)


def test_ties_alone_are_votes():
    """As a data set of nothing but undecided pairs is: none of them is usable."""
    with pytest.raises(Unusable, match="no majority"):
        read(PAIR | {"annotators": {"tie": 4}})


def test_an_entry_that_names_columns_names_that_of_the_votes_too():
    named = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    row = {"question": "hi", "good": "hello", "bad": "go away", "people": {"chosen": 2, "rejected": 1}}
    assert read(row, entry={"columns": named}).votes is None
    assert read(row, entry={"columns": named | {"annotators": "people"}}).votes == (2, 1, 0)
    with pytest.raises(UserError, match=r"its entry says that annotators is the column 'peple'$"):
        read(row, entry={"columns": named | {"annotators": "peple"}})


@pytest.mark.parametrize(
    ("row", "chosen", "votes"),
    [
        (helpsteer3(-3, -1, 2), "hello", (2, 1, 0)),
        (helpsteer3(1, 1, -3), "go away", (2, 1, 0)),  # people are counted, not points
        (helpsteer3(0, 2), "go away", (1, 0, 1)),
        (helpsteer3(-2.0, None), "hello", (1, 0, 0)),
        (multipref("Aa", "=B"), "hello", (2, 1, 1)),
        (multipref("BA", "bb"), "go away", (3, 1, 0)),
        (multipref("b", ""), "go away", (1, 0, 0)),
        (multipref("b?", "b"), "go away", (2, 0, 0)),
    ],
)
def test_what_most_people_took_is_the_chosen_response(row, chosen, votes):
    example = read(row)
    assert example.prompt == [USER]
    assert {example.chosen, example.rejected} == {"hello", "go away"} and example.chosen == chosen
    assert example.votes == Votes(*votes)
    assert read(row, "supervised").chosen == chosen


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (helpsteer3(-1, 1), "no majority of the annotators"),
        (helpsteer3(-3, 1), "no majority of the annotators"),
        (helpsteer3(0, 0), "no majority of the annotators"),
        (helpsteer3(), "no votes"),
        (helpsteer3(-4), "unknown verdict: -4 for score in individual_preference"),
        (helpsteer3(True), "unknown verdict: True for score in individual_preference"),
        (helpsteer3("1"), "unknown verdict: '1' for score in individual_preference"),
        (helpsteer3([1]), "unknown verdict: [1] for score in individual_preference"),
        (helpsteer3(1) | {"individual_preference": 1}, "wrong types: individual_preference"),
        (helpsteer3(1) | {"individual_preference": [1]}, "wrong types: individual_preference"),
        (helpsteer3(1) | {"response2": None}, "wrong types: response2"),
        (helpsteer3(1) | {"response2": "hello"}, "chosen equals rejected"),
        (multipref("Aa", "bB"), "no majority of the annotators"),
        (multipref("", ""), "no votes"),
        (
            multipref("A", "") | {"expert_worker_annotations": [{"overall_pref": "A"}]},
            "unknown verdict: 'A' for overall_pref in expert_worker_annotations",
        ),
    ],
)
def test_a_pair_without_a_majority_is_unusable_and_its_prompt_is_not(row, reason):
    with pytest.raises(Unusable) as caught:
        read(row)
    assert str(caught.value) == reason
    assert read(row, "prompts").prompt == [USER]


def test_pairs_without_a_majority_are_counted_by_reason_and_place(tmp_path):
    rows = [helpsteer3(-1, -1), helpsteer3(1, -1), helpsteer3(0), helpsteer3(9)]
    write_rows(tmp_path / "a.jsonl", rows)
    config = RunConfig.from_mapping(
        {"stage": "rm", "model_name_or_path": "m", "dataset": "a.jsonl", "dataset_dir": str(tmp_path),
         "max_unusable_rows": 0.8}
    )[0]  # fmt: skip
    examples, report = read_examples("a.jsonl", config, split="train", kind="pairs")
    assert [example.votes for example in examples] == [Votes(2, 0, 0)]
    assert RowReport.of(report.as_dict()).lines() == [
        "a.jsonl: 1 of 4 rows are usable",
        "  no majority of the annotators: 2 (a.jsonl:2, a.jsonl:3)",
        "  unknown verdict: 9 for score in individual_preference: 1 (a.jsonl:4)",
    ]


def test_a_dataset_that_names_chosen_and_rejected_is_read_by_these():
    row = helpsteer3(1, 1) | {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    assert (read(row).chosen, read(row).votes) == ("hello", None)


# --- from rows to an evaluation


def votes_of(number):
    """Every third row has none; the others are 3:1, 2:0 with two ties."""
    return ({}, {"annotators": {"chosen": 3, "rejected": 1}}, {"annotators": {"chosen": 2, "tie": 2}})[number % 3]


@pytest.fixture
def with_votes(tmp_path):
    rows = [row | votes_of(number) for number, row in enumerate(preference_rows(12, 2))]
    return write_rows(tmp_path / "votes.jsonl", rows)


def test_votes_come_back_from_the_folder_of_tokens_and_follow_their_rows(settings, with_votes, tmp_path):
    config = RunConfig.from_mapping(
        settings("rm", dataset=str(with_votes), eval_dataset=None, val_size=4, tokenized_path=str(tmp_path / "tokens"))
    )[0]
    tokenizer = load_tokenizer(config)
    made, read = load_or_tokenise(config, tokenizer), load_or_tokenise(config, tokenizer)
    for rows in (*made.parts().values(), *read.parts().values()):
        lines = [int(source.rpartition(":")[2]) - 1 for source in rows.source]
        wanted = np.array([[0, 0, 0], [3, 1, 0], [2, 0, 2]])[np.array(lines) % 3]
        assert list(rows.votes) == ["chosen", "rejected", "tie"] and "annotators" not in rows.truth
        assert np.array_equal(np.stack(list(rows.votes.values()), 1), wanted)


def test_rows_without_votes_have_no_columns_of_votes(settings, tmp_path):
    config = RunConfig.from_mapping(settings("rm", tokenized_path=str(tmp_path / "tokens")))[0]
    assert load_or_tokenise(config, load_tokenizer(config)).train.votes == {}
    columns = pd.read_parquet(tmp_path / "tokens" / "train.parquet").columns
    assert not [name for name in columns if name.startswith("votes")]


USED = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_run_is_measured_on_the_votes_of_its_held_out_rows(run, with_votes, tmp_path, stage, capsys):
    found = evaluate(run(stage, eval_dataset=str(with_votes), **USED))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == found
    examples = pd.read_parquet(tmp_path / "run" / "examples.parquet")
    assert examples[["votes_chosen", "votes_rejected", "votes_tie"]].to_numpy().tolist() == (
        [[0, 0, 0], [3, 1, 0], [2, 0, 2]] * 4
    )
    p = examples.probability[[1, 2, 4, 5, 7, 8, 10, 11]].to_numpy()  # of which all have a share of 3/4
    assert found["votes"]["pairs"] == 8 and found["votes"]["unanimous"] == 0
    assert found["votes"]["entropy"] == pytest.approx(0.5623351446)
    assert found["votes"]["kl"] == pytest.approx(
        np.mean(0.75 * np.log(0.75 / p) + 0.25 * np.log(0.25 / (1 - p))), abs=1e-12
    )
    heads = {"sigma_spearman", "sigma_partial"} | ({"log_s_spearman", "log_s_partial"} if stage == "dpo" else set())
    assert heads <= set(found["votes"])
    said = capsys.readouterr().err
    assert "votes: 4 of 12 held-out pairs have none; what is measured of votes is without them\n" in said
    assert "not in metrics.json: votes/accuracy_unanimous (too few rows" in said


# --- measures


def pairs_of(**columns):
    """Five pairs: 4:0, 3:1, 2:0 with two ties, 2:1, and one vote alone."""
    known = {
        "nll": -np.log([0.95, 0.75, 0.42, 0.53, 0.88]),
        "mean_margin": np.array([3.0, 0.3, -1.1, 1.0, 2.0]) * np.exp([0.5, 0.4, -0.3, 0.1, 0.0]),
        "variance_sum": [1.0, 2.0, 3.0, 4.0, 9.0],
        "sigma_chosen": [1.0] * 5,
        "sigma_rejected": [1.0] * 5,
        "log_s": [0.5, 0.4, -0.3, 0.1, 0.0],
        "votes_chosen": [4, 3, 2, 2, 1],
        "votes_rejected": [0, 1, 0, 1, 0],
        "votes_tie": [0, 0, 2, 0, 0],
    }
    return pd.DataFrame(known | columns)


def test_the_measures_of_five_pairs_by_hand():
    found = vote_metrics(pairs_of())
    log = math.log
    assert found == pytest.approx(
        {
            "pairs": 5,
            # q = 1, 3/4, 3/4, 2/3, 1 against p = .95, .75, .42, .53, .88
            "kl": (
                -log(0.95) + 0
                + 0.75 * log(0.75 / 0.42) + 0.25 * log(0.25 / 0.58)
                + 2 / 3 * log(2 / 3 / 0.53) + 1 / 3 * log(1 / 3 / 0.47)
                - log(0.88)
            ) / 5,
            "brier": (0.0025 + 0.1875 + 0.2964 + 0.2409 + 0.0144) / 5,
            # the third margin is for the response that a quarter took, with confidence .58
            "ece": (0.05 + 0 + (0.58 - 0.25) + (2 / 3 - 0.53) + 0.12) / 5,
            "entropy": (2 * 0.5623351446188083 + 0.6365141682948128) / 5,
            # the last pair has one vote, which agrees with itself
            "unanimous": 1 / 4,
            "accuracy_unanimous": 1,
            "accuracy_split": 2 / 3,
            # variances of a vote 0, 1/4, 1/12, 1/3: ranks 1 3 2 4. Of the heads 1 2 3 4 and 4 3 1 2, of |margin|/s
            # 4 1 3 2, so that rho = .8, -.4 (of margins with the former -.4 and .2, with the variances -.8)
            "sigma_spearman": 0.8,
            "sigma_partial": (0.8 - 0.4 * 0.8) / math.sqrt((1 - 0.16) * (1 - 0.64)),
            "log_s_spearman": -0.4,
            "log_s_partial": (-0.4 + 0.2 * 0.8) / math.sqrt((1 - 0.04) * (1 - 0.64)),
        },
        abs=1e-12,
    )  # fmt: skip


def test_two_of_three_disagree_more_than_five_of_eight_because_they_are_fewer():
    """Variances of a vote, 1/3 and 15/56; of the shares as they stand they would be 2/9 and 15/64, the other way."""
    votes = {"votes_chosen": [2, 5, 4], "votes_rejected": [1, 3, 0], "votes_tie": 0}
    examples = pd.DataFrame(votes | {"mean_margin": 1.0, "variance_sum": [3.0, 2.0, 1.0]})
    assert vote_metrics(examples)["sigma_spearman"] == pytest.approx(1)


def test_it_does_not_matter_which_response_of_a_pair_comes_first():
    before = pairs_of()
    after = before.assign(
        nll=-np.log(-np.expm1(-before.nll)), mean_margin=-before.mean_margin,
        votes_chosen=before.votes_rejected, votes_rejected=before.votes_chosen,
    )  # fmt: skip
    found, wanted = vote_metrics(after), vote_metrics(before)
    for name in ("kl", "brier", "ece", "entropy", "sigma_spearman", "log_s_partial"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12), name


def test_three_votes_a_pair_are_enough_for_differences_between_runs():
    """1,000 pairs on which 7 of 10 people would take one response, and every outcome of 3 votes as often as is due."""
    votes = np.repeat([0, 1, 2, 3], [27, 189, 441, 343])

    def of(p, name):
        columns = {"votes_chosen": votes, "votes_rejected": 3 - votes, "votes_tie": 0, "mean_margin": 1.0}
        return vote_metrics(pd.DataFrame(columns | {"nll": -math.log(p)}))[name]

    def truth(p):
        return 0.7 * math.log(0.7 / p) + 0.3 * math.log(0.3 / (1 - p))

    assert of(0.9, "kl") - of(0.6, "kl") == pytest.approx(truth(0.9) - truth(0.6))
    assert of(0.7, "kl") == pytest.approx(0.6108643020548935 - of(0.7, "entropy"))  # the entropy of .7 and .3
    assert 0.1 < of(0.7, "kl") < 1 / 4  # near 1/(2*3): what three votes add to the divergence of every run
    assert of(0.9, "brier") == pytest.approx(0.7 * 0.01 + 0.3 * 0.81)
    assert of(0.9, "ece") == pytest.approx(0.2)


def test_a_certain_model_has_a_finite_divergence_from_votes():
    found = vote_metrics(pairs_of(nll=[0.0, 0.1, 0.2, 0.3, 0.0]))
    assert math.isfinite(found["kl"]) and found["brier"] < 1


def test_a_model_without_heads_or_without_a_likelihood_is_measured_by_what_it_has():
    heads = ["variance_sum", "sigma_chosen", "sigma_rejected", "log_s"]
    found = vote_metrics(pairs_of().drop(columns=heads))
    assert set(found) == {
        "pairs", "kl", "brier", "ece", "entropy", "unanimous", "accuracy_unanimous", "accuracy_split",
    }  # fmt: skip
    assert set(found) - set(vote_metrics(pairs_of().drop(columns=[*heads, "nll"]))) == {"kl", "brier", "ece"}


def test_what_votes_leave_undefined_is_left_out_and_said(capsys):
    none = dict.fromkeys(("votes_rejected", "votes_tie"), 0)
    found = preference_metrics(pairs_of(votes_chosen=[2, 2, 3, 0, 1], **none))["votes"]
    assert found["pairs"] == 4 and found["accuracy_unanimous"] == pytest.approx(2 / 3)
    assert not {"accuracy_split", "sigma_spearman", "log_s_partial"} & set(found)
    said = capsys.readouterr().err
    assert "votes: 1 of 5 held-out pairs have none" in said
    assert "not in metrics.json: votes/accuracy_split, votes/sigma_spearman" in said


def test_pairs_of_which_nobody_has_voted_have_no_measures_of_votes(capsys):
    none = dict.fromkeys(("votes_chosen", "votes_rejected", "votes_tie"), 0)
    assert "votes" not in preference_metrics(pairs_of(**none))
    assert "votes: 5 of 5 held-out pairs have none" in capsys.readouterr().err
    without = pairs_of().drop(columns=[*none])
    assert "votes" not in preference_metrics(without) and capsys.readouterr().err == ""
