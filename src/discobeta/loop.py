"""The one optimisation loop: step, log, checkpoint, resume.

Nothing here knows a stage or a flag. What happens at step n is a function of the weights, the
optimiser's state and n: the data order and the dropout masks are derived from (seed, n) and not
from a stream that runs on, so a run that was killed and resumed is the run that was not, bit for
bit on a CPU. Losses are means over the pairs of an optimiser step, over all processes.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from discobeta.config import RunConfig
from discobeta.data.batches import Pairs, Schedule
from discobeta.errors import UserError
from discobeta.files import replacing, writing_error
from discobeta.seeds import derive
from discobeta.stages import Stage


class Means:
    """Sums of per-pair statistics, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pairs = 0

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, values in statistics.items():
            total = values.double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.pairs += len(values)

    def total(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums over all processes, and `pairs`, how many they are of."""
        names = [*self.sums, "pairs"]
        pairs = torch.tensor(self.pairs, dtype=torch.float64, device=accelerator.device)
        packed = accelerator.reduce(torch.stack([*self.sums.values(), pairs]), "sum")
        return dict(zip(names, packed.tolist(), strict=True))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes; starts anew."""
        total = self.total(accelerator)
        pairs = total.pop("pairs")
        self.__init__()
        return {name: value / pairs for name, value in total.items()}

    def restore(self, total: dict[str, float], accelerator: Accelerator) -> None:
        """Go on from `total`, which one process takes over for all."""
        if accelerator.is_main_process:
            self.pairs = int(total.pop("pairs"))
            self.sums = {
                name: torch.tensor(value, dtype=torch.float64).to(accelerator.device) for name, value in total.items()
            }


class Log:
    """log.jsonl: one JSON object a line. It holds no times, so that equal runs have equal logs."""

    def __init__(self, path: Path, upto_step: int, enabled: bool):
        """Keeps the lines of steps up to `upto_step` of a run that is resumed, and drops later ones."""
        self.path = path
        self.enabled = enabled
        if not enabled:
            return
        lines = path.read_text().splitlines() if path.exists() and upto_step else []
        kept = [line for line in lines if _step_of(line) <= upto_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, values: dict[str, float]) -> None:
        if self.enabled:
            try:
                with self.path.open("a") as stream:
                    stream.write(json.dumps(values) + "\n")
            except OSError as error:
                raise writing_error(self.path, error) from None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a process that was killed while writing it
        return math.inf


def schedule_of(config: RunConfig, pairs: int, processes: int) -> Schedule:
    size = config.per_device_train_batch_size * processes
    if pairs < processes:
        raise UserError(f"{pairs} training pairs cannot be shared by {processes} processes")
    return Schedule(pairs, size, config.gradient_accumulation_steps, processes, config.seed)


def total_steps(config: RunConfig, schedule: Schedule) -> int:
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * schedule.steps_per_epoch)


def fit(
    stage: Stage,
    train: Pairs,
    held_out: Pairs | None,
    config: RunConfig,
    accelerator: Accelerator,
    directory: Path,
    identity: str,
) -> dict[str, float]:
    """Train `stage` in place. Returns what it cost: seconds, pairs and tokens, over all attempts.

    identity: of data, base, settings and code; only a checkpoint of the same identity is resumed.
    """
    from transformers import get_scheduler

    schedule = schedule_of(config, len(train), accelerator.num_processes)
    steps = total_steps(config, schedule)
    stop = min(steps, config.stop_after_steps or steps)
    stage.to(accelerator.device)
    groups = stage.parameter_groups()
    optimizer = torch.optim.AdamW(
        [_optimizer_group(name, weights, config) for name, weights in groups.items()],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    warmup = config.warmup_steps or math.ceil(steps * config.warmup_ratio)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps)
    means = Means()
    saver = Checkpoints(directory / "checkpoints", identity, stage, optimizer, scheduler, means)
    done, spent = saver.resume(config, accelerator)
    module, optimizer = accelerator.prepare(stage, optimizer)
    log = Log(directory / "log.jsonl", done, accelerator.is_main_process)
    module.train()
    started = time.monotonic() - spent.get("seconds", 0.0)
    counts = Counter(pairs=spent.get("pairs", 0), tokens=spent.get("tokens", 0))
    bar = tqdm(
        total=stop, initial=done, desc=f"{config.stage} {config.arm.name}", unit="step",
        disable=not accelerator.is_main_process, mininterval=0.5,
    )  # fmt: skip
    with bar:
        for step in range(done, stop):
            optimizer.zero_grad(set_to_none=True)
            pairs_in_step = len(schedule.step_rows(step))
            passes = list(schedule.passes(step, train.lengths, accelerator.process_index))
            for number, indices in enumerate(passes):
                torch.manual_seed(derive(config.seed, "dropout", step, number, accelerator.process_index))
                batch = train.batch(indices).to(accelerator.device)
                with nullcontext() if number == len(passes) - 1 else accelerator.no_sync(module):
                    objective, statistics = module(batch)
                    # DDP averages over processes; this makes the gradient the mean over the step's pairs
                    accelerator.backward(objective.sum() * (accelerator.num_processes / pairs_in_step))
                means.add(statistics)
            norms = clip_gradients(groups, config)
            optimizer.step()
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            counts["pairs"] += pairs_in_step
            counts["tokens"] += train.tokens(schedule.step_rows(step))
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
                accelerator.log(values, step=now)
                bar.set_postfix(loss=f"{values['loss']:.4f}", accuracy=f"{values['accuracy']:.3f}")
            if held_out is not None and _is_due(now, config, schedule, stop):
                values = {"step": now, **held_out_means(module, stage, held_out, config, accelerator)}
                log.write(values)
                accelerator.log(values, step=now)
            if config.save_steps and now % config.save_steps == 0 and now < stop:
                saver.save(now, {"seconds": time.monotonic() - started, **counts}, accelerator)
    stage.eval()
    return {"seconds": time.monotonic() - started, **counts}


