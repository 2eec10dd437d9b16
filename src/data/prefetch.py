"""Batches on their way to the device, in a stream of their own beside the step that is computing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from src.batch import Batch


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, in their order.

    A step does not wait for the device, so the host asks for the next batch while the last step still computes: its
    copy from pinned memory then runs beside that step, and only the step that needs it waits for it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        moved.record_stream(current)
        yield moved
