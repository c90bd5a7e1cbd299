"""Commands of one run: its inputs, training, measurement, and what is done with a finished one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from discobeta import devices, launch
from discobeta.cli.words import command, is_main_process, overridable, run_command, run_config
from discobeta.design.config import RunConfig
from discobeta.design.stages import BASE_STAGE, STAGES
from discobeta.design.yaml_text import parse_overrides
from discobeta.errors import UserError, first_line


def add_to(commands) -> None:
    sub = run_command(commands, "train", train, "train one run and measure it on its held-out rows")
    sub.add_argument("--no-evaluate", action="store_true", help="train only: do not measure, and draw no loss.png")
    sub.add_argument(
        "--processes", type=launch.process_count, default=1, metavar="N", help="train on N GPUs of this machine"
    )
    run_command(commands, "prepare", prepare, "tokenise the data of a run into its tokenized_path")
    run_command(commands, "reference", reference, "compute the reference pass of a dpo run into its reference_path")
    run_command(commands, "answers", answers, "sample the reference's answers for the evaluation of a run")

    sub = command(commands, "evaluate", evaluate, "measure a finished run on its held-out rows")
    sub.add_argument("directory", type=Path, metavar="RUN_DIR")
    overridable(sub, "other settings of the evaluation; eval_dataset=NAME: of other rows, in a folder of its own")
    sub.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where the measurements go; default RUN_DIR, and of other rows RUN_DIR/evaluations/NAME",
    )  # fmt: skip
    _readable(sub)

    sub = command(
        commands, "merge", merge, "write a finished run as a plain model: LoRA merged, read by transformers alone"
    )
    sub.add_argument("directory", type=Path, metavar="RUN_DIR")
    sub.add_argument("output", type=Path, metavar="OUT", help="a folder that is not there yet")
    sub.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; default: that of the base's files")
    _readable(sub)

    sub = command(
        commands, "samples", samples, "show a policy's responses beside the reference's, or a reward model's scores"
    )
    sub.add_argument("directory", type=Path, metavar="RUN_DIR")
    sub.add_argument("--prompt", nargs="+", default=[], action="extend", metavar="TEXT", help="what is to be answered")
    sub.add_argument(
        "--response", nargs="+", default=[], action="extend", metavar="TEXT",
        help="of a reward model: what is to be scored, each as a response to the one --prompt, or one to each",
    )  # fmt: skip
    sub.add_argument("--file", type=Path, metavar="FILE", help="prompts: lines of a text, or rows of a .jsonl")
    sub.add_argument("--chat", action="store_true", help="a --prompt, or line, is a user's turn for the chat template")
    sub.add_argument("--count", type=int, metavar="N", help="how many prompts; default 5, or all that are given")
    sub.add_argument("--reward-model", metavar="DIR", help="score the responses by this one")
    sub.add_argument("--json", action="store_true", help="as JSON")
    overridable(sub, "how is sampled: temperature, top_p, top_k, max_new_tokens, seed, generations_per_prompt")
    _readable(sub)


def _readable(sub: argparse.ArgumentParser) -> None:
    """Whose word counts when a finished run is read."""
    sub.add_argument("--base", metavar="DIR", help="the run's base, where it is not found; compared by its hash")
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the run's base")
    sub.add_argument("--cache-dir", metavar="DIR", help="the hub's cache, if it is not the usual one")


def _reader(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("base", "trust_remote_code", "cache_dir")}


def train(arguments: argparse.Namespace) -> int | None:
    config = run_config(arguments)
    devices.claim(arguments.processes)
    if arguments.processes > 1 and "RANK" not in os.environ:
        return launch.train(config, arguments.processes, evaluate=not arguments.no_evaluate)
    from discobeta import record

    _train(config)
    if not is_main_process():
        return
    if config.stage != BASE_STAGE:
        _write_card(config.output_dir)
    if arguments.no_evaluate:
        return
    directory = Path(config.output_dir)
    if config.plot_loss and not (directory / "loss.png").exists():
        _draw_loss(directory)
    if _is_measurable(config) and record.measurement_fault(directory, config):
        reader = {"trust_remote_code": config.trust_remote_code, "cache_dir": config.cache_dir}
        _measure(directory, config.settings_of("evaluation"), **reader)


def _train(config: RunConfig) -> None:
    if config.stage == BASE_STAGE:
        from discobeta.inputs.base import train
    else:
        from discobeta.run.train import train
    train(config)


def _write_card(directory: str) -> None:
    """What describes a run may fail, and the run is finished all the same."""
    from discobeta.run import card

    try:
        card.write(directory)
    except (UserError, OSError) as error:
        print(f"discobeta: no model card was written: {first_line(error)}", file=sys.stderr)


def _draw_loss(directory: Path) -> None:
    from discobeta.report.loss_curve import loss_curve

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
    devices.claim()
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.inputs import reference as reference_pass
    from discobeta.model.kernels import choose_kernels
    from discobeta.model.pretrained import load_tokenizer

    choose_kernels(config)
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
    devices.claim()
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.inputs.answers import sample_folder
    from discobeta.model.kernels import choose_kernels
    from discobeta.model.pretrained import load_tokenizer

    choose_kernels(config)
    tokenizer = load_tokenizer(config)
    sample_folder(config, load_or_tokenise(config, tokenizer), tokenizer)


def evaluate(arguments: argparse.Namespace) -> None:
    settings = parse_overrides(arguments.set)
    devices.claim()
    _measure(arguments.directory, settings, output=arguments.output, **_reader(arguments))


def _measure(directory: Path, settings: dict[str, Any], *, output: Path | None = None, **reader: Any) -> None:
    from discobeta.run import elsewhere
    from discobeta.run.evaluate import evaluate as evaluate_run

    measured = evaluate_run(directory, settings, output=output, **reader)
    shown = {name: value for name, value in measured.items() if not isinstance(value, dict)}
    print("  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if (where := elsewhere.output_of(directory, output, elsewhere.rows_of(settings))) != directory:
        print(f"written to {where}; no table reads it")


def merge(arguments: argparse.Namespace) -> None:
    from discobeta.run.merge import merge as merge_run

    made = merge_run(arguments.directory, arguments.output, dtype=arguments.dtype, **_reader(arguments))
    print(f"{arguments.output}: {'written' if made else 'holds this model already'}")


def samples(arguments: argparse.Namespace) -> None:
    from discobeta.run import samples as run_samples

    told = run_samples.samples(
        arguments.directory,
        run_samples.asked_for(arguments.prompt, arguments.response, arguments.file, chat=arguments.chat),
        count=arguments.count,
        settings=parse_overrides(arguments.set),
        reward_model=arguments.reward_model,
        **_reader(arguments),
    )
    if arguments.json:
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        print(run_samples.as_text(told))
