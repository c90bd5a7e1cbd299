"""What tests/test_gpu_path.py runs in a process of its own: steps of training on a GPU that is pretended.

python tests/gpu_steps.py LIBRARY BASE PAIRS.jsonl FOLDER      # prints one JSON object: case -> what was found
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import fake_cuda

BOTH = {"add_disco_head": True, "disco_pref": True, "add_beta_head": True, "use_dynamic_beta": True}
CASES = {
    "dpo": {"stage": "dpo"},
    "dpo in passes": {"stage": "dpo", "tokens_per_pass": 64},
    "dpo, both heads, checkpointing": {"stage": "dpo", "gradient_checkpointing": True, **BOTH},
    "dpo, prompts twice": {"stage": "dpo", "share_prompt": False},
    "dpo, LoRA of PEFT": {"stage": "dpo", "fused_lora": False},
    "dpo, float32": {"stage": "dpo", "bf16": False},
    "dpo, one learned scale": {"stage": "dpo", "beta_rule": "learned"},
    "dpo, the batch's rule of beta": {"stage": "dpo", "beta_rule": "batch", "tokens_per_pass": 64},
    "dpo, IPO": {"stage": "dpo", "pref_loss": "ipo"},
    "dpo, all weights": {"stage": "dpo", "finetuning_type": "full"},
    "rm": {"stage": "rm"},
    "rm, Disco, checkpointing": {
        "stage": "rm", "gradient_checkpointing": True, "add_disco_head": True, "disco_pref": True,
        "head_pooling": "mean",
    },
    "ppo": {"stage": "ppo"},
    "ppo, both heads, checkpointing": {"stage": "ppo", "gradient_checkpointing": True, **BOTH},
}  # fmt: skip
"""Name -> the settings of a run whose second step of three is watched: the first may have things to set up, and the
last writes a line of the log."""


def planted_faults() -> dict:
    """Name -> a fault in the forward pass of a linear layer: of (weights, states) on the device, the loss."""
    import torch

    def of(fault):
        return lambda weight, states: (states @ weight).square().sum() + fault(states)

    cpu = torch.ones(3)
    return {
        "none": of(lambda x: x.sum()),
        "a tensor that stayed on the CPU": of(lambda x: (x[:, 0] * cpu).sum()),
        "item": of(lambda x: x.sum().item()),
        "tolist": of(lambda x: sum(x[0].tolist())),
        "float()": of(lambda x: float(x[0, 0])),
        "if": of(lambda x: 1.0 if x.sum() > 0 else 2.0),
        "nonzero": of(lambda x: x.nonzero().sum()),
        "masked_select": of(lambda x: x.masked_select(x > 0).sum()),
        "a mask as index": of(lambda x: x[x > 0].sum()),
        "a mask as index of what is written": of(lambda x: x.clone().index_put_((x[:, 0] > 0,), x[:1]).sum()),
        "cpu": of(lambda x: x.cpu().sum()),
        "to": of(lambda x: x.to("cpu").sum()),
        "copy_": of(lambda x: torch.empty(3, 4).copy_(x).sum()),
        "equal": of(lambda x: 1.0 if torch.equal(x, x) else 2.0),
        "unique": of(lambda x: x.unique().sum()),
        "a number that is made there": of(lambda x: x.sum() * torch.tensor(2.0, device=x.device)),
        "indices of the CPU": of(lambda x: x[torch.tensor([0, 2])].sum()),
    }


def step_with(fault) -> list[str]:
    """What is found of one forward and backward pass."""
    import torch

    with fake_cuda.pretended_cuda() as cuda:
        weight = torch.zeros(4, 2, device="cuda", requires_grad=True)
        states = torch.zeros(3, 4, device="cuda")
        try:
            fault(weight, states).backward()
            assert weight.grad.shape == (4, 2) and weight.grad.device.type == "cuda"
        except Exception as error:
            return [*cuda.waits, f"{type(error).__name__}: {error}"]
    return cuda.waits


def second_step(config, spoil=None) -> dict:
    """The run's own loop on three steps: of the second, where the host waits, by part (collect, update); or the error.

    spoil: what is done to each pass's comparison.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    from discobeta.data.tokens import load_or_tokenise
    from discobeta.method.stage import stage_class
    from discobeta.model import preflight
    from discobeta.model.layout import pairs_for
    from discobeta.model.pretrained import load_tokenizer
    from discobeta.run import load, loop

    kind = stage_class(config.stage)
    AcceleratorState._reset_state(reset_partial_state=True)
    data = load_or_tokenise(config, load_tokenizer(config))
    columns = kind.columns(config, data.parts())["train"]
    stage = kind.fresh(config, columns, given=load.given(config))
    preflight.check(stage.model, data, config, load_tokenizer(config))
    stage.check_data(data)
    accelerator = Accelerator(mixed_precision="no")
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = torch.device("cuda", 0)
    material = pairs_for(stage.model, config, data.train, columns)
    marks, collect, graded, clip = [], stage.collect, [], loop.clip_gradients
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    with fake_cuda.pretended_cuda() as cuda:
        assert accelerator.device.type == "cuda"

        def collect_between_marks(*arguments):
            marks.append(len(cuda.waits))
            work = collect(*arguments)
            marks.append(len(cuda.waits))
            return work

        def clip_watched(groups):
            trained = [weight for weight in stage.parameters() if weight.requires_grad]
            graded.append(bool(trained) and all(w.grad is not None and w.grad.device.type == "cuda" for w in trained))
            return clip(groups)

        stage.collect = collect_between_marks
        if spoil:
            compare = stage.compare
            stage.compare = lambda batch: spoil(compare(batch))
        loop.clip_gradients = clip_watched
        try:
            loop.fit(stage, material, None, config, accelerator, None, "")
        finally:
            loop.clip_gradients = clip
    assert all(weight.device.type == "cuda" for weight in stage.parameters())
    assert len(graded) >= config.max_steps and all(graded)
    return {"collect": cuda.waits[marks[2] : marks[3]], "update": cuda.waits[marks[3] : marks[4]]}


