"""Which runs count: a number of a run that is not the study's is in no table and no figure, and the run is named."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from report_study import FACTS, evaluate, finish, reseal, results, rewrite, study, write_run

from discobeta import cli, files, identity, report
from discobeta.data.sources import contents_hash
from discobeta.design.config import RunConfig
from discobeta.design.study import Study
from discobeta.report import curves, figures, neutrality, tables
from discobeta.report.collect import provenance
from discobeta.report.render import escape, markdown
from discobeta.report.results import enumerate_seeds

ARMS = ["baseline", "disco-used_beta-absent"]
SETTINGS = {
    "study": "fixture",
    "seeds": [1, 2, 3],
    "stages": ["dpo"],
    "arms": ARMS,
    "data": {"dataset": "rows.jsonl", "eval_dataset": "held-out.jsonl"},
    "base": {"model_name_or_path": "a/model"},
    "common": {"learning_rate": 5e-4},
}
ALIEN = 77.125
"""What the run that is not the study's has logged and measured: 77.125 with any rounding begins with 77.1."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def measured(run) -> dict:
    """NLL 0.60, 0.62, 0.64 of seeds 1, 2, 3 of the baseline, 0.1 less of Disco."""
    return {"nll": 0.58 + 0.02 * run.seed - 0.1 * (run.arm.name != "baseline"), "accuracy": 0.7}


def alien(of: Study, run, **facts) -> Path:
    log = tuple({"step": step, "loss": ALIEN, "eval_loss": ALIEN, "accuracy": ALIEN} for step in (1, 2))
    return finish(of, run, {"nll": ALIEN, "accuracy": ALIEN}, log=log, **facts)


def finished(made: Study, but=("baseline", 2)):
    """The study's runs but for one, and that one's place."""
    for run in made.runs():
        if (run.arm.name, run.seed, run.proof) != (*but, False):
            finish(made, run, measured(run))
    return made.run(made.stages[-1], *but)


def written(made: Study) -> str:
    """All that the tables say."""
    tables.write(results(made))
    paths = [path for path in (made.directory / "tables").iterdir() if path.suffix in (".csv", ".md", ".tex")]
    return "\n".join(path.read_text() for path in paths)


def drawn(made: Study) -> list[float]:
    """Heights of all lines and bars of the figures."""
    draw = (curves.loss_curves, figures.reliability_diagram, figures.interaction)
    axes = [axes for figure in (each(results(made), "dpo") for each in draw) for axes in figure.axes]
    heights = [height for each in axes for line in each.lines for height in line.get_ydata()]
    return [float(height) for height in heights]


def said(made: Study, name: str = "dpo.md") -> str:
    return (made.directory / "tables" / name).read_text()


def alone(made: Study, reason: str) -> None:
    """The baseline's seed 2 is in nothing that is printed, and named with this reason; the other two are."""
    everything = written(made)
    assert "77.1" not in everything
    assert max(height for height in drawn(made) if height == height) <= 1.02
    text = markdown(f"baseline: seed 2 {reason}")
    assert text in said(made)
    assert text in said(made, "effects.md") + said(made, "comparisons.md")
    baseline = next(line for line in said(made).splitlines() if line.startswith("| baseline"))
    assert "2 of 3" in baseline
    assert "0.6200 (0.6000, –, 0.6400)" in baseline
    metrics = pd.read_csv(made.directory / "tables" / "metrics.csv")
    assert set(metrics.seed[metrics.arm == "baseline"]) == {1, 3}
    differences = pd.read_csv(made.directory / "tables" / "comparisons.csv").set_index(["metric", "contrast"])
    row = differences.loc["nll", "Disco − baseline"]
    assert (row.n_seeds, round(row.difference, 12)) == (2, -0.1)


# --- the study that was reported


