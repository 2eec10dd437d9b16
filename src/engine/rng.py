"""The state of a process's global random generators, in a form that a checkpoint may hold.

A checkpoint must load with `weights_only=True`, so the states are stored as tensors, numbers, tuples and strings.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """State of this process's global generators: Python, numpy, torch CPU and every CUDA device."""
    kind, key, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(saved: dict[str, Any]) -> None:
    """Put the state of `capture_rng` back. CUDA states are restored where the number of devices is the same."""
    random.setstate(saved["python"])
    kind, key, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
