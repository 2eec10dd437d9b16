"""Write checkpoints while training continues: copy every tensor to host memory, then write the files in a thread.

Training waits only for the copy, whose buffers are reused by the next checkpoint. A failed write is raised by
the next call of `poll`, `save` or `join`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.checkpoint.save import TrainState, save_checkpoint


@dataclass
class Frozen:
    """Stands in for a model, an optimizer or a scaler: its state at the time of the copy, in host memory."""

    value: Any

    def state_dict(self) -> Any:
        return self.value


def map_tensors(func: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """A copy of nested mappings, lists and tuples with `func` applied to every tensor."""
    if isinstance(tree, torch.Tensor):
        return func(tree)
    if isinstance(tree, Mapping):
        return {name: map_tensors(func, item) for name, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(func, item) for item in tree)
    return copy.deepcopy(tree)


class HostCopy:
    """Copies nested dicts and lists of tensors to host memory, into buffers that are allocated once.

    Tensors that share storage share it in the copy.
    """

    def __init__(self) -> None:
        self._buffer: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, tree: Any, at: str) -> Any:
        """A copy of `tree`, valid until the next copy at the same place `at`."""
        buffers: dict[tuple, torch.Tensor] = {}
        sources: list[torch.Tensor] = []

        def host_buffer(tensor: torch.Tensor) -> torch.Tensor:
            number = len(sources)
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, None if tensor.numel() else number)
            if key not in buffers:
                buffer = self._buffer.get((at, number))
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[key] = self._buffer[at, number] = buffer
                sources.append(tensor.detach())
            return buffers[key]

        result = map_tensors(host_buffer, tree)
        num_thread = torch.get_num_threads()
        torch.set_num_threads(1)  # on busy cores each of hundreds of small copies would wait for a second thread
        try:
            if sources:
                torch._foreach_copy_(list(buffers.values()), sources, non_blocking=True)
        finally:
            torch.set_num_threads(num_thread)
        if any(tensor.is_cuda for tensor in sources):
            torch.cuda.current_stream().synchronize()
        return result


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread."""

    def __init__(self, saved_step: int | None = None) -> None:
        self.saved_step = saved_step  # step of the newest checkpoint that is known to be complete
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        run_folder: Path,
        *,
        model: nn.Module | Frozen,
        optimizer: torch.optim.Optimizer | Frozen,
        scaler: Any,
        state: TrainState,
        **options: Any,
    ) -> None:
        """Copy the state of this moment and begin to write it; arguments as for `save_checkpoint`.

        Frozen arguments are not copied again. Waits for the previous checkpoint. Raises CheckpointError if that one
        could not be written.
        """
        self.join()
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        for name, part in parts.items():
            if part is not None and not isinstance(part, Frozen):
                parts[name] = Frozen(self._copy(part.state_dict(), name))
        state = copy.deepcopy(state)

        def write() -> None:
            save_checkpoint(run_folder, state=state, **parts, **options)
            self.saved_step = state.step

        self._writing = self._thread.submit(write)

    def poll(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written; returns at once."""
        if self._writing is not None and self._writing.done():
            self.join()

    def join(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError if the checkpoint could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
