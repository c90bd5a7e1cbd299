"""`discobeta <command>`: every command is files in, files out.

Bad input ends with one or two lines on standard error and exit status 2, without a traceback.
Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from discobeta import __version__, launch
from discobeta.design.arms import FLAGS, grid
from discobeta.design.config import RunConfig
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.yaml_text import parse_overrides
from discobeta.errors import UserError, first_line, lack_of_memory, shorten


def main(words: list[str] | None = None) -> int:
    mend_streams()
    settle_libraries()
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is held is let go
        arguments = parser().parse_args(words)
        status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `discobeta grid | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("discobeta: interrupted; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        _say(error)
    return 2


def settle_libraries() -> None:
    """What libraries are told before they are imported."""
    # compute nodes often have no network: never let an import wait for one
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft still calls what transformers has renamed; nothing that a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _say(error: Exception) -> None:
    """One line for whatever went wrong. What is no UserError was not foreseen, and its traceback can be asked for."""
    if os.environ.get("DISCOBETA_TRACEBACK"):
        traceback.print_exception(error)
    is_main = _is_main_process()
    if "RANK" in os.environ and not (is_main and isinstance(error, UserError)):
        time.sleep(1.5 if is_main else 3)  # another process has this to say, and what started them ends the others
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"no space left on the device ({error.filename or 'while writing'})"
    elif (amount := lack_of_memory(error)) is not None:
        text = f"out of memory{amount}"
    elif isinstance(error, OSError) and error.errno:
        text = first_line(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {shorten(' '.join(str(error).split()))}"
        text = f"{what} ({Path(place.filename).name}:{place.lineno}; DISCOBETA_TRACEBACK=1 shows the way there)"
    print(f"discobeta: {text}", file=sys.stderr)


def mend_streams() -> None:
    """Let no print fail: closed streams lead nowhere, and what a terminal cannot show becomes a question mark.

    A closed one must be opened again, or the next file that is opened would get its number and what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
        elif number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="discobeta", description="Ablation of Gaussian rewards and dynamic beta.")
    top.add_argument("--version", action="version", version=f"discobeta {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        return sub

    def add_run(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = add(name, command, help)
        sub.add_argument("run", metavar="RUN.yaml", help="flat run config; - reads standard input")
        sub.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="override keys")
        return sub

    def add_study(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = add(name, command, help)
        sub.add_argument("--configfile", nargs="+", required=True, metavar="STUDY.yaml", help="later files override")
        sub.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="override keys")
        return sub

    sub = add("grid", show_grid, "show the 48 cells: which are trained, which stand for another, which are refused")
    sub.add_argument("--json", action="store_true", help="as a list of objects")
    sub.add_argument("--stage", choices=STAGES, help="only one stage")

    sub = add("keys", show_keys, "explain the keys of a run, those that one stage reads, or those of a study")
    sub.add_argument("of", nargs="?", choices=(BASE_STAGE, *STAGES, "study"), help="a stage, or study")
    sub.add_argument("--json", action="store_true", help="as a list of objects")

    sub = add_run("train", train, "train one run and measure it on its held-out rows")
    sub.add_argument("--no-evaluate", action="store_true", help="train only: do not measure, and draw no loss.png")
    sub.add_argument(
        "--processes", type=launch.process_count, default=1, metavar="N", help="train on N GPUs of this machine"
    )
    add_run("prepare", prepare, "tokenise the data of a run into its tokenized_path")
    add_run("reference", reference, "compute the reference pass of a dpo run into its reference_path")
    add_run("answers", answers, "sample the reference's answers for the evaluation of a dpo or ppo run")

    sub = add("evaluate", evaluate, "measure a finished run on its held-out rows")
    sub.add_argument("directory", type=Path, metavar="RUN_DIR")
    sub.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="other settings of the evaluation"
    )
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the run's base")
    sub.add_argument("--cache-dir", metavar="DIR", help="the hub's cache, if it is not the usual one")

    sub = add("compare", compare, "compare two run directories byte for byte; exit status 1 if they differ")
    sub.add_argument("directories", type=Path, nargs=2, metavar="RUN_DIR")

    world = add("world", None, "the synthetic preference world").add_subparsers(required=True, metavar="PART")
    sub = world.add_parser("corpus", help="texts to train the base on, and its tokenizer")
    sub.set_defaults(command=world_corpus)
    sub.add_argument("--output", type=Path, required=True)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--sft-examples", type=int)
    sub.add_argument("--noise", choices=("heteroscedastic", "homoscedastic", "topic", "response"))
    sub.add_argument("--labels", choices=("probit", "logistic"))
    sub.add_argument("--flips", type=float, metavar="SHARE")
    sub.add_argument("--qualities", choices=("shared", "topic"))
    sub.add_argument("--own", action=argparse.BooleanOptionalAction, help="topics in the seed's own order")
    sub = world.add_parser("pairs", help="labelled pairs, sampled from a base")
    sub.set_defaults(command=world_pairs)
    sub.add_argument("--world", type=Path, required=True, help="folder that `world corpus` wrote")
    sub.add_argument("--base", type=Path, required=True, help="model that was trained on it")
    sub.add_argument("--output", type=Path, required=True)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--train", type=int)
    sub.add_argument("--eval", type=int, dest="evaluation", metavar="EVAL")
    sub.add_argument("--calibration", type=int)
    sub.add_argument(
        "--every-prompt", action=argparse.BooleanOptionalAction, help="held-out pairs go through all held-out prompts"
    )

    add_study("plan", plan, "list the runs of a study")
    sub = add_study("cost", cost, "estimate jobs, device-hours and memory of a study from measured rates")
    sub.add_argument("--measured", type=Path, metavar="TABLES", help="tables of a study that has run")
    sub.add_argument(
        "--memory", nargs="?", const="", metavar="SIZE",
        help="also work out the peak of a GPU's memory from the shapes, and whether it fits a card of SIZE (24GB)",
    )  # fmt: skip
    add_study("fetch", fetch, "download model and data of a study, for nodes without a network")
    for name, command, help in (
        ("report", report, "write tables and figures of a study from the runs that are there and count"),
        ("tables", tables, "write the tables of a study"),
        ("figures", figures, "write the figures of a study"),
    ):
        sub = add_study(name, command, help)
        sub.add_argument("--strict", action="store_true", help="write nothing unless every run counts")

    def add_published(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = add(name, command, help)
        sub.add_argument(
            "--hypotheses", type=Path, default=Path("config/hypotheses.yaml"), metavar="FILE", help="what is registered"
        )
        sub.add_argument(
            "--results", type=Path, default=Path("results/published/world"), metavar="DIR",
            help="holds a folder with metrics.csv and config.yaml of each study",
        )  # fmt: skip
        return sub

    sub = add_published("verdicts", verdicts, "judge registered hypotheses by the committed numbers of studies")
    sub.add_argument("--json", action="store_true", help="as a list of objects")
    sub.add_argument("--output", type=Path, metavar="DIR", help="also write verdicts.csv, .md and .tex there")
    sub.add_argument(
        "--simulate", type=int, metavar="N",
        help="instead, how often N simulated studies in which there is nothing to find are judged wrongly",
    )  # fmt: skip
    sub = add_published("paper", paper, "write every table, figure and number of a paper from committed numbers")
    sub.add_argument("--output", type=Path, default=Path("results/published/world/paper"), metavar="DIR")
    return top


def show_grid(arguments: argparse.Namespace) -> None:
    cells = grid((arguments.stage,) if arguments.stage else STAGES)
    if arguments.json:
        print(json.dumps([cell.row() for cell in cells], indent=1))
        return
    print("  ".join(("stage", *FLAGS)), " status", sep="")
    for cell in cells:
        switches = "  ".join(("yes" if cell.flags[name] else "-").center(len(name)) for name in FLAGS)
        shown = {"run": cell.arm, "same-as": f"same as {cell.arm}", "refused": f"refused: {cell.reason}"}[cell.status]
        status = f"run ({shown})" if cell.status == "run" else shown
        print(f"{cell.stage:5}  {switches}  {status}")


def show_keys(arguments: argparse.Namespace) -> None:
    from discobeta.design import keys

    found = keys.study_keys() if arguments.of == "study" else keys.run_keys(arguments.of)
    print(json.dumps([vars(key) for key in found], indent=1) if arguments.json else keys.as_lines(found))


def train(arguments: argparse.Namespace) -> int | None:
    config = _run_config(arguments)
    if arguments.processes > 1 and "RANK" not in os.environ:
        return launch.train(config, arguments.processes, evaluate=not arguments.no_evaluate)
    from discobeta import record

    _train(config)
    if not _is_main_process() or arguments.no_evaluate:
        return
    directory = Path(config.output_dir)
    if config.plot_loss and not (directory / "loss.png").exists():
        _draw_loss(directory)
    if _is_measurable(config) and record.measurement_fault(directory, config):
        _measure(directory, config.settings_of("evaluation"), config.trust_remote_code, config.cache_dir)


def _train(config: RunConfig) -> None:
    if config.stage == BASE_STAGE:
        from discobeta.inputs.base import train
    else:
        from discobeta.run.train import train
    train(config)


def _draw_loss(directory: Path) -> None:
    from discobeta.report.curves import loss_curve

    loss_curve(directory / "log.jsonl", directory / "loss.png")


def _is_measurable(config: RunConfig) -> bool:
    """Whether there is anything to measure a finished run on."""
    if config.stage == BASE_STAGE:
        return False
    if STAGES[config.stage].has_pairs:
        return bool(config.eval_dataset or config.val_size)
    return bool(config.num_eval_generations)


def prepare(arguments: argparse.Namespace) -> None:
    config = _run_config(arguments)
    if not config.tokenized_path:
        raise UserError("prepare needs tokenized_path: the folder to write")
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.model.pretrained import load_tokenizer

    for line in load_or_tokenise(config, load_tokenizer(config)).lines():
        print(line)


def reference(arguments: argparse.Namespace) -> None:
    config = _run_config(arguments)
    if not config.reference_path:
        raise UserError("reference needs reference_path: the folder to write")
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.inputs import reference as reference_pass
    from discobeta.model.pretrained import load_tokenizer, use_deterministic_kernels

    use_deterministic_kernels(config)
    data = load_or_tokenise(config, load_tokenizer(config))
    reference_pass.load_or_compute(config, data.parts())


def answers(arguments: argparse.Namespace) -> None:
    config = _run_config(arguments)
    if not config.reference_answers_path:
        raise UserError("answers needs reference_answers_path: the folder to write")
    if not config.num_eval_generations:
        raise UserError("answers needs num_eval_generations: how many prompts are answered")
    if not config.reference_samples:
        raise UserError(f"answers of stage {config.stage} needs best_of: how many responses to a prompt are ranked")
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.inputs.answers import sample_folder
    from discobeta.model.pretrained import load_tokenizer, use_deterministic_kernels

    use_deterministic_kernels(config)
    tokenizer = load_tokenizer(config)
    sample_folder(config, load_or_tokenise(config, tokenizer), tokenizer)


def evaluate(arguments: argparse.Namespace) -> None:
    settings = parse_overrides(arguments.set)
    _measure(arguments.directory, settings, arguments.trust_remote_code, arguments.cache_dir)


def _measure(directory: Path, settings: dict[str, Any], trust_remote_code: bool, cache_dir: str | None) -> None:
    from discobeta.run.evaluate import evaluate as evaluate_run

    measured = evaluate_run(directory, settings, trust_remote_code=trust_remote_code, cache_dir=cache_dir)
    shown = {name: value for name, value in measured.items() if not isinstance(value, dict)}
    print("  ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def compare(arguments: argparse.Namespace) -> int:
    from discobeta.report.compare import main

    return main(*arguments.directories)


def world_corpus(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import world

    names = ("seed", "sft_examples", "noise", "labels", "flips", "qualities", "own")
    world.write_corpus(arguments.output, **_world_settings(arguments, *names))


def world_pairs(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import world

    sizes = _world_settings(arguments, "train", "evaluation", "calibration", "every_prompt")
    world.write_pairs(arguments.world, arguments.base, arguments.output, seed=arguments.seed, **sizes)


def _world_settings(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What is given of the world, and a study's defaults for the rest."""
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if len(given) == len(names):  # as in the jobs of a study, which need not read what a study is
        return given
    from discobeta.design.study_file import World

    return {name: getattr(World(), name) for name in names} | given


def plan(arguments: argparse.Namespace) -> None:
    from discobeta.design import study

    print(study.plan(_study(arguments)))


def cost(arguments: argparse.Namespace) -> None:
    from discobeta.design import cost as study_cost

    card = study_cost.bytes_of(arguments.memory) if arguments.memory else None
    study = _study(arguments)
    print(study_cost.report(study, arguments.measured))
    if arguments.memory is not None:
        from discobeta.run import memory

        print("\n".join(memory.report(study, card)))


def fetch(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import fetch as study_fetch

    study_fetch.fetch(_study(arguments))


def report(arguments: argparse.Namespace) -> None:
    from discobeta import report as study_report

    results = _results(arguments, curves=True)
    study_report.write(results)
    print(f"tables: {results.study.tables_directory}   figures: {results.study.figures_directory}")


def tables(arguments: argparse.Namespace) -> None:
    from discobeta.report import tables as study_tables

    study_tables.write(_results(arguments, curves=False))


def figures(arguments: argparse.Namespace) -> None:
    from discobeta.report import figures as study_figures

    study_figures.write(_results(arguments, curves=True))


def verdicts(arguments: argparse.Namespace) -> None:
    from discobeta.files import write_text
    from discobeta.folders import claim
    from discobeta.report import error_rates, hypotheses

    registered = hypotheses.read(arguments.hypotheses)
    made_by = {"hypotheses": hypotheses.digest(arguments.hypotheses)}
    if arguments.simulate is not None:
        if arguments.simulate < 1:
            raise UserError(f"--simulate {arguments.simulate} should be at least 1")
        name, table = "error-rates", error_rates.error_rates(registered, arguments.simulate, made_by)
        rows = table.frame.to_dict("records")
    else:
        found = hypotheses.judge(registered, hypotheses.from_folder(arguments.results))
        name, table = "verdicts", hypotheses.verdicts_table(registered, found, made_by)
        rows = hypotheses.json_rows(registered, found)
    print(json.dumps(rows, indent=1, ensure_ascii=False) if arguments.json else table.markdown(), end="")
    if arguments.output:
        files = {f"{name}.{ending}": ending for ending in ("csv", "md", "tex")}
        claim(arguments.output, f"discobeta {name}", files)
        for file, ending in files.items():
            write_text(arguments.output / file, table.text(ending, name))


def paper(arguments: argparse.Namespace) -> None:
    from discobeta.report import hypotheses
    from discobeta.report import paper as study_paper

    registered, digest = hypotheses.read(arguments.hypotheses), hypotheses.digest(arguments.hypotheses)
    made = study_paper.write(arguments.results, registered, digest, arguments.output)
    counts = {"studies": made.studies, "tables": made.tables, "figures": made.figures, "numbers": made.macros}
    print(f"{', '.join(f'{len(of)} {name}' for name, of in counts.items())}: {arguments.output}")
    for name, ids in sorted(made.absent.items()):
        print(f"not there: {name}, asked for by {', '.join(ids)}")


def _results(arguments: argparse.Namespace, *, curves: bool):
    from discobeta.report.results import Results

    results = Results(_study(arguments), curves=curves, weights=arguments.strict)
    if arguments.strict:
        results.require_all()
    return results


def _study(arguments: argparse.Namespace):
    from discobeta.design.study import Study

    return Study.read(arguments.configfile, arguments.set)


def _run_config(arguments: argparse.Namespace) -> RunConfig:
    config, notes = RunConfig.read(arguments.run, arguments.set)
    for note in notes if _is_main_process() else ():
        print(f"discobeta: {note}", file=sys.stderr)
    return config


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    sys.exit(main())