def test_the_run_of_another_learning_rate_whose_provenance_is_gone_is_in_no_mean(capsys):
    """A rerun was killed at its start: the metrics of the run before it are there, and its provenance is not."""
    Path("study.yaml").write_text(yaml.safe_dump(SETTINGS | {"seeds": [1, 2]}))
    made = Study(SETTINGS | {"seeds": [1, 2]})
    for run in made.runs():
        if (run.arm.name, run.seed) != ("baseline", 2):
            finish(made, run, measured(run))
    before = Study(SETTINGS | {"common": {"learning_rate": 1e-3}})
    place = alien(before, before.run("dpo", "baseline", 2))
    (place / "provenance.json").unlink()
    words = ["--configfile", "study.yaml"]
    assert cli.main(["report", *words]) == 0
    baseline = next(line for line in said(made).splitlines() if "| baseline" in line)
    assert "0.6000 (0.6000, –)" in baseline
    assert "baseline: seed 2 (not finished)" in said(made)
    before_refusal = {path: path.read_bytes() for path in made.directory.rglob("*") if path.is_file()}
    for command in ("report", "tables", "figures"):
        capsys.readouterr()
        assert cli.main([command, *words, "--strict"]) == 2
        message = capsys.readouterr().err
        assert "1 of 4 runs of fixture do not count: dpo, baseline: seed 2 (not finished)" in message
        assert len(message.splitlines()) == 2
    assert {path: path.read_bytes() for path in made.directory.rglob("*") if path.is_file()} == before_refusal


@pytest.mark.parametrize("command", ["report", "tables", "figures"])
def test_strict_writes_nothing_unless_every_run_counts(command, capsys):
    made = Study(SETTINGS | {"idle_arms": "prove", "arms": [*ARMS, "disco-idle_beta-absent"]})
    Path("study.yaml").write_text(yaml.safe_dump(made.settings))
    for run in made.runs():
        finish(made, run, None if run.proof else measured(run))
    proof = made.run("dpo", "disco-idle_beta-absent", 3, proof=True).directory
    kept = (proof / "log.jsonl").read_bytes()
    (proof / "log.jsonl").write_text("{}\n")
    words = [command, "--configfile", "study.yaml", "--strict"]
    assert cli.main(words) == 2
    assert {path.name for path in made.directory.iterdir()} == {"runs"}
    (proof / "log.jsonl").write_bytes(kept)
    weights = proof / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    assert cli.main(words) == 2 and "adapter_model.safetensors was changed" in capsys.readouterr().err
    assert {path.name for path in made.directory.iterdir()} == {"runs"}
    weights.write_bytes(kept)
    assert cli.main(words) == 0
    assert {path.name for path in made.directory.iterdir()} >= {"runs"} | ({command} - {"report"})


@pytest.mark.parametrize("name", ["tables/dpo.csv", "tables/config.yaml", "figures/learning-curves-dpo.svg"])
def test_somebodys_files_with_the_names_of_ours_stay(name, capsys):
    made = Study(SETTINGS)
    Path("study.yaml").write_text(yaml.safe_dump(made.settings))
    for run in made.runs():
        finish(made, run, measured(run))
    path = made.directory / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    words = [path.parent.name, "--configfile", "study.yaml"]
    assert cli.main(words) == 2 and "discobeta has not written it" in capsys.readouterr().err
    assert [other.name for other in path.parent.iterdir()] == [path.name] and path.read_text() == "mine"
    path.unlink()
    assert cli.main(words) == 0 and cli.main(words) == 0


# --- what makes a run another one than the study's


def test_a_run_of_another_learning_rate_is_stale():
    made = Study(SETTINGS)
    run = finished(made)
    before = Study(SETTINGS | {"common": {"learning_rate": 1e-3}})
    alien(before, run)
    alone(made, "stale (learning_rate: 0.001 there, 0.0005 here)")


def test_settings_that_change_only_how_a_run_is_done_do_not_make_it_stale():
    made = Study(SETTINGS)
    finish(Study(SETTINGS | {"common": {"learning_rate": 5e-4, "save_steps": 7}}), finished(made), {"nll": 0.62})
    assert {found.absence for found in results(made).found.values()} == {None}


def test_a_run_from_before_a_key_was_there_has_its_default():
    """Its record knows no digest of the settings of today, so the settings themselves are compared."""
    made = Study(SETTINGS)
    place = finish(made, finished(made), {"nll": 0.62})
    settings = yaml.safe_load((place / "config.yaml").read_text())
    assert settings.pop("gamma") == 1.0
    reseal(place, settings=None)
    rewrite(place, "config.yaml", yaml.safe_dump(settings))
    assert results(made).absence(made.run("dpo", "baseline", 2)) is None
    rewrite(place, "config.yaml", yaml.safe_dump(settings | {"warmup_ratio": 0.5}))
    assert results(made).absence(made.run("dpo", "baseline", 2)) == "stale (warmup_ratio: 0.5 there, 0.0 here)"


