"""How one run went: `loss.png` of its directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from discobeta.files import replacing
from discobeta.report.curves import label_steps
from discobeta.report.results import read_log
from discobeta.report.style import LOOKS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curve(log_path: str | Path, png_path: str | Path) -> None:
    """How one run went: its loss over steps, training and, if there is one, held-out; of ppo, reward and KL."""
    log = read_log(Path(log_path))
    with new_figure(4.5, 2.8) as figure:
        is_rollouts = {"reward", "kl_per_sequence"} <= set(log)
        draw: Callable[[Figure, pd.DataFrame], None] = _draw_rollouts if is_rollouts else _draw_loss
        draw(figure, log)
        with replacing(png_path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)


def _draw_rollouts(figure: Figure, log: pd.DataFrame) -> None:
    labels = {"reward": "Score by the\nreward model ↑", "kl_per_sequence": "KL to reference\n(nats per response)"}
    panels = figure.subplots(len(labels), 1, sharex=True)
    for axes, (name, label), look in zip(panels, labels.items(), LOOKS[2:], strict=False):
        _draw_column(axes, log, name, color=look.colour)
        axes.set_ylabel(label)
    label_steps(panels[-1], "Update")
    figure.align_ylabels()


def _draw_loss(figure: Figure, log: pd.DataFrame) -> None:
    axes = figure.subplots()
    for name, label, look in (("loss", "training", LOOKS[2]), ("eval_loss", "held-out", LOOKS[1])):
        if name in log:
            _draw_column(axes, log, name, **look.of_line, label=label)
    axes.set(xlabel="Optimiser step", ylabel="Loss (nats) ↓")
    if axes.lines:
        figure.legend(loc="outside upper right", ncols=2)


def _draw_column(axes: Axes, log: pd.DataFrame, name: str, **style) -> None:
    values = log[["step", name]].dropna()
    axes.plot(values["step"], values[name], marker="o" if len(values) < 20 else None, markersize=3, **style)
