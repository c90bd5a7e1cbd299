"""The base: supervised fine-tuning by TRL's SFTTrainer, from scratch or from a model.

What policy and reference start from is not what this study is about, so the loop is the field's
standard one; the other stages have a loop of their own (run/loop.py).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from discobeta import files, folders, identity, progress, record
from discobeta.data.rows import Rows, TokenisedData
from discobeta.data.sources import contents_hash, read_examples
from discobeta.data.tokens import load_or_tokenise
from discobeta.design.config import RunConfig
from discobeta.design.yaml_text import write_yaml
from discobeta.errors import UserError, did_you_mean, enough_memory, first_line
from discobeta.model import preflight
from discobeta.model.pretrained import ATTENTION, load_causal_lm, load_tokenizer
from discobeta.seeds import derive, global_stream

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
BASE_MEMORY = (
    "per_device_train_batch_size (and raise gradient_accumulation_steps by as much) or cutoff_len, "
    "or set gradient_checkpointing: true"
)
LOGGED = ("epoch", "loss", "mean_token_accuracy", "learning_rate", "grad_norm", "eval_loss")
"""What log.jsonl keeps of the trainer's log; its timings would make equal runs differ."""


def train(config: RunConfig) -> None:
    """Minimise -log pi(completion | prompt), the mean over completion tokens, over all weights.

    Leaves `output_dir` as an ordinary transformers model folder (weights, config and tokenizer) with
    config.yaml, log.jsonl, cost.json and provenance.json beside them. The folder appears whole or
    not at all, so there are no checkpoints and a killed run starts again. Raises UserError if
    `output_dir` holds something else.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    finished = folders.finished_line(config)
    if not is_free(config):
        run = record.read(config.output_dir)
        run.check_fact("sources", contents_hash(config), config.dataset or config.tokenized_path)
        if config.model_name_or_path:
            run.check_fact("base", identity.weights_hash(config), config.model_name_or_path)
        files.sweep(Path(config.output_dir))
        print(finished, file=sys.stderr)
        return
    processes = PartialState()
    tokenizer = build_tokenizer(config)
    with processes.main_process_first():
        data = load_or_tokenise(config, tokenizer)
    for line in data.lines():
        processes.print(line)
    facts = {**data.keys(), "sources": contents_hash(config)}
    if config.model_name_or_path:
        facts["base"] = identity.weights_hash(config)
    output, count = Path(config.output_dir), processes.num_processes
    if broadcast_object_list([processes.is_main_process and record.restore(output, config, facts, count)])[0]:
        processes.print(folders.restored_line(config), file=sys.stderr)
        return
    model = build_model(config, tokenizer)
    preflight.check(model, data, config, tokenizer)
    # the other processes have nothing to leave behind
    main = processes.is_main_process
    target = files.replacing(config.output_dir, lambda: _still_free(config)) if main else tempfile.TemporaryDirectory()
    try:
        with target as folder, global_stream(config.seed, "sft"):
            folder = Path(folder)
            trainer, log = build_trainer(config, model, tokenizer, data, folder)
            begun = time.monotonic()
            with enough_memory("training", BASE_MEMORY), closing(log):
                trainer.train()
            spent = time.monotonic() - begun
            if main:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_yaml(config.resolved(), folder / "config.yaml")
                files.write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log.rows))
                files.write_json(folder / "cost.json", cost(trainer, spent, begun - record.STARTED))
                facts |= {"examples": len(data.train), "rows": data.report}
                record.write_provenance(folder, config, facts, sorted(os.listdir(folder)))
                folders.write_mark(folder, "discobeta train, stage sft", [*os.listdir(folder), "loss.png"])
    except _WrittenMeanwhile:
        print(finished, file=sys.stderr)
    processes.wait_for_everyone()


class _WrittenMeanwhile(Exception):
    """Another process has finished this very run: keep its, discard ours."""


def _still_free(config: RunConfig) -> None:
    if not is_free(config):
        raise _WrittenMeanwhile


def is_free(config: RunConfig) -> bool:
    """Whether `output_dir` is to be written; False if it holds this very run, finished.

    Refused are another run (unless overwrite_output_dir) and, always, a folder that holds what no run
    of ours has written, or what this run reads: the folder is replaced as a whole.
    """
    output = folders.writable(config)
    folders.check_replaceable(output, "output_dir")
    folders.check_inputs(config, [output])
    if config.overwrite_output_dir or not (output / "config.yaml").exists():
        return True
    if different := record.difference_in(output, config):
        raise folders.another_run(output, different)
    return not (output / "provenance.json").exists()


# --- tokenizer


def build_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """tokenizer_name's, else the start model's, else one trained on the data."""
    if config.tokenizer_name:
        return load_tokenizer(config.replace(model_name_or_path=config.tokenizer_name))
    if config.model_name_or_path:
        return load_tokenizer(config)
    examples, _ = read_examples(config.dataset, config, split=config.split, kind="supervised")
    texts = (text for example in examples for text in example.texts())
    return train_tokenizer(texts, config.vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE over `texts`, with <pad>, <bos> and <eos> apart; any text comes back as it went in.

    A function of the texts alone: equal data gives an equal tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


# --- model


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The start model, or a new one of `model_type` whose vocabulary is the tokenizer's."""
    if config.model_name_or_path:
        return load_causal_lm(config)
    import torch
    from transformers import AutoModelForCausalLM

    architecture = build_architecture(config.model_type, config.config_overrides, tokenizer)
    try:
        with global_stream(config.seed, "base weights"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(architecture, attn_implementation=ATTENTION[config.flash_attn])
            model.eval()(input_ids=torch.tensor([[0, 0]]))  # sizes that do not fit together show only here
    except Exception as error:  # each architecture fails in its own way
        raise UserError(f"config_overrides: cannot build such a {config.model_type}: {first_line(error)}") from None
    return model


def build_architecture(model_type: str, overrides: str, tokenizer: PreTrainedTokenizerBase):
    """The transformers config of `model_type` with `overrides`, e.g. hidden_size=64,num_hidden_layers=2."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

    if model_type not in CAUSAL_LMS:
        raise UserError(
            f"model_type: transformers has no causal LM {model_type!r}{did_you_mean(model_type, CAUSAL_LMS)}"
        )
    default = AutoConfig.for_model(model_type)
    fields = {**default.to_dict(), **{alias: getattr(default, alias) for alias in default.attribute_map}}
    if "rope_parameters" in fields:
        fields["rope_theta"] = 10000.0  # transformers takes it as an argument and keeps it in rope_parameters
    sizes = {}
    for word in filter(None, map(str.strip, overrides.split(","))):
        name, sign, text = map(str.strip, word.partition("="))
        if not sign:
            raise UserError(f"config_overrides: {word!r}: write name=value")
        if name in FROM_TOKENIZER:
            raise UserError(f"config_overrides: {name} comes from the tokenizer; leave it out")
        if name not in fields:
            raise UserError(f"config_overrides: {model_type} has no {name!r}{did_you_mean(name, fields)}")
        sizes[name] = typed(name, text, fields[name])
    special = {name: getattr(tokenizer, name) for name in FROM_TOKENIZER[1:]}
    try:
        return AutoConfig.for_model(model_type, **sizes, **special, vocab_size=len(tokenizer))
    except Exception as error:  # transformers' strict configs raise classes of their own
        raise UserError(f"config_overrides: {' '.join(str(error).split())}") from None


def typed(name: str, text: str, default: Any) -> Any:
    """The override in the type of the architecture's default, if that has one."""
    value = yaml.safe_load(text)
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)  # `1e-5` has no dot, so YAML 1.1 says text
        except (TypeError, ValueError):
            pass
    elif default is None or type(value) is type(default):
        return value
    raise UserError(f"config_overrides: {name}={text} should be like {default!r}")