@pytest.mark.parametrize("key", ["base", "tokenizer", "data", "held_out"])
def test_where_nobody_knows_what_it_is_now_the_odd_one_is_stale(key):
    made = Study(SETTINGS)
    alien(made, finished(made), **{key: "0" * 64})
    alone(made, f"stale ({key} is not the other runs')")


def test_where_runs_disagree_evenly_none_counts():
    made = Study(SETTINGS | {"seeds": [1, 2], "arms": ["baseline"]})
    for run in made.runs():
        finish(made, run, {"nll": 0.5}, base=str(run.seed) * 64)
    assert {found.absence for found in results(made).found.values()} == {"stale (base is not the other runs')"}


def local_base(folder: Path) -> dict[str, str]:
    """A base whose files are three, and the hashes of `identity` of it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"base")
    config, _ = RunConfig.from_mapping({"stage": "dpo", "model_name_or_path": str(folder)})
    return {"base": identity.weights_hash(config), "tokenizer": identity.tokenizer_hash(config)}


@pytest.mark.parametrize(("name", "key"), [("model.safetensors", "base"), ("tokenizer.json", "tokenizer")])
def test_runs_on_a_base_that_has_changed_are_stale(name, key, tmp_path):
    made = Study(SETTINGS | {"base": {"model_name_or_path": str(tmp_path / "base")}})
    facts = local_base(tmp_path / "base")
    for run in made.runs():
        finish(made, run, measured(run), **facts)
    assert {found.absence for found in results(made).found.values()} == {None}
    (tmp_path / "base" / name).write_bytes(b"[1]")
    assert {found.absence for found in results(made).found.values()} == {f"stale ({key} has changed)"}


def test_runs_on_a_base_that_the_study_would_train_otherwise_are_stale():
    settings = SETTINGS | {"base": {"sft": {"model_type": "qwen3", "learning_rate": 1e-3}}}
    made = Study(settings)
    for run in made.runs():
        finish(made, run, measured(run))
    assert {found.absence for found in results(made).found.values()} == {None}  # no base here to compare with
    write_run(Study(settings | {"base": {"sft": {"model_type": "qwen3", "learning_rate": 2e-3}}}).base_config())
    (reason,) = {found.absence for found in results(made).found.values()}
    assert reason == "stale (the base is stale (learning_rate: 0.002 there, 0.001 here))"


def write_tokens(folder: Path, **keys) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_sealed(folder / "tokens.json", {"keys": {"train": FACTS["data"], "eval": FACTS["held_out"]} | keys})


@pytest.mark.parametrize(("part", "key"), [("train", "data"), ("eval", "held_out")])
def test_runs_on_rows_that_have_changed_are_stale(part, key):
    made = Study(SETTINGS)
    for run in made.runs():
        finish(made, run, measured(run))
    write_tokens(made.tokens("all"))
    assert {found.absence for found in results(made).found.values()} == {None}
    write_tokens(made.tokens("all"), **{part: "0" * 64})
    assert {found.absence for found in results(made).found.values()} == {f"stale ({key} has changed)"}


@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", "not JSON", '{"keys": 5, "seal": "x"}'])
def test_runs_whose_rows_cannot_be_told_are_stale(content):
    made = Study(SETTINGS)
    for run in made.runs():
        finish(made, run, measured(run))
    write_tokens(made.tokens("all"))
    (made.tokens("all") / "tokens.json").write_text(content)
    (reason,) = {found.absence for found in results(made).found.values()}
    assert reason == "stale (there are no rows in results/fixture/shared/data/all/tokens)"


def test_runs_on_a_data_set_that_has_changed_are_stale():
    made = Study(SETTINGS)
    Path("rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("held-out.jsonl").write_text('{"prompt": "d", "chosen": "e", "rejected": "f"}\n')
    now = contents_hash(made.config(made.runs()[0]))
    for run in made.runs():
        finish(made, run, measured(run), sources=now)
    assert {found.absence for found in results(made).found.values()} == {None}
    Path("held-out.jsonl").write_text('{"prompt": "d", "chosen": "e", "rejected": "g"}\n')
    assert {found.absence for found in results(made).found.values()} == {"stale (dataset has changed)"}


LABELS = {"noise": "heteroscedastic", "labels": "probit", "flips": 0.0}
WORLD = {"sft_examples": 6000, **LABELS, "qualities": "shared", "own": False}
PAIRS = {"train": 9600, "evaluation": 1600, "calibration": 0, "every_prompt": False}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": 64}, "stale (pairs.json: train: 9600 there, 64 here)"),
        ({"noise": "homoscedastic"}, "stale (world.json: noise: 'heteroscedastic' there, 'homoscedastic' here)"),
        ({"seed": 2}, "stale (world.json: seed: 1 there, 2 here)"),
        ({"flips": 0.2}, "stale (world.json: flips: 0.0 there, 0.2 here)"),
        ({"every_prompt": True}, "stale (pairs.json: every_prompt: False there, True here)"),
    ],
)
def test_runs_of_another_world_are_stale(changes, reason):
    """Run configs hold paths of the world's rows and nothing of the world."""
    settings = SETTINGS | {"data": {"world": {}}, "base": {"sft": {"model_type": "qwen3"}}}
    made = Study(settings)
    for run in made.runs():
        finish(made, run, measured(run))
    world = made.world_of("seed-1") / "world.json"
    assert world == made.world_of("seed-2") / "world.json"
    files.write_sealed(world, {"seed": 1} | WORLD)
    for seed in made.seeds:
        pairs = {"seed": seed, "world": files.sha256(world)} | PAIRS
        files.write_sealed(made.pairs(f"seed-{seed}") / "pairs.json", pairs)
    assert {found.absence for found in results(made).found.values()} == {None}
    assert {found.absence for found in results(Study(settings | {"data": {"world": changes}})).found.values()} == {
        reason
    }
    files.write_sealed(made.pairs("seed-2") / "pairs.json", pairs | {"seed": 2, "world": "0" * 64})
    stale = {run.seed for run, found in results(made).found.items() if found.absence}
    assert stale == {2}


