"""discobeta: a reproducible ablation of Gaussian rewards (Disco) and dynamic beta (LeDPO)."""

__version__ = "0.1.0"

_LAZY = {
    "load_policy": "discobeta.run.load",
    "load_reward_model": "discobeta.run.load",
    "Arm": "discobeta.design.arms",
    "UserError": "discobeta.errors",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    """Import on first use: `import discobeta.losses` needs torch and not transformers."""
    if name not in _LAZY:
        raise AttributeError(f"module 'discobeta' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
