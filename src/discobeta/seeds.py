"""One random stream per purpose, each derived from (seed, purpose).

Nothing in the package draws from a stream that another purpose also draws from, so building a
head, adding an arm or resuming at step 117 cannot move anybody else's random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on (seed, purpose) and on nothing else."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int):
    """A CPU torch.Generator of its own for one purpose."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))


def uniforms(seed: int, *purpose: str | int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) of one purpose, float64, as an array of `shape`."""
    return np.random.default_rng(derive(seed, *purpose)).random(shape)


def restart_global_stream(device: Any, seed: int, *purpose: str | int) -> None:
    """Set the stream that dropout on `device` draws from; `torch.manual_seed` for one device, and 1 ms quicker."""
    import torch

    torch.default_generator.manual_seed(derive(seed, *purpose))
    if device.type == "cuda":
        torch.cuda.manual_seed(derive(seed, *purpose))


@contextmanager
def global_stream(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run code that can only draw from torch's global stream, and leave that stream untouched."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(derive(seed, *purpose))
        yield