def test_where_each_seed_is_a_world_another_one_makes_its_runs_stale_alone():
    """And no policy counts as measured that was measured by the truth of another world than its seed's."""
    settings = SETTINGS | {"data": {"world": {"own": True}}, "base": {"sft": {"model_type": "qwen3"}}}
    made = Study(settings)
    folders = {seed: made.world_of(f"seed-{seed}") for seed in made.seeds}
    hashes = {}
    for seed, folder in folders.items():
        files.write_sealed(folder / "world.json", {"seed": seed} | WORLD | {"own": True})
        hashes[seed] = files.sha256(folder / "world.json")
        pairs = {"seed": seed, "world": hashes[seed]} | PAIRS
        files.write_sealed(made.pairs(f"seed-{seed}") / "pairs.json", pairs)
    for run in made.runs():
        evaluation = finish(made, run, measured(run)) / "evaluation.json"
        files.write_sealed(evaluation, files.read_sealed(evaluation) | {"ground_truth": hashes[run.seed]})
    assert len(set(hashes.values())) == len(made.seeds) > 1
    assert {found.absence for found in results(made).found.values()} == {None}
    files.write_sealed(folders[2] / "world.json", {"seed": 1} | WORLD | {"own": True})
    reasons = {(run.seed, found.absence) for run, found in results(made).found.items()}
    assert reasons == {(1, None), (2, "stale (world.json: seed: 1 there, 2 here)"), (3, None)}
    files.write_sealed(folders[2] / "world.json", {"seed": 2} | WORLD | {"own": True, "made": "anew"})
    pairs = {"seed": 2, "world": files.sha256(folders[2] / "world.json")} | PAIRS
    files.write_sealed(made.pairs("seed-2") / "pairs.json", pairs)
    reasons = {(run.seed, found.absence) for run, found in results(made).found.items()}
    assert reasons == {(1, None), (2, "evaluated in another world"), (3, None)}


