"""The model card of a run, README.md in its directory: what stands in its records, in words, for whoever finds it.

A function of the run's records alone, without times or absolute paths, so that equal runs have equal cards. It is no
part of what a run is: it is in no seal, decides nothing, and is left alone once somebody has edited it
(docs/decisions/0032).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from discobeta import files, folders, record
from discobeta.data.sources import HUB_ID, named, resolve
from discobeta.design.config import RunConfig
from discobeta.design.described import arm_in_words, heads_read
from discobeta.design.stages import STAGES
from discobeta.errors import UserError, say

MEANINGS = {
    "accuracy": "share of held-out pairs whose chosen response is preferred",
    "nll": "negative log-likelihood of the held-out preferences, nats; lower is better",
    "brier": "squared error of the predicted probabilities; lower is better",
    "ece": "expected calibration error; lower is better",
    "excess_kl": "KL divergence from the true preferences to the predicted ones, nats; lower is better, 0 the best",
    "true_reward": "mean true reward of sampled responses; higher is better",
    "reference_true_reward": "and of the reference's",
    "reward": "mean score of sampled responses by the reward model",
    "reference_reward": "and of the reference's",
    "win_rate": "share of sampled responses with a higher true reward than the reference's",
    "kl_per_sequence": "KL divergence to the reference, estimated, nats per response",
    "response_length": "tokens of a sampled response",
    "eos_rate": "share of sampled responses that end",
}
"""What a metric says; the others stand in docs/tables.md."""

TRAINED_WITH = (
    "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
    "pref_beta", "pref_loss", "beta_rule", "head_pooling", "cutoff_len", "bf16", "adapter_name_or_path",
    "reward_model", "beta_head", "ppo_epochs", "stop_after_steps",
)  # fmt: skip


def write(directory: str | Path) -> None:
    """Write or renew README.md of the finished run in `directory`; one that somebody has edited is left, and said."""
    run = record.read(directory, weights=False)
    if not folders.write_card(run.directory, text(run)):
        say(
            f"{run.directory / folders.CARD} is not as discobeta wrote it, and is left as it is; move it away, and "
            "`discobeta evaluate` writes a new one"
        )


def text(run: record.Record) -> str:
    """The card, in Markdown, with the header that the Hugging Face hub reads."""
    return f"---\n{as_yaml(header(run))}---\n\n{_body(run)}"


def header(run: record.Record) -> dict[str, Any]:
    """What the hub indexes. A local base or data set has no name there, so none is given."""
    config, is_policy = run.config, STAGES[run.config.stage].is_policy
    is_lora = config.finetuning_type == "lora"
    found: dict[str, Any] = {}
    if is_of_hub(run, config.model_name_or_path):
        found |= {"base_model": config.model_name_or_path, "base_model_relation": "adapter" if is_lora else "finetune"}
    found |= {
        "library_name": "peft" if is_lora else "transformers",
        "pipeline_tag": "text-generation" if is_policy else "text-classification",
    }
    if data := _hub_data(config):
        found["datasets"] = data
    kind = "preference-alignment" if is_policy else "reward-model"
    found["tags"] = ["discobeta", kind, config.stage, config.arm.name, *(["lora"] if is_lora else [])]
    return found


def is_of_hub(run: record.Record, name: str) -> bool:
    """Whether a base's name is one of the hub, and not of a folder here or where the run was trained."""
    if not re.fullmatch(HUB_ID, name) or os.path.exists(name):
        return False
    description = run.directory / "adapter" / "adapter_config.json"
    return not description.is_file() or files.read_mapping(description).get("base_model_name_or_path") == name


def _hub_data(config: RunConfig) -> list[str]:
    found = {}
    for names, split in named(config).values():
        try:
            found |= {source.hub: None for source in resolve(names, config, split) if source.hub}
        except UserError:  # of files that are not here
            continue
    return [name for name in found if "/" in name and not os.path.exists(name)]


