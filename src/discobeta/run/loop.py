"""The one optimisation loop: step, log, checkpoint, resume.

Nothing here knows a stage or a flag. What happens at step n is a function of the weights, the
optimiser's state and n: the data order, the dropout masks and what a policy samples are derived from
(seed, n) and not from a stream that runs on, so a run that was killed and resumed is the run that was
not, bit for bit on a CPU. Losses are means over the rows of an optimiser step, over all processes.

A step asks the stage for its work (`Stage.collect`): in rm and dpo one optimiser step on the next
pairs, in ppo the responses that the policy gives now and several optimiser steps on them.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections import Counter
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from discobeta import folders, progress
from discobeta.data.batches import Pairs, cut
from discobeta.design.config import RunConfig
from discobeta.design.schedule import Schedule, total_steps
from discobeta.design.stages import STAGES
from discobeta.errors import TRAINING_MEMORY, UserError, enough_memory
from discobeta.files import replacing, write_text, writing_error
from discobeta.lock import Hold
from discobeta.method.optim import clip_gradients, optimizer_of
from discobeta.method.stage import Stage
from discobeta.seeds import restart_global_stream


class Means:
    """Sums and counts of statistics, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, values in statistics.items():
            total = values.double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def total(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Name -> (sum, count) over all processes."""
        if not self.sums:
            return {}
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64, device=accelerator.device)
        packed = torch.stack([torch.stack([total.to(accelerator.device) for total in self.sums.values()]), counts])
        return dict(zip(self.sums, accelerator.reduce(packed, "sum").T.tolist(), strict=True))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes; starts anew."""
        total = self.total(accelerator)
        self.__init__()
        return {name: value / count for name, (value, count) in total.items()}

    def restore(self, total: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Go on from `total`, which one process takes over for all."""
        mine = accelerator.is_main_process
        for name, (value, count) in total.items():
            self.sums[name] = torch.tensor(value * mine, dtype=torch.float64).to(accelerator.device)
            self.counts[name] = int(count) * mine


class Log:
    """One JSON object a line. log.jsonl holds no times, so that equal runs have equal logs; speed.jsonl does.

    The file is a new one, which stays open: a copy of the run whose place this one has taken has the earlier
    file open, and what it may still write is not in this one.
    """

    def __init__(self, path: Path, upto_step: int, enabled: bool):
        """Keeps the lines of steps up to `upto_step` of a run that is resumed, and drops later ones."""
        self.path, self.stream = path, None
        if not enabled:
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() and upto_step else []
        write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= upto_step))
        self.stream = path.open("a", buffering=1, encoding="utf-8")  # a line at a time

    def write(self, values: dict[str, float]) -> None:
        if self.stream:
            try:
                self.stream.write(json.dumps(values) + "\n")
            except OSError as error:
                raise writing_error(self.path, error) from None

    def close(self) -> None:
        if self.stream:
            with suppress(OSError):  # of a line that could not be written, which has been said
                self.stream.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a process that was killed while writing it
        return math.inf


@enough_memory("training", TRAINING_MEMORY)
def fit(
    stage: Stage,
    train: Pairs,
    held_out: Pairs | None,
    config: RunConfig,
    accelerator: Accelerator,
    hold: Hold | None,
    identity: str,
) -> dict[str, float]:
    """Train `stage` in place. Returns what it cost: seconds, rows and tokens, over all attempts.

    hold: of the run's directory, in the process that writes it.
    identity: of data, base, settings and code; only a checkpoint of the same identity is resumed.
    """
    from transformers import get_scheduler

    directory = Path(config.output_dir)
    schedule = stage.schedule(train, accelerator.num_processes)
    steps = total_steps(config, schedule)
    stop = min(steps, config.stop_after_steps or steps)
    stage.to(accelerator.device)
    groups = stage.parameter_groups()
    optimizer = optimizer_of(groups, config)
    warmup = config.warmup_steps or math.ceil(steps * config.warmup_ratio)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps)
    means = Means()
    saver = Checkpoints(directory / "checkpoints", hold, identity, stage, optimizer, scheduler, means)
    done, spent = saver.resume(config, accelerator)
    module, optimizer = accelerator.prepare(stage, optimizer)
    log, speed = (Log(directory / name, done, hold is not None) for name in ("log.jsonl", "speed.jsonl"))
    module.train()
    started = logged = time.monotonic()
    counts = Counter(rows=spent.get("rows", 0), tokens=spent.get("tokens", 0))
    tokens_logged = counts["tokens"]

    def cost() -> dict[str, float]:
        return {"seconds": spent.get("seconds", 0.0) + time.monotonic() - started, **counts}

    what, unit = f"{config.stage} {config.arm.name}", STAGES[config.stage].step
    if warmup >= steps:
        accelerator.print(f"all {steps} steps are warm-up: the learning rate never reaches {config.learning_rate:g}")
    bar = progress.bar(stop, what, unit, done=done, shown=accelerator.is_main_process)
    with bar, closing(log), closing(speed):
        for step in range(done, stop):
            work = stage.collect(step, train, schedule, accelerator)
            means.add(work.statistics)
            counts["rows"] += work.rows
            counts["tokens"] += work.tokens
            number = 0
            for passes in work.minibatches:
                for indices in passes:
                    place = (step, number, accelerator.process_index)
                    restart_global_stream(accelerator.device, config.seed, "dropout", *place)
                    number += 1
                    batch = work.material.batch(indices).to(accelerator.device)
                    with nullcontext() if indices is passes[-1] else accelerator.no_sync(module):
                        loss, statistics = module(batch)
                        # DDP averages over processes; this makes the gradient the mean over the minibatch's rows
                        accelerator.backward(loss.sum() * (accelerator.num_processes / work.minibatch_rows))
                    means.add(statistics)
                norms = clip_gradients(groups)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)  # nothing holds them while a policy is sampled from
                stage.end_step(accelerator)
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            now = step + 1
            bar.update()

            if now % config.logging_steps == 0 or now == stop:
                values = {"step": now, "epoch": now / schedule.steps_per_epoch, **means.take(accelerator)}
                values |= {"learning_rate": learning_rate}
                values |= {
                    f"{'' if name == 'model' else name + '_'}grad_norm": norm.item() for name, norm in norms.items()
                }
                if not all(map(math.isfinite, values.values())):
                    raise UserError(
                        f"training diverged at step {now} (loss {values['loss']}); a lower learning_rate may help. "
                        f"The log up to here is {log.path}"
                    )
                log.write(values)
                seconds, tokens = time.monotonic() - logged, counts["tokens"] - tokens_logged
                logged, tokens_logged = logged + seconds, counts["tokens"]
                pace = {"seconds": seconds, "tokens_per_second": tokens / seconds}
                speed.write({"step": now, **pace})
                accelerator.log(values | pace, step=now)
                bar.set_postfix({name: f"{values[name]:.4g}" for name in stage.shown})
            if held_out is not None and _is_due(now, config, schedule, stop):
                values = {"step": now, **held_out_means(module, stage, held_out, config, accelerator)}
                log.write(values)
                accelerator.log(values, step=now)
            if config.save_steps and now % config.save_steps == 0 and now < stop:
                saver.save(now, cost(), accelerator)
    saver.check_finite(stop)  # the last update is in no loss
    stage.eval()
    return cost()


@enough_memory("evaluation", "per_device_eval_batch_size or cutoff_len")
@torch.no_grad()
def held_out_means(
    module: torch.nn.Module, stage: Stage, held_out: Pairs, config: RunConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Mean loss and accuracy on held-out pairs, each process taking every n-th batch."""
    module.eval()
    means = Means()
    places, size = held_out.places, config.per_device_eval_batch_size
    passes = cut(np.arange(len(held_out)), places, config.tokens_per_pass, size)
    # a process with fewer batches than another repeats nothing: it adds zero pairs
    for indices in passes[accelerator.process_index :: accelerator.num_processes]:
        statistics = stage(held_out.batch(indices).to(accelerator.device))[1]
        means.add({name: statistics[name] for name in ("loss", "accuracy")})
    if not means.sums:
        means.add({name: torch.zeros(0, device=accelerator.device) for name in ("loss", "accuracy")})
    module.train()
    return {f"eval_{name}": value for name, value in means.take(accelerator).items()}


def _is_due(step: int, config: RunConfig, schedule: Schedule, last: int) -> bool:
    if config.eval_strategy == "no":
        return False
    every = schedule.steps_per_epoch if config.eval_strategy == "epoch" else config.eval_steps or config.logging_steps
    return step % every == 0 or step == last


def read_whole(path: Path) -> dict[str, Any] | None:
    """A checkpoint, each part of which has the checksum that stands beside it (torch.load asks for none); else None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of a file that is no archive, or in which a bit has changed where lengths and names stand
        return None
    return state if isinstance(state, dict) and "identity" in state else None


class Checkpoints:
    """The latest state of an unfinished run: `checkpoints/step-<n>.pt`, whole or not there."""

    def __init__(
        self, folder: Path, hold: Hold | None, identity: str, stage: Stage, optimizer, scheduler, means: Means
    ):
        self.folder = folder
        self.hold = hold
        self.identity = identity
        self.stage = stage
        self.trained = {name: weight for name, weight in stage.named_parameters() if weight.requires_grad}
        self.optimizer, self.scheduler, self.means = optimizer, scheduler, means

    def save(self, step: int, spent: dict[str, float], accelerator: Accelerator) -> None:
        means = self.means.total(accelerator)
        if self.hold is None:
            return
        self.hold.confirm()
        self.check_finite(step)
        state = {
            "identity": self.identity,
            "step": step,
            "spent": spent,
            "weights": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "means": means,
            "stage": self.stage.state(),
        }
        earlier = self.paths()
        with replacing(self.folder / f"step-{step}.pt") as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's own word for a write that failed
                raise UserError(f"cannot write a checkpoint to {self.folder} (is the disk full?): {error}") from None
        for path in earlier:
            path.unlink(missing_ok=True)

    def check_finite(self, step: int) -> None:
        """Refuse weights that are no finite numbers."""
        if bad := [name for name, weight in self.trained.items() if not weight.isfinite().all()]:
            what = f"{len(bad)} of {len(self.trained)} weights hold numbers that are not finite, {bad[0]} first"
            raise UserError(f"training diverged at step {step} ({what}); a lower learning_rate may help")

    def paths(self) -> list[Path]:
        numbered = {path: path.stem.partition("-")[2] for path in self.folder.glob("step-*.pt")}
        return sorted(
            (path for path, step in numbered.items() if step.isdecimal()), key=lambda path: int(numbered[path])
        )

    def latest(self, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
        """The last checkpoint and what it holds. A damaged one is set aside, and said: it would stop every attempt."""
        for path in reversed(self.paths()):
            if (state := read_whole(path)) is not None:
                return path, state
            if accelerator.is_main_process:
                path.rename(path.with_name(f"{path.name}.damaged"))
            accelerator.print(f"{path} is damaged: set aside")
        return None, {}

    def resume(self, config: RunConfig, accelerator: Accelerator) -> tuple[int, dict[str, float]]:
        """Load the latest checkpoint, if it is this run's. Returns its step and what was spent on it."""
        if config.resume_from_checkpoint is False:
            return 0, {}
        named = folders.named_checkpoint(config)
        with accelerator.main_process_first():
            path, state = (named, read_whole(named)) if named else self.latest(accelerator)
        if path is None:
            return 0, {}
        if state is None:
            raise UserError(f"resume_from_checkpoint: {path} is no checkpoint, or is damaged")
        if state["identity"] != self.identity:
            if named:
                raise UserError(f"{path} is a checkpoint of other settings, data, base or code than this run's")
            accelerator.print(f"{path} is of other settings, data, base or code: starting at step 0")
            return 0, {}
        for name, weight in self.trained.items():
            weight.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.means.restore(state["means"], accelerator)
        self.stage.restore(state["stage"])
        accelerator.print(f"resuming from {path}")
        return state["step"], state["spent"]