# --- ppo reads other runs

CHAIN = SETTINGS | {"stages": ["rm", "dpo", "ppo"], "seeds": [1], "arms": ["baseline", "disco-absent_beta-used"]}


def chain() -> Study:
    made = Study(CHAIN)
    for run in made.runs():
        finish(made, run, {"true_reward": 1.5})
    assert {found.absence for found in results(made).found.values()} == {None}
    return made


def absences(made: Study) -> dict[str, str | None]:
    return {f"{run.stage} {run.arm.name}": found.absence for run, found in results(made).found.items()}


def test_a_reward_model_that_was_trained_again_makes_what_has_read_it_stale():
    made = chain()
    place = made.run("rm", "baseline", 1).directory
    rewrite(place, "adapter/adapter_model.safetensors", b"others!")
    found = absences(made)
    assert found["rm baseline"] is None
    assert found["ppo baseline"] == found["ppo disco-absent_beta-used"] == "stale (reward_model has changed)"


def test_a_beta_head_that_was_trained_again_makes_what_has_read_it_stale():
    made = chain()
    rewrite(made.run("dpo", "disco-absent_beta-used", 1).directory, "heads.safetensors", b"other")
    found = absences(made)
    assert found["ppo disco-absent_beta-used"] == "stale (beta_head has changed)"
    assert found["ppo baseline"] is found["dpo disco-absent_beta-used"] is None


@pytest.mark.parametrize("what", ["provenance.json", "config.yaml"])
def test_what_has_read_a_run_that_does_not_count_does_not_either(what):
    made = chain()
    (made.run("rm", "baseline", 1).directory / what).unlink()
    assert absences(made)["ppo baseline"].startswith("stale (its reward_model is ")


def test_a_reward_model_of_other_settings_makes_ppo_stale_though_its_own_settings_are_the_same():
    chain()
    changed = Study(CHAIN | {"rm": {"learning_rate": 1e-3}})
    assert absences(changed)["ppo baseline"].startswith("stale (its reward_model is stale (learning_rate")
    assert absences(changed)["dpo baseline"] is None


# --- damage


