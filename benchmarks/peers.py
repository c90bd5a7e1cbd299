"""TRL's side: its DPOTrainer and RewardTrainer, given the settings of a run of ours in TRL's names.

    python benchmarks/peers.py RUN.yaml     # a whole process, as a user of TRL writes it

RUN.yaml is a run of ours and, beside it, what is a choice in TRL alone (`Peer`). A CPU has to be asked for (`use_cpu`,
`bf16` off); what is not named here is TRL's default, such as its fused AdamW and its metrics.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A way to run TRL. microbatch: pairs of a forward pass, which accumulate to the batch; 0: the whole batch."""

    checkpointing: bool = False
    precomputed: bool = False
    microbatch: int = 0


STOCK = Peer(checkpointing=True)


def train(settings: dict[str, Any], peer: Peer, start: Path | None = None) -> dict[str, Any]:
    """Train and leave output_dir/adapter. Returns what `ours.train` returns, but for the lengths.

    start: folder of `ours.start`, whose adapter and order of rows are taken over; None: an adapter and an order of
    TRL's own, from the run's seed.
    """
    from datasets import load_dataset
    from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    class Log(TrainerCallback):
        def __init__(self):
            self.seconds, self.losses, self.last = [], [], 0.0

        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                now = time.perf_counter()
                self.seconds.append(now - self.last)
                self.losses.append(logs["loss"])
                self.last = now

    is_dpo, batch = settings["stage"] == "dpo", settings["per_device_train_batch_size"]
    microbatch = peer.microbatch or batch
    arguments = {
        "output_dir": f"{settings['output_dir']}/trainer", "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": microbatch, "gradient_accumulation_steps": batch // microbatch,
        "gradient_checkpointing": peer.checkpointing, "max_steps": settings["max_steps"],
        "learning_rate": settings["learning_rate"], "logging_steps": settings["logging_steps"],
        "max_length": settings["cutoff_len"], "seed": settings["seed"], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if is_dpo:
        arguments |= {"beta": settings["pref_beta"], "precompute_ref_log_probs": peer.precomputed}
    if start:
        arguments |= {"train_sampling_strategy": "sequential"}
        lora = PeftConfig.from_pretrained(str(start / "adapter"))
        lora.inference_mode = False
    else:
        names = {"r": settings["lora_rank"], "lora_alpha": settings["lora_alpha"], "lora_dropout": 0.0}
        lora = LoraConfig(task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS", target_modules="all-linear", **names)
    rows = str(start / "rows.jsonl") if start else settings["dataset"]
    log = Log()
    trainer_class, config_class = (DPOTrainer, DPOConfig) if is_dpo else (RewardTrainer, RewardConfig)
    trainer = trainer_class(
        settings["model_name_or_path"], args=config_class(**arguments), peft_config=lora, callbacks=[log],
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["model_name_or_path"]),
    )  # fmt: skip
    if start:
        weights = load_file(start / "adapter/adapter_model.safetensors")
        set_peft_model_state_dict(trainer.model, weights)
        if get_peft_model_state_dict(trainer.model).keys() != weights.keys():
            raise ValueError("TRL trains other weights than ours")
    trainer.train()
    trainer.model.save_pretrained(f"{settings['output_dir']}/adapter")
    return {"seconds": log.seconds, "losses": log.losses, "tokens": tokens_of(trainer.train_dataset) if start else None}


def tokens_of(dataset) -> str:
    """The sha256 of what TRL made of the rows, as `ours.train` has it."""
    import ours

    prompts = dataset["prompt_ids"] if "prompt_ids" in dataset.column_names else [[]] * len(dataset)
    rows = zip(prompts, dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return ours.hash_of([[prompt + chosen, prompt + rejected] for prompt, chosen, rejected in rows])


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    peer = Peer(**wanted.pop("peer"))
    train(wanted, peer)
