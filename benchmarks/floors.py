"""Floating-point operations per pair that each way of training needs: docs/performance.md derives them.

python benchmarks/floors.py
"""

from __future__ import annotations

from discobeta.run.flops import SHAPES, Shape, shape_of

QWEN3_0_6B = shape_of(SHAPES["Qwen/Qwen3-0.6B"])
HARMLESS = (113, 39, 49)
"""Mean tokens of prompt, chosen and rejected in hh-rlhf's harmless subset, by Qwen3's tokenizer."""


def flops_per_pair(
    shape: Shape,
    lengths: tuple[int, int, int] = HARMLESS,
    *,
    live_reference: bool,
    checkpointing: bool = False,
    shared_prompt: bool = False,
    recomputed_head: bool = False,
) -> int:
    """Of one dpo step with frozen weights: 2 per weight and token forward, 2 for the gradient of the input, none for
    that of the weights. Attention's own products and LoRA's are left out: a few per cent at these lengths.

    checkpointing: the body's forward is computed again in backward. recomputed_head: that of the LM head is, so that
    no (tokens, vocabulary) tensor is kept. shared_prompt: prompt once per pair instead of once per response.
    """
    prompt, chosen, rejected = lengths
    tokens = (1 if shared_prompt else 2) * prompt + chosen + rejected
    body = 2 + 2 + 2 * checkpointing + 2 * live_reference
    head = 2 + 2 + 2 * recomputed_head + 2 * live_reference
    return body * shape.body * tokens + head * shape.head * (chosen + rejected)


WAYS = {
    "TRL, stock (A0)": {"live_reference": True, "checkpointing": True, "recomputed_head": True},
    "TRL, no checkpointing (A1)": {"live_reference": True, "recomputed_head": True},
    "TRL, precomputed reference (A2)": {"live_reference": False, "recomputed_head": True},
    "cached reference": {"live_reference": False},
    "cached reference, prompt once": {"live_reference": False, "shared_prompt": True},
    "the same, head computed again": {"live_reference": False, "shared_prompt": True, "recomputed_head": True},
}

if __name__ == "__main__":
    for name, way in WAYS.items():
        print(f"{name:36}{flops_per_pair(QWEN3_0_6B, **way) / 1e9:8.0f} G")