def settings_of(base: str, pairs: str, folder: Path, name: str, **changes) -> dict:
    return {
        "model_name_or_path": base, "dataset": pairs, "val_size": 4, "output_dir": str(folder / name),
        "tokenized_path": str(folder / f"tokens-{changes['stage'] == 'ppo'}"), "cutoff_len": 32, "max_steps": 3,
        "logging_steps": 3, "save_steps": 0, "per_device_train_batch_size": 8, "lora_rank": 4, "bf16": True,
    } | changes  # fmt: skip


def asks_for_the_loss(comparison):
    comparison.loss.sum().item()
    return comparison


def adds_a_tensor_of_the_cpu(comparison):
    import torch

    comparison.loss = comparison.loss + torch.ones(comparison.loss.shape)
    return comparison


def main(library: str, base: str, pairs: str, folder: Path) -> dict:
    fake_cuda.load(Path(library))
    from discobeta.design.config import RunConfig
    from discobeta.run.train import train

    def config_of(name: str, **changes) -> RunConfig:
        return RunConfig.from_mapping(settings_of(base, pairs, folder, name, **changes))[0]

    found = {f"planted: {name}": step_with(fault) for name, fault in planted_faults().items()}
    disco = {"add_disco_head": True, "disco_pref": True}
    train(config_of("judge", stage="rm", max_steps=1))
    train(config_of("judge-disco", stage="rm", max_steps=1, **disco))
    train(config_of("dpo-both", stage="dpo", max_steps=1, **BOTH))
    of_ppo = {"max_new_tokens": 3, "ppo_epochs": 2, "ppo_buffer_size": 2}
    for name, changes in CASES.items():
        if changes["stage"] == "ppo":
            judge = "judge-disco" if "disco_pref" in changes else "judge"
            changes = of_ppo | {"reward_model": str(folder / judge), "beta_head": str(folder / "dpo-both")} | changes
        found[name] = attempt(config_of(name, **changes))
    for spoil in (asks_for_the_loss, adds_a_tensor_of_the_cpu):
        name = spoil.__name__
        found[name] = attempt(config_of(name, stage="dpo"), spoil)
    return found


def attempt(*arguments) -> dict:
    try:
        return second_step(*arguments)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames[:-5:-1])
        return {"error": f"{type(error).__name__}: {str(error)[:300]} at {places}"}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:4], Path(sys.argv[4])), indent=1))
