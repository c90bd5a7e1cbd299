"""Commands of one run: its inputs, training, measurement, and what is done with a finished one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from discobeta import launch
from discobeta.cli.words import command, is_main_process, overridable, run_command, run_config
from discobeta.design.config import RunConfig
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.yaml_text import parse_overrides
from discobeta.errors import UserError


def add_to(commands) -> None:
    sub = run_command(commands, "train", train, "train one run and measure it on its held-out rows")
    sub.add_argument("--no-evaluate", action="store_true", help="train only: do not measure, and draw no loss.png")
    sub.add_argument(
        "--processes", type=launch.process_count, default=1, metavar="N", help="train on N GPUs of this machine"
    )
    run_command(commands, "prepare", prepare, "tokenise the data of a run into its tokenized_path")
    run_command(commands, "reference", reference, "compute the reference pass of a dpo run into its reference_path")
    run_command(commands, "answers", answers, "sample the reference's answers for the evaluation of a dpo or ppo run")

    sub = command(commands, "evaluate", evaluate, "measure a finished run on its held-out rows")
    sub.add_argument("directory", type=Path, metavar="RUN_DIR")
    overridable(sub, "other settings of the evaluation")
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the run's base")
    sub.add_argument("--cache-dir", metavar="DIR", help="the hub's cache, if it is not the usual one")


def train(arguments: argparse.Namespace) -> int | None:
    config = run_config(arguments)
    if arguments.processes > 1 and "RANK" not in os.environ:
        return launch.train(config, arguments.processes, evaluate=not arguments.no_evaluate)
    from discobeta import record

    _train(config)
    if not is_main_process() or arguments.no_evaluate:
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
    config = run_config(arguments)
    if not config.tokenized_path:
        raise UserError("prepare needs tokenized_path: the folder to write")
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.model.pretrained import load_tokenizer

    for line in load_or_tokenise(config, load_tokenizer(config)).lines():
        print(line)


def reference(arguments: argparse.Namespace) -> None:
    config = run_config(arguments)
    if not config.reference_path:
        raise UserError("reference needs reference_path: the folder to write")
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.inputs import reference as reference_pass
    from discobeta.model.pretrained import load_tokenizer, use_deterministic_kernels

    use_deterministic_kernels(config)
    data = load_or_tokenise(config, load_tokenizer(config))
    reference_pass.load_or_compute(config, data.parts())


def answers(arguments: argparse.Namespace) -> None:
    config = run_config(arguments)
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
