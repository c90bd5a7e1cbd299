"""Commands of the synthetic world."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from discobeta.cli.words import command


def add_to(commands) -> None:
    parts = command(commands, "world", None, "the synthetic preference world").add_subparsers(
        required=True, metavar="PART"
    )
    sub = command(parts, "corpus", corpus, "texts to train the base on, and its tokenizer")
    sub.add_argument("--output", type=Path, required=True)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--sft-examples", type=int)
    sub.add_argument("--noise", choices=("heteroscedastic", "homoscedastic", "topic", "response"))
    sub.add_argument("--labels", choices=("probit", "logistic"))
    sub.add_argument("--flips", type=float, metavar="SHARE")
    sub.add_argument("--qualities", choices=("shared", "topic"))
    sub.add_argument("--own", action=argparse.BooleanOptionalAction, help="topics in the seed's own order")

    sub = command(parts, "pairs", pairs, "labelled pairs, sampled from a base")
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


def corpus(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import world

    names = ("seed", "sft_examples", "noise", "labels", "flips", "qualities", "own")
    world.write_corpus(arguments.output, **_settings(arguments, *names))


def pairs(arguments: argparse.Namespace) -> None:
    from discobeta.inputs import world

    sizes = _settings(arguments, "train", "evaluation", "calibration", "every_prompt")
    world.write_pairs(arguments.world, arguments.base, arguments.output, seed=arguments.seed, **sizes)


def _settings(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What is given of the world, and a study's defaults for the rest."""
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if len(given) == len(names):  # as in the jobs of a study, which need not read what a study is
        return given
    from discobeta.design.study_file import World

    return {name: getattr(World(), name) for name in names} | given