# --- training


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenisedData,
    folder: Path,
) -> tuple[SFTTrainer, Any]:
    """TRL's trainer on rows that are tokenised already, and the callback that collects its log."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels say where the loss is, so the two may be one
    log = collect_log(config.stop_after_steps)
    trainer = SFTTrainer(
        model=model,
        args=trainer_settings(config, folder),
        train_dataset=labelled(data.train),
        eval_dataset=labelled(data.held_out) if data.held_out and config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, log


def labelled(rows: Rows) -> Dataset:
    """Token ids with labels on the completion only (-100 elsewhere)."""
    from datasets import Dataset

    pairs = list(zip(rows.prompt_ids, rows.chosen_ids, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [[*prompt.tolist(), *completion.tolist()] for prompt, completion in pairs],
            "labels": [[-100] * len(prompt) + completion.tolist() for prompt, completion in pairs],
        }
    )


def trainer_settings(config: RunConfig, folder: Path) -> SFTConfig:
    """The run's settings under TRL's names; TRL's own defaults are for large models on a GPU."""
    from trl import SFTConfig

    # transformers renamed this one argument within the range of versions that are supported
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        return SFTConfig(
            output_dir=str(folder),
            seed=derive(config.seed, "sft") % 2**32,  # what numpy takes
            full_determinism=config.deterministic,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_eval_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing,
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps or config.warmup_ratio,
            optim=config.optim,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            logging_steps=config.logging_steps,
            eval_strategy=config.eval_strategy,
            eval_steps=config.eval_steps or config.logging_steps,
            save_strategy="no",
            report_to=config.report_to,
            run_name=config.run_name,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise UserError(f"stage sft: {first_line(error)}") from None


def collect_log(stop_after_steps: int | None) -> Any:
    """A trainer callback that keeps `rows` for log.jsonl and shows one progress bar with the loss."""
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []
            self.bar: Any = None

        def on_train_begin(self, args, state, control, **rest) -> None:
            total = min(state.max_steps, stop_after_steps or state.max_steps)
            self.bar = progress.bar(total, "sft", "step", shown=state.is_world_process_zero)

        def on_step_end(self, args, state, control, **rest) -> None:
            self.bar.update()
            if stop_after_steps and state.global_step >= stop_after_steps:
                control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **rest) -> None:
            if "loss" in logs:
                self.bar.set_postfix({"loss": f"{float(logs['loss']):.3f}"})
            if "loss" in logs or "eval_loss" in logs:
                kept = {name: float(logs[name]) for name in LOGGED if name in logs}
                self.rows.append({"step": state.global_step, **kept})

        def close(self) -> None:
            if self.bar is not None:
                self.bar.close()

    return Log()


def cost(trainer: SFTTrainer, seconds: float, startup_seconds: float) -> dict[str, Any]:
    """What the run took; tokens are those of prompts and completions, padding not counted."""
    accelerator = trainer.accelerator
    counts = {
        "examples": round(trainer.state.epoch * len(trainer.train_dataset)),
        "tokens": int(trainer._total_train_tokens),
    }
    return record.cost(seconds, startup_seconds, counts, accelerator.device.type, accelerator.num_processes)