def as_yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _body(run: record.Record) -> str:
    config, facts = run.config, run.facts
    row = STAGES[config.stage]
    sections = [
        f"# {row.title}: {config.arm.label}, seed {config.seed}",
        what_it_is(run),
        "## Arm\n\n" + arm_in_words(config.arm, config.stage),
        "## Data\n\n" + _data(run),
        "## Training\n\n" + _training(config),
        "## Results\n\n" + _results(run),
        "## How to load it\n\n" + _loading(run),
        "## Where it comes from\n\n" + _provenance(facts),
        "## Limits\n\n" + LIMITS,
        "## How to cite it\n\n" + citation(facts),
    ]
    return "\n\n".join(sections) + "\n"


LIMITS = (
    "Trained for a comparison of methods and not for use: one seed of one cell of an ablation, on the data named "
    "above, with whatever biases base and data have; nothing was done about harmful or false responses. A reward says "
    "how responses to one prompt compare; across prompts, and far from the training data, it says little."
)


def what_it_is(run: record.Record, weights: str = "") -> str:
    """weights: what of the base was trained."""
    config = run.config
    row, is_lora = STAGES[config.stage], config.finetuning_type == "lora"
    weights = weights or ("a LoRA adapter" if is_lora else "all weights")
    kind = "A policy" if row.is_policy else "A reward model"
    base = f"`{config.model_name_or_path}`"
    base += "" if is_of_hub(run, config.model_name_or_path) else " (a local folder)"
    stopped = ""
    if config.stop_after_steps:
        stopped = (
            f" It was stopped after {config.stop_after_steps} steps, for a proof that a head which nobody reads "
            "changes nothing: it is no finished model."
        )
    return (
        f"{kind} ({weights}) on {base}, sha256 `{str(run.facts.get('base'))[:12]}`, trained by "
        f"[discobeta](#how-to-cite-it), an ablation of Gaussian rewards (Disco) and a β for each prompt (LeDPO): stage "
        f"{config.stage}, arm `{config.arm.name}`.{stopped}"
    )


def _data(run: record.Record) -> str:
    config, report = run.config, run.facts.get("rows") or {}
    lines = []
    for part, key, what in (
        ("train", "dataset", "trained on"),
        ("eval", "eval_dataset", "held out"),
        ("calibration", "calibration_dataset", "for calibration"),
    ):
        of_part = report.get(part) or {}
        name = of_part.get("dataset") or getattr(config, key)
        if name:
            rows = f", {of_part['total'] - sum(of_part['reasons'].values()):,} rows" if "reasons" in of_part else ""
            lines.append(f"- {what}: `{name}`{rows}")
    if config.val_size:
        lines.append(f"- held out: `val_size: {config.val_size:g}` of these")
    if shared := report.get("shared_prompts"):
        lines.append(f"- {shared} held-out prompts also occur in the training rows")
    return "\n".join(lines) or f"`{config.tokenized_path}`"


def _training(config: RunConfig) -> str:
    decides = config.settings_of("training")
    settings = {name: decides[name] for name in TRAINED_WITH if decides.get(name) is not None}
    settings.pop("num_train_epochs" if config.max_steps > 0 else "max_steps")
    lines = "\n".join(f"{name}: {_plain(value)}" for name, value in settings.items())
    return f"All settings are in `config.yaml`; the main ones:\n\n```yaml\n{lines}\n```"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _results(run: record.Record) -> str:
    if (fault := record.measurement_fault(run.directory)) is not None:
        return f"None yet ({fault}): `discobeta evaluate RUN_DIR` measures it."
    measured = files.read_mapping(run.directory / "metrics.json")
    lines = ["| metric | value | |", "|---|---|---|"]
    for name, value in measured.items():
        if isinstance(value, int | float):
            lines.append(f"| `{name}` | {value:.4g} | {MEANINGS.get(name, '')} |")
    where = "held-out rows" if STAGES[run.config.stage].has_pairs or run.config.eval_dataset else "training prompts"
    return f"On {where}, by `discobeta evaluate`; one seed, so without an interval.\n\n" + "\n".join(lines)


