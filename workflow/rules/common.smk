# What the rules share. Every decision about runs is made by discobeta.design.study; here are only paths.
import json
import os
import shlex
import sys
from functools import cache
from pathlib import Path

import yaml
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import update_config

SOURCE = Path(os.path.relpath(Path(workflow.basedir).parent / "src"))
sys.path.insert(0, str(SOURCE.resolve()))

from discobeta.closure import code
from discobeta.design.yaml_text import as_written, read_yaml
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.errors import UserError
from discobeta.files import sha256
from discobeta.identity import CONFIGS, TOKENIZER, WEIGHTS
from discobeta.design.study import Study, as_text
from discobeta.report import outputs, retrained

if set("{}") & set(f"{SOURCE} {SOURCE.resolve()} {sys.executable}"):
    raise WorkflowError(f"{SOURCE.resolve()}: Snakemake takes braces in paths for wildcards: move the clone")


def as_meant(value):
    """What `--config seeds=[1]` says: Snakemake leaves the values inside lists and mappings as texts."""
    if isinstance(value, dict):
        return {key: as_meant(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_meant(inner) for inner in value]
    return as_written(value) if isinstance(value, str) else value


try:
    for path in workflow.overwrite_configfiles:  # which Snakemake reads as YAML does: of two equal keys the last
        read_yaml(path)
    said = as_meant(workflow.config_settings.config or {})
    if retrained.MEANT in said:  # a word to this command, and no setting of a study
        config.pop(retrained.MEANT, None)
    is_meant = said.pop(retrained.MEANT, False) is True
    update_config(config, said)
    study = Study(config, where=", ".join(map(str, workflow.overwrite_configfiles)) or "config/config.yaml")
except UserError as error:
    raise WorkflowError(str(error)) from None

# Finished runs of other settings, which would be lost. A plan says so; `onstart` in the Snakefile refuses, once it is
# known which jobs are to run.
LOST = {} if is_meant or not workflow.is_main_process else retrained.retrained(study)
if LOST:
    logger.warning(retrained.refusal(study, LOST))

# The code that runs is the code that the rules name as their input, whatever else is installed; without
# conda it runs in the Python that runs snakemake, whatever `python` is on the PATH.
EXPORTS = f"PYTHONPATH={shlex.quote(str(SOURCE.resolve()))}"
if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
    EXPORTS += f" PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def devices():
    """The GPUs that jobs on this machine share, `0,1`: as many as `--resources gpu=` says, of those that this process
    may see; each job claims its own (discobeta.devices). None where that is a scheduler's business."""
    wanted = workflow.global_resources.get("gpu")
    wanted = getattr(wanted, "value", wanted)
    if not isinstance(wanted, int) or not workflow.is_main_process:
        return ""
    listed = os.environ.get("DISCOBETA_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",") if name.strip()] if listed else list(map(str, range(wanted)))
    if len(names) < wanted:
        raise WorkflowError(f"--resources gpu={wanted}, and {len(names)} may be seen: {listed}")
    return ",".join(names[:wanted])


if found := devices():
    EXPORTS += f" DISCOBETA_DEVICES={shlex.quote(found)}"
shell.prefix(f"export {EXPORTS}; ")

ENVIRONMENT = f"../../envs/{study.environment}.yaml"
LOGS = study.directory / "logs"
RUN = study.directory / "runs"
PROCESSES = f" --processes {study.gpus_per_run}" if study.gpus_per_run > 1 else ""
CACHE = f" --cache-dir {shlex.quote(cache_dir)}" if (cache_dir := study.model.get("cache_dir")) else ""
DATA = study.shared_directory / "data"


wildcard_constraints:
    stage="[^/]+",
    arm="[a-z_-]+",
    variant="(/[A-Za-z0-9][A-Za-z0-9=,._+-]*)?",
    seed="[0-9]+",
    proof="(/proof)?",
    draw="[a-z0-9-]+",


def local_files(*names):
    """Those of the comma-separated names that are files here: hub data cannot be watched, a file can."""
    words = [word.strip() for name in names if name for word in name.split(",")]
    return [word for word in words if Path(word).is_file()]


def base_files():
    """What must be there before anything reads the base: of a local one, what is read; a hub model is found by name."""
    if study.own_worlds:
        return lambda wildcards: [study.base_of(draw_of(wildcards)) / "provenance.json"]
    if study.sft:
        return [study.base_of(study.draws()[0]) / "provenance.json"]
    folders = [study.model.get(key) for key in ("model_name_or_path", "adapter_name_or_path")]
    found = [path for folder in folders if folder and os.path.isdir(folder) for path in sorted(Path(folder).iterdir())]
    return [path for path in found if path.suffix in WEIGHTS or path.name in (*CONFIGS, *TOKENIZER)]


def draw_of(wildcards):
    """The draw of a job that has one, or a seed."""
    return wildcards.get("draw") or study.draw(int(wildcards.get("seed", study.seeds[0])))


BASE = base_files()

# What stands in the folders of worlds and bases, one for all seeds or one for each.
WORLD = study.shared_directory / "world" / ("seed-{seed}" if study.own_worlds else "")
BASE_FOLDER = study.shared_directory / "base" / ("seed-{seed}" if study.own_worlds else "")


def log_of(step):
    """Of a step that is done once, or once for each seed."""
    return LOGS / step / "seed-{seed}.log" if study.own_worlds else LOGS / f"{step}.log"


def corpus_files(wildcards):
    """An input function: what the base is trained on."""
    settings = study.base_settings(draw_of(wildcards))
    if study.world:
        return [settings["dataset"], f"{settings['tokenizer_name']}/tokenizer.json"]
    return local_files(settings.get("dataset"))


def row_files(data):
    """An input function: the files of one draw's rows; `data` gives their run keys."""

    def files(wildcards):
        settings = data(wildcards.draw)
        names = [settings.get(key) for key in ("dataset", "eval_dataset", "calibration_dataset")]
        return [name for name in names if name] if study.world else local_files(*names)

    return files


def run_of(stage, wildcards):
    proof, variant = bool(wildcards.get("proof")), wildcards.variant.removeprefix("/")
    return study.run(stage, wildcards.arm, int(wildcards.seed), proof=proof, variant=variant)


def shared_files(stage):
    """An input function: what a run of `stage` reads of its draw, and of other runs."""

    def files(wildcards):
        run = run_of(stage, wildcards)
        found = [study.rows_of(run) / "tokens.json"]
        if STAGES[stage].reference_pass:
            found.append(study.reference(study.draw(run.seed)) / "reference.json")
        upstream = [other.directory / "provenance.json" for read in study.upstream(run).values() for other in read]
        return [*found, *upstream]

    return files


def answers_files(wildcards):
    """An input function: what an evaluation reads beside its run."""
    run = run_of(wildcards.stage, wildcards)
    truth = study.config(run).ground_truth
    truths = [truth] if study.world and truth not in ("none", "world") else []
    return [*truths, *([study.answers(run) / "answers.json"] if study.is_answered(run) else [])]


# Snakemake compares the params of a job with those that it was last done with, except those that ask for `threads`:
# a function of that is taken for derived. So each job has `code` and `decides`, which say what its outcome depends on,
# and beside them all of its settings.


def run_decides(stage):
    """A params function: the resolved settings on which the outcome of one training run depends, as text."""
    return lambda wildcards: as_text(study.config(run_of(stage, wildcards)).settings_of("training"))


def run_settings(stage):
    """A params function: the run YAML of one run, resolved, as text; not compared."""
    return lambda wildcards, threads: as_text(study.config(run_of(stage, wildcards)).resolved())


def decides_of(make):
    """A params function: the resolved settings on which the outcome of a shared step depends, as text.

    make: a function of the step's wildcards.
    """
    return lambda wildcards: as_text(study.decides_shared(make(**wildcards)))


def settings_of(make):
    """A params function: the run YAML of a shared step, resolved, as text; not compared. In a text that stands in a
    rule itself, Snakemake would take braces for wildcards."""
    return lambda wildcards, threads: as_text(study.resolved(make(**wildcards)))


def evaluation_of(wildcards):
    """A params function: what the outcome of an evaluation depends on, the settings as words of `--set`."""
    seed = int(wildcards.seed) if study.own_worlds else study.seeds[0]
    return measured_by(wildcards.stage, wildcards.arm, wildcards.variant.removeprefix("/"), seed)


@cache
def measured_by(stage, arm, variant, seed):
    settings = study.config(study.run(stage, arm, seed, variant=variant)).settings_of("evaluation")
    words = " ".join(shlex.quote(f"{key}={json.dumps(value)}") for key, value in settings.items())
    return {"code": code("evaluate", stage), "settings": words}


def study_text(wildcards):
    """A params function: the study's config, as text."""
    return yaml.safe_dump(study.settings, sort_keys=False, allow_unicode=True)


def results():
    """What tables and figures read: a whole run is measured, a proof only trained."""
    return [run.directory / ("provenance.json" if run.proof else "metrics.json") for run in study.runs()]


def records():
    """The records of all runs: with `results`, what is missed when the folder of a run is not there any more."""
    return [run.directory / "provenance.json" for run in study.runs()]


def in_report(path, output, category, labels):
    """The file of a table or figure that the HTML report shows, with the text beside it."""
    return report(path, category=category, labels=labels, caption=f"../report/{output.row.caption}.rst")


def made_by(step, made):
    """What the outcome of `tables` or `figures` depends on, but for the study: what there is, and what makes it."""
    makers = {output.name: output.row.maker for output in made}
    return {"code": code(step, makers=tuple(makers.values())), "makers": makers}


def beside_the_page():
    """What the page of a study has in it beside what its code says: style, script, texts beside tables and figures."""
    texts = Path(workflow.basedir) / "report"
    found = [*sorted((SOURCE / "discobeta" / "report").glob("page.*s")), *sorted(texts.glob("*.rst"))]
    return {path.name: sha256(path)[:8] for path in found}
