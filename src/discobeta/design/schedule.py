"""The order in which rows are trained on, and how many steps that makes.

The order is a function of (seed, epoch, step) and of nothing else, so a resumed run needs no state
to go on where it was. No torch here: what a study will take is counted by it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError
from discobeta.seeds import derive


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimiser step sees, and which process.

    One step takes `rows_per_step` rows of the epoch's permutation, which the processes share. The step's gradient is
    the mean over its rows, whatever the forward passes that it is cut into.
    """

    rows: int
    rows_per_step: int  # per_device_train_batch_size * gradient_accumulation_steps * processes
    processes: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        usable = self.rows - self.rows % self.processes  # each process gets the same number of rows
        return -(-usable // self.rows_per_step)

    def rows_of(self, steps: int) -> int:
        """How many rows the first `steps` steps see, each as often as it comes: an epoch's last step may be short."""
        epochs, within = divmod(steps, self.steps_per_epoch)
        return epochs * (self.rows - self.rows % self.processes) + within * self.rows_per_step

    def step_rows(self, step: int) -> np.ndarray:
        """Row numbers of optimiser step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _permutation(self.rows, self.seed, epoch)[: self.rows - self.rows % self.processes]
        return order[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def share(self, rows: np.ndarray, places: np.ndarray, process: int) -> np.ndarray:
        """Those of `rows` that one process takes; the longest are dealt out first, so all have much the same to do."""
        return rows[np.argsort(-places[rows], kind="stable")][process :: self.processes]


@dataclass(frozen=True)
class EndlessSchedule(Schedule):
    """The epochs' permutations one after the other, cut into steps that are all full."""

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / self.rows_per_step

    def rows_of(self, steps: int) -> int:
        return steps * self.rows_per_step

    def step_rows(self, step: int) -> np.ndarray:
        places = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        epochs, within = np.divmod(places, self.rows)
        orders = {epoch: _permutation(self.rows, self.seed, epoch) for epoch in np.unique(epochs).tolist()}
        return np.array([orders[epoch][row] for epoch, row in zip(epochs.tolist(), within.tolist(), strict=True)])


@lru_cache(maxsize=1)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive(seed, "data order", epoch)).permutation(rows)


def schedule_of(config: RunConfig, rows: int, processes: int) -> Schedule:
    """The schedule of a run on `rows` rows, shared by `processes` processes. A step on prompts fills the buffer."""
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if not STAGES[config.stage].has_pairs:
        return EndlessSchedule(rows, size * config.ppo_buffer_size, processes, config.seed)
    if rows < processes:
        raise UserError(f"{rows} training pairs cannot be shared by {processes} processes")
    return Schedule(rows, size, processes, config.seed)


def total_steps(config: RunConfig, schedule: Schedule) -> int:
    """Steps of the whole run, whether or not it stops before them."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(min(config.num_train_epochs * schedule.steps_per_epoch, 2.0**62))