def _loading(run: record.Record) -> str:
    config, row = run.config, STAGES[run.config.stage]
    if row.is_policy:
        ours = 'policy = discobeta.load_policy("RUN_DIR")  # .model .tokenizer .heads .config'
        auto, extra = "AutoModelForCausalLM", ""
    else:
        ours = (
            'reward_model = discobeta.load_reward_model("RUN_DIR")\n'
            'mean, variance = reward_model.score("a prompt", "a response")  # variance: None where a reward is a number'
        )
        auto, extra = "AutoModelForSequenceClassification", ", num_labels=1"
    if config.finetuning_type == "lora":
        plain = (
            "from peft import PeftModel\n"
            f"from transformers import {auto}\n\n"
            f'base = {auto}.from_pretrained("{config.model_name_or_path}"{extra})\n'
            'model = PeftModel.from_pretrained(base, "RUN_DIR/adapter").eval()'
        )
        by = "plain PEFT"
    else:
        plain = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("RUN_DIR/model")'
        by = "transformers alone"
    notes = [
        "RUN_DIR is the folder that this file is in. It may have been moved; where the base is not found, say where it "
        "is: `base=DIR`."
    ]
    if not row.is_policy:
        notes.append(score_in_words(run))
    notes.append(
        "`discobeta merge RUN_DIR OUT` writes a plain model, `discobeta samples RUN_DIR` shows "
        + ("responses beside the reference's." if row.is_policy else "scores.")
    )
    return f"```python\nimport discobeta\n\n{ours}\n```\n\nWith {by}:\n\n```python\n{plain}\n```\n\n" + "\n\n".join(
        notes
    )


def score_in_words(run: record.Record) -> str:
    said = (
        "The score is the single logit of prompt + response + end-of-sequence token, at the last token that is no "
        "padding."
    )
    if (head := variance_head(run)) is not None:
        said += (
            " It is the mean µ of a Gaussian, whose σ is in `heads.safetensors`: σ = (2/√π) exp(W₂ tanh(W₁ (h − m))), "
            f"W₁ being `{head}.net.0.weight`, W₂ `{head}.net.2.weight`, m `{head}.state_mean` and h the trunk's last "
            f"hidden state, {_POOLED[run.config.head_pooling]}."
        )
    return said


def variance_head(run: record.Record) -> str | None:
    """The key of the head that makes the run's reward a Gaussian; None where it is a number."""
    described = files.read_mapping(run.directory / "heads.json")
    read = heads_read(run.config.arm, run.config.stage)
    with_mean = (key for key in read if isinstance(described.get(key), dict) and described[key].get("mean"))
    return next(with_mean, None)


_POOLED = {"mean": "its mean over the response's tokens", "last": "at the response's last token"}


def _provenance(facts: dict[str, Any]) -> str:
    versions = facts.get("versions") or {}
    main = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    return (
        f"discobeta {versions.get('discobeta')}, commit `{facts.get('commit') or 'unknown'}`"
        f"{' with uncommitted changes' if facts.get('dirty') else ''}; {main}; Python {versions.get('python')}. "
        "`provenance.json` has the sha256 of base, tokenizer, data and of every file of the run."
    )


def citation(facts: dict[str, Any]) -> str:
    version, commit = (facts.get("versions") or {}).get("discobeta"), facts.get("commit")
    note = f",\n  note = {{commit {commit}}}" if commit else ""
    return (
        "As the file `CITATION.cff` of discobeta's repository says, with version and commit:\n\n"
        "```bibtex\n@software{discobeta,\n  title = {discobeta: an ablation of Gaussian rewards (Disco) and dynamic "
        f"beta (LeDPO)}},\n  author = {{The discobeta authors}},\n  version = {{{version}}}{note}\n}}\n```"
    )
