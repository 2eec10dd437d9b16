"""Read small results of a step without waiting for the device: copy them aside, read them a step later."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

LAG = 1  # pushes after which a value is read


class DelayedRead(Generic[T]):
    """A queue of small device tensors, each with a context object, that are read as numbers LAG pushes later.

    Every process pushes at the same points and so reads the same values at the same points: after a collective
    reduction all processes take the same decision.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None, T]] = deque()

    def push(self, value: torch.Tensor, context: T) -> list[tuple[list[float], T]]:
        """Add a vector; returns those that are due, oldest first. Waits only for one that is LAG pushes old."""
        event = None
        if value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((value, event, context))
        return self._read(LAG)

    def flush(self) -> list[tuple[list[float], T]]:
        """Read everything that is left; waits for the device."""
        return self._read(0)

    def _read(self, keep: int) -> list[tuple[list[float], T]]:
        due = []
        while len(self._waiting) > keep:
            value, event, context = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            due.append((value.tolist(), context))
        return due