CHANGED = {
    "config.yaml": "config.yaml was changed after the run was finished",
    "log.jsonl": "log.jsonl was changed after the run was finished",
    "cost.json": "cost.json was changed after the run was finished",
    "metrics.json": "metrics.json was changed after the evaluation",
    "examples.parquet": "examples.parquet was changed after the evaluation",
    "evaluation_cost.json": "evaluation_cost.json was changed after the evaluation",
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_run_of_which_a_file_was_changed_is_damaged(name):
    made = Study(SETTINGS)
    place = alien(made, finished(made))
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 1
    (place / name).write_bytes(content)
    run = made.run("dpo", "baseline", 2)
    assert results(made).absence(run).startswith(f"damaged ({CHANGED[name]}")
    alone(made, results(made).absence(run))


@pytest.mark.parametrize("name", ["provenance.json", "evaluation.json"])
@pytest.mark.parametrize("content", ["", "null", "5", "[]", "{}", "[" * 5000, "9" * 5000, '{"seal": 5}', "\x00\xff"])
def test_a_run_whose_record_is_none_is_damaged(name, content):
    made = Study(SETTINGS)
    place = alien(made, finished(made))
    (place / name).write_text(content)
    assert results(made).absence(made.run("dpo", "baseline", 2)).startswith("damaged (")
    tables.write(results(made))
    assert "baseline: seed 2 damaged (" in said(made)


def test_a_measurement_of_the_run_before_is_none():
    made = Study(SETTINGS)
    place = finish(made, finished(made), {"nll": ALIEN})
    path = place / "provenance.json"
    files.write_sealed(path, files.read_sealed(path) | {"dirty": True})  # trained again, and not evaluated
    _no_measurement_of_seed_2(made, "(evaluated before it was trained again)")


@pytest.mark.parametrize(
    "then, reason",
    [
        ({"temperature": 0.5}, "evaluated with other settings (temperature: 0.5 there, 1.0 here)"),
        ({"num_eval_generations": 8}, "evaluated with other settings (num_eval_generations: 8 there, 0 here)"),
        (None, "(evaluated by another version of discobeta)"),
    ],
)
def test_a_measurement_with_other_settings_than_the_studys_is_none(then, reason):
    made = Study(SETTINGS)
    place = finish(made, finished(made), {"nll": ALIEN})
    evaluation = files.read_sealed(place / "evaluation.json")
    evaluation["settings"] = None if then is None else evaluation["settings"] | then
    files.write_sealed(place / "evaluation.json", evaluation)
    _no_measurement_of_seed_2(made, reason)


def test_a_run_counts_whatever_its_config_says_of_evaluation_and_of_its_log():
    """What it was trained with is the study's; what it was measured with stands beside the measurement."""
    made = Study(SETTINGS)
    run = finished(made)
    before = made.config(run).replace(temperature=0.5, num_eval_generations=8, logging_steps=3, lam=0.5, plot_loss=True)
    place = write_run(before, measured(run))
    assert results(made).absence(run).startswith("evaluated with other settings (")
    evaluate(place, measured(run), config=made.config(run))
    assert results(made).absence(run) is None
    place = write_run(before.replace(pref_beta=0.7, output_dir="other"), measured(run))
    shutil.rmtree(run.directory)
    place.rename(run.directory)
    assert results(made).absence(run) == "stale (pref_beta: 0.7 there, 0.1 here)"


def _no_measurement_of_seed_2(made: Study, reason: str) -> None:
    tables.write(results(made))
    assert f"baseline: seed 2 {reason}" in said(made)
    metrics = pd.read_csv(made.directory / "tables" / "metrics.csv").set_index(["arm", "seed"])
    assert metrics.loc[[("baseline", 2)]].metric.tolist() == ["cost/seconds"]  # which it has cost nevertheless
    (diagram,) = [
        axes for axes in figures.reliability_diagram(results(made), "dpo").axes if axes.get_title() == "Baseline"
    ]
    assert "2 of 3 seeds" in diagram.texts[0].get_text()


HOSTILE = ["null", "5", "[]", '"text"', "{", "[" * 5000, '{"a": ' * 900 + "1" + "}" * 900, '{"seconds": "x"}']
WRONG = {
    "metrics.json": [*HOSTILE[:-2], '{"nll": "low"}', '{"nll": [1]}', '{"nll": true}', f'{{"x": {"9" * 400}}}'],
    "cost.json": [*HOSTILE, "{}", '{"seconds": null}', '{"seconds": -1}', '{"seconds": NaN}', '{"seconds": 1e999}'],
    "evaluation_cost.json": [*HOSTILE, "{}"],
    "log.jsonl": [
        "5\n", "[1]\n", "null\n", '"x"\n', '{"step": "one", "loss": 1}\n', '{"step": 1, "loss": "x"}\n',
        '{"step": 1, "loss": [1]}\n', '{"loss": 1}\n', '{"step": 1, "loss": 1}\n{"step": 1, "loss": 2}\n',
        f'{{"step": 1, "loss": {"9" * 5000}}}\n', f'{{"step": {10**30}, "loss": 1}}\n', "[" * 5000 + "\n", "\udcff\n",
    ],
    "examples.parquet": ["", "PAR1", "not parquet"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_file_of_the_wrong_shape_is_damage_whatever_its_record_says(name, content):
    made = Study(SETTINGS)
    place = finish(made, finished(made), {"nll": 0.5})
    rewrite(place, name, content.encode(errors="surrogateescape"))
    assert results(made).absence(made.run("dpo", "baseline", 2)).startswith("damaged (")


@pytest.mark.parametrize(
    "examples",
    [
        {"probability": ["high", "low"]}, {"probability": [[0.5], [0.6]]}, {"probability": [0.5, 1.5]},
        {"probability": [0.5, None]}, {"probability": [True, False]}, {"probability": [0.5], "mean_margin": [None]},
        {"noise": ["loud"]},
    ],
)  # fmt: skip
def test_examples_of_the_wrong_shape_are_damage(examples):
    made = Study(SETTINGS)
    place = finish(made, finished(made), None)
    evaluate(place, {"nll": 0.5}, examples)
    assert results(made).absence(made.run("dpo", "baseline", 2)).startswith("damaged (examples.parquet")


def test_damage_of_every_kind_leaves_a_report_of_the_rest():
    made = Study(SETTINGS | {"seeds": list(range(1, 1 + len(WRONG)))})
    for seed, (name, texts) in enumerate(WRONG.items(), start=1):
        finish(made, made.run("dpo", ARMS[1], seed), {"nll": 0.5, "accuracy": 0.7})
        rewrite(finish(made, made.run("dpo", ARMS[0], seed), {"nll": 0.5}), name, texts[0])
    report.write(results(made))
    assert said(made).count("damaged (") == len(WRONG)
    assert "baseline: seed 1 damaged (" in said(made)


def test_weights_that_were_changed_are_compared_with_nothing():
    made = Study(SETTINGS | {"arms": ["baseline", "disco-idle_beta-absent"], "seeds": [1, 2, 3]})
    for run in made.runs():
        finish(made, run, measured(run))
    for arm, seed in (("baseline", 1), ("disco-idle_beta-absent", 2)):
        (made.run("dpo", arm, seed).directory / "adapter" / "adapter_model.safetensors").write_bytes(b"weighty")
    frame = neutrality.neutrality_frame(results(made)).set_index("seed")
    assert frame.weights.to_dict() == {1: "twin damaged", 2: "damaged", 3: "equal"}
    assert frame.result[1] == frame.result[2] == "damaged"


def test_stale_runs_are_called_that_where_they_would_be_compared():
    arms = ["baseline", "disco-idle_beta-absent"]
    made = Study(SETTINGS | {"arms": arms, "seeds": [1, 2]})
    before = Study(SETTINGS | {"common": {"learning_rate": 1e-3}, "arms": arms, "seeds": [1, 2]})
    for run in made.runs():
        finish(before if (run.arm.name, run.seed) in ((arms[0], 1), (arms[1], 2)) else made, run, measured(run))
    frame = neutrality.neutrality_frame(results(made)).set_index("seed")
    assert frame.weights.to_dict() == {1: "twin stale", 2: "stale"}
    assert set(frame.result) == {"stale"}
    tables.write(results(made))
    assert "0 of 2 idle runs equal their twin byte for byte; stale: 2." in said(made, "neutrality.md")


def test_a_stale_proof_proves_nothing():
    arms = ["baseline", "disco-idle_beta-absent"]
    settings = SETTINGS | {"arms": arms, "seeds": [1], "idle_arms": "prove", "prove_steps": 5}
    made, before = Study(settings), Study(settings | {"prove_steps": 4})
    for run in made.runs():
        finish(before if run.proof and run.arm.is_idle else made, run, None if run.proof else measured(run))
    tables.write(results(made))
    grid = said(made, "dpo-grid.md")
    row = next(line for line in grid.splitlines() if "| baseline, idle Disco Head" in line)
    assert "proof stale" in row
    assert "disco-idle_beta-absent, proof: seed 1 stale (stop_after_steps: 4 there, 5 here)" in grid


def test_the_cost_of_a_run_that_does_not_count_is_in_no_sum():
    made = Study(SETTINGS)
    before = Study(SETTINGS | {"common": {"learning_rate": 1e-3}})
    alien(before, finished(made), cost={"seconds": 1e6})
    tables.write(results(made))
    cost = pd.read_csv(made.directory / "tables" / "cost.csv").set_index("work")
    assert cost.seconds["baseline"] == 10
    assert cost.jobs["baseline"] == 2
    assert cost.total_seconds["all of it"] == 5 * (10 + 1)
    assert "dpo, baseline (seed 2, stale)" in said(made, "cost.md")


def test_a_stale_run_made_no_numbers():
    made = Study(SETTINGS)
    before = Study(SETTINGS | {"common": {"learning_rate": 1e-3}})
    alien(before, finished(made), commit="f" * 40)
    assert provenance(results(made))["commit"] == "0123456789ab"


# --- what came with a run is text

MARKUP = "$\\nope{$ | <script> `a` *b* [c](d) _e_ &amp; \n# f"


def test_markup_in_a_runs_settings_is_text_in_every_format():
    made = Study(SETTINGS)
    before = Study(SETTINGS | {"common": {"learning_rate": 5e-4, "lora_target": MARKUP}})
    alien(before, finished(made))
    report.write(results(made))
    text = said(made)
    (line,) = [line for line in text.splitlines() if "seed 2 stale (lora" in line]
    shown = r"'\$\\\\nope{\$ \| &lt;script&gt; \`a\` \*b\* \[c\](d) \_e\_ &amp;amp; \\n# f'"
    assert f"lora_target: {shown} there" in line
    (line,) = [line for line in said(made, "dpo.tex").splitlines() if "seed 2 stale (lora" in line]
    assert r"'\$\textbackslash{}\textbackslash{}nope\{\$ \textbar{} $<$script$>$" in line
    assert (made.directory / "figures" / "reliability-dpo.svg").stat().st_size > 1000


def test_what_a_run_says_of_its_making_is_shown_if_it_looks_like_that():
    made = Study(SETTINGS | {"seeds": [1], "arms": ["baseline"]})
    place = finish(made, made.runs()[0], {"nll": 0.5})
    for wrong in (MARKUP, "$\\nope{$", "0" * 4000, 5, [], {"a": "1"}, None, True, "HEAD"):
        reseal(
            place, commit=wrong, versions={"discobeta": wrong}, machine={"kernels": "A B" if wrong == "HEAD" else wrong}
        )
        made_by = provenance(results(made))
        assert (made_by["commit"], made_by["version"]) == ("unknown", "unknown")
        assert made_by["kernels"] == "AVX2, unknown"  # the evaluation's
        reseal(place, versions=wrong, machine=wrong)
        assert provenance(results(made))["version"] == "unknown"
    figures.write(results(made))


def test_a_topic_is_called_what_it_is_called():
    made = Study(SETTINGS | {"seeds": [1], "arms": ["baseline"]})
    finish(made, made.runs()[0], {"nll": 0.5, "by_topic": {MARKUP: {"nll": 0.25}}})
    report.write(results(made))
    frame = pd.read_csv(made.directory / "tables" / "metrics.csv")
    assert frame.value[frame.metric == f"by_topic/{MARKUP}/nll"].tolist() == [0.25]


def test_markdown_and_latex_print_what_stands_there():
    assert markdown("a_b _c_ d__e * `f`") == r"a_b \_c\_ d\_\_e \* \`f\`"
    assert markdown("x\ny\t z\x00") == "x y z"
    assert markdown("R&D &lt; &#60;") == "R&D &amp;lt; &amp;#60;"
    assert escape("a\nb\x07 数é") == "a b  ??"


# --- seeds beyond what a float holds


def test_large_seeds_stay_exact_everywhere():
    seeds = [2**53 + 1, 2**63 - 1]
    made = study(seeds=seeds, stages=["dpo"], arms=ARMS)
    for run in made.runs():
        if (run.arm.name, run.seed) != ("baseline", 2**53 + 1):
            finish(made, run, {"nll": 0.5})
    report.write(results(made))
    metrics = pd.read_csv(made.directory / "tables" / "metrics.csv")
    assert set(metrics.seed) == set(seeds)
    assert "seeds 9007199254740993, 9223372036854775807, config" in said(made)
    assert "baseline: seed 9007199254740993 (not trained)" in said(made)
    assert "dpo: seed 9007199254740993." in said(made, "comparisons.md")
    assert (made.directory / "runs/dpo/baseline/seed-9223372036854775807/config.yaml").exists()
    settings = json.loads((made.directory / "runs/dpo/baseline/seed-9223372036854775807/provenance.json").read_text())
    assert settings["seed"] == 2**63 - 1


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        ([3], "seed 3"), ([1, 2], "seeds 1, 2"), ([1, 2, 3], "seeds 1–3"), ([21, 22, 23, 24, 30], "seeds 21–24, 30"),
        ([1, 3, 5], "seeds 1, 3, 5"), ([9, 1, 2, 3, 7, 8], "seeds 9, 1–3, 7, 8"),
    ],
)  # fmt: skip
def test_seeds_in_a_row_are_said_by_their_ends(seeds, text):
    assert enumerate_seeds(seeds) == text
