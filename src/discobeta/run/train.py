"""One run, from its settings to its directory."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discobeta import folders, identity, lock, record
from discobeta.design.arms import Arm, cell
from discobeta.design.config import RunConfig
from discobeta.design.stages import STAGES
from discobeta.errors import UserError
from discobeta.files import write_json

if TYPE_CHECKING:
    from accelerate import Accelerator


OF_DEVICES = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")
"""Variables of accelerate that say where is computed, and not what."""


def train(config: RunConfig) -> None:
    """Train `config` and leave its run directory."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list

    from discobeta.method.stage import stage_class

    if config.report_to != "none" and find_spec(config.report_to) is None:
        raise UserError(f"report_to: {config.report_to} is not installed (pip install {config.report_to})")
    stage_class(config.stage).check(config)
    # what a shell or `accelerate config` has set (accumulation, precision, a compiler) decides nothing here
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in OF_DEVICES]:
        del os.environ[name]
    # the first process tokenises and computes the reference pass while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(
        mixed_precision="no",  # the stages' own autocast decides
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir) / "tracker",
        kwargs_handlers=[patience, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients once
    )
    if accelerator.device.type == "cpu" and (granted := os.environ.get("CUDA_VISIBLE_DEVICES")):
        accelerator.print(f"GPU {granted} was granted, and torch sees none: this run computes on the CPU")
    if not _is_free(config, accelerator):
        if accelerator.is_main_process:
            _leave_finished(config)
        return
    # one process writes, and holds the directory for all
    holding = lock.holding(Path(config.output_dir)) if accelerator.is_main_process else nullcontext()
    with holding as hold:
        waited = broadcast_object_list([hold is not None and hold.waited])[0]
        if waited and record.is_finished(config):  # whoever held it has done our work
            accelerator.print(folders.finished_line(config), file=sys.stderr)
        elif _is_free(config, accelerator):  # asked again: it may have changed before the directory was ours
            _train(config, accelerator, hold)
        else:
            accelerator.print(folders.finished_line(config), file=sys.stderr)


def _is_free(config: RunConfig, accelerator: Accelerator) -> bool:
    with accelerator.main_process_first():
        return folders.open_run(config)


def _train(config: RunConfig, accelerator: Accelerator, hold: lock.Hold | None) -> None:
    from accelerate.utils import broadcast_object_list

    from discobeta.data.formats import KINDS
    from discobeta.data.sources import contents_hash
    from discobeta.data.tokens import load_or_tokenise
    from discobeta.method.stage import stage_class
    from discobeta.model import kernels, layout, preflight, pretrained
    from discobeta.model.forward import name_of
    from discobeta.run import load as runs
    from discobeta.run import loop

    folders.named_checkpoint(config)  # said before anything expensive
    kernels.choose_kernels(config)
    kind = stage_class(config.stage)
    directory = Path(config.output_dir)
    _say_same_as(config, accelerator.print)
    tokenizer = pretrained.load_tokenizer(config)
    with accelerator.main_process_first():
        data = load_or_tokenise(config, tokenizer)
    for line in data.lines():
        accelerator.print(line)
    model = kind.start(config)
    preflight.check(model, data, config, tokenizer)  # before the reference pass
    with accelerator.main_process_first():
        columns = kind.columns(config, data.parts())
    stage = kind.fresh(config, columns["train"], model, runs.given(config))
    stage.check_data(data)
    material = layout.pairs_for(model, config, data.train, columns["train"])
    if STAGES[config.stage].has_pairs and config.share_prompt and not material.shared:
        reason = layout.why_apart(model, int(material.lengths.max()))
        accelerator.print(f"{name_of(model)} reads the prompt twice, once for each response of a pair: {reason}")
    held_out = None if data.held_out is None else layout.pairs_for(model, config, data.held_out, columns["eval"])
    if config.eval_strategy != "no" and held_out is None:
        raise UserError(f"eval_strategy: {config.eval_strategy}, and {config.tokenized_path} holds no held-out rows")
    facts = {
        "base": identity.weights_hash(config),
        "tokenizer": identity.tokenizer_hash(config),
        **data.keys(),
        **stage.facts(),
    }
    more = {"sources": contents_hash(config)}
    if hold:
        hold.confirm()
    finished = hold is not None and record.restore(directory, config, facts | more, accelerator.num_processes)
    if broadcast_object_list([finished])[0]:
        accelerator.print(folders.restored_line(config), file=sys.stderr)
        if hold:
            folders.remove_checkpoints(directory)
        return

    if hold:
        hold.confirm()
        folders.begin(config)
    accelerator.wait_for_everyone()  # nobody looks for a checkpoint that is about to be removed
    if accelerator.log_with:
        accelerator.init_trackers("discobeta", config.resolved(), _tracker_options(config))
    startup = time.monotonic() - record.STARTED
    same = record.identity_of(config, facts | {"processes": str(accelerator.num_processes)})
    spent = loop.fit(stage, material, held_out, config, accelerator, hold, same)
    accelerator.wait_for_everyone()
    if hold:
        hold.confirm()
        stage.save(directory)
        seconds, device, processes = spent.pop("seconds"), accelerator.device.type, accelerator.num_processes
        write_json(directory / "cost.json", record.cost(seconds, startup, spent, device, processes))
        more |= {KINDS[config.stage]: len(material), "rows": data.report}
        record.write_provenance(directory, config, facts | more)
        folders.remove_checkpoints(directory)
    accelerator.end_training()


def _leave_finished(config: RunConfig) -> None:
    """Say that the run is there, if it still is what would be trained, and clear away what a kill has left in it."""
    from discobeta.data.sources import contents_hash
    from discobeta.method.stage import stage_class

    run = record.read(config.output_dir, trust_remote_code=config.trust_remote_code)
    run.check_base()
    run.check_fact("sources", contents_hash(config), config.dataset or config.tokenized_path)
    for key, now in stage_class(config.stage).hashes_of_inputs(config).items():
        run.check_fact(key, now, getattr(config, key))
    if folders.has_leftovers(run.directory):
        with lock.holding(run.directory):
            folders.remove_checkpoints(run.directory)
    print(folders.finished_line(config), file=sys.stderr)


def _say_same_as(config: RunConfig, say: Any) -> None:
    trained: Arm = config.arm.trained_as(config.stage)
    if trained != config.arm:
        say(f"stage {config.stage}: {cell(config.stage, config.arm.flags).reason}; this is the run of {trained.name}")


def _tracker_options(config: RunConfig) -> dict[str, Any]:
    return {"wandb": {"name": config.run_name}} if config.report_to == "wandb" and config.run_name else {}