def clip_gradients(groups: dict[str, list[torch.nn.Parameter]], config: RunConfig) -> dict[str, Tensor]:
    """Scale each group's gradient down to its largest norm, on its own; returns the norms before.

    One norm over all groups would let a head change how the model is clipped.
    """
    largest = {name: config.max_grad_norm if name == "model" else config.head_max_grad_norm for name in groups}
    return {
        name: torch.nn.utils.clip_grad_norm_(weights, largest[name] or math.inf)  # 0: no clipping
        for name, weights in groups.items()
    }


@torch.no_grad()
def held_out_means(
    module: torch.nn.Module, stage: Stage, held_out: Pairs, config: RunConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Mean loss and accuracy on held-out pairs, each process taking every n-th batch."""
    module.eval()
    means = Means()
    passes = held_out.evaluation_passes(config.per_device_eval_batch_size)
    # a process with fewer batches than another repeats nothing: it adds zero pairs
    for indices in passes[accelerator.process_index :: accelerator.num_processes]:
        statistics = stage(held_out.batch(indices).to(accelerator.device))[1]
        means.add({name: statistics[name] for name in ("loss", "accuracy")})
    if not means.pairs:
        means.add({name: torch.zeros(0, device=accelerator.device) for name in ("loss", "accuracy")})
    module.train()
    return {f"eval_{name}": value for name, value in means.take(accelerator).items()}


def _is_due(step: int, config: RunConfig, schedule: Schedule, last: int) -> bool:
    if config.eval_strategy == "no":
        return False
    every = schedule.steps_per_epoch if config.eval_strategy == "epoch" else config.eval_steps or config.logging_steps
    return step % every == 0 or step == last


def _optimizer_group(name: str, weights: list[torch.nn.Parameter], config: RunConfig) -> dict:
    """AdamW's settings of the model or of a head; heads have a learning rate of their own and no decay."""
    rates = {
        "model": config.learning_rate,
        "disco": 3 * config.learning_rate if config.disco_learning_rate is None else config.disco_learning_rate,
        "beta": 5 * config.learning_rate if config.beta_learning_rate is None else config.beta_learning_rate,
    }
    return {"params": weights, "lr": rates[name], "weight_decay": config.weight_decay if name == "model" else 0.0}


class Checkpoints:
    """The latest state of an unfinished run: `checkpoints/step-<n>.pt`, whole or not there."""

    def __init__(self, folder: Path, identity: str, stage: Stage, optimizer, scheduler, means: Means):
        self.folder = folder
        self.identity = identity
        self.trained = {name: weight for name, weight in stage.named_parameters() if weight.requires_grad}
        self.optimizer, self.scheduler, self.means = optimizer, scheduler, means

    def save(self, step: int, spent: dict[str, float], accelerator: Accelerator) -> None:
        means = self.means.total(accelerator)
        if not accelerator.is_main_process:
            return
        state = {
            "identity": self.identity,
            "step": step,
            "spent": spent,
            "weights": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "means": means,
        }
        earlier = self.paths()
        with replacing(self.folder / f"step-{step}.pt") as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's own word for a write that failed
                raise UserError(f"cannot write a checkpoint to {self.folder} (is the disk full?): {error}") from None
        for path in earlier:
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))

    def resume(self, config: RunConfig, accelerator: Accelerator) -> tuple[int, dict[str, float]]:
        """Load the latest checkpoint, if it is this run's. Returns its step and what was spent on it."""
        wish = config.resume_from_checkpoint
        if wish is False:
            return 0, {}
        named = Path(wish) if isinstance(wish, str) else None
        path = named or (self.paths() or [None])[-1]
        if path is None:
            return 0, {}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read checkpoint {path}: {str(error).splitlines()[0]}") from None
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
        accelerator.print(f"resuming from {path}")
        return state["step"], state["spent"]
