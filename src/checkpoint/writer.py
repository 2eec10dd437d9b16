"""Write checkpoints while training continues: copy every tensor to host memory, then write the files in a thread.

Training waits for the copy alone, whose buffers are kept from one checkpoint to the next. A failed write is raised by
the next call of `poll`, `save` or `join`.
"""

from __future__ import annotations

import copy
import threading
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


class HostCopy:
    """Copies nested dicts and lists of tensors to host memory, into buffers that are allocated once.

    Tensors that share storage share it in the copy, too.
    """

    def __init__(self) -> None:
        self._buffer: dict[tuple, torch.Tensor] = {}

    def __call__(self, tree: Any, at: tuple = ()) -> Any:
        """A copy of `tree`, valid until the next copy at the same place `at`."""
        buffers: dict[tuple, torch.Tensor] = {}
        sources: list[torch.Tensor] = []

        def walk(value: Any, path: tuple) -> Any:
            if isinstance(value, torch.Tensor):
                key = (value.data_ptr(), value.shape, value.stride(), value.dtype, path if not value.numel() else ())
                if key not in buffers:
                    buffers[key] = self._host(path, value)
                    sources.append(value.detach())
                return buffers[key]
            if isinstance(value, dict):
                return {name: walk(item, (*path, name)) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(walk(item, (*path, index)) for index, item in enumerate(value))
            return copy.deepcopy(value)

        result = walk(tree, at)
        num_thread = torch.get_num_threads()
        torch.set_num_threads(1)  # on busy cores each of hundreds of small copies would wait for a second thread
        if sources:
            torch._foreach_copy_(list(buffers.values()), sources, non_blocking=True)
        torch.set_num_threads(num_thread)
        if any(tensor.is_cuda for tensor in sources):
            torch.cuda.current_stream().synchronize()
        return result

    def _host(self, path: tuple, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffer.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffer[path] = buffer
        return buffer


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread."""

    def __init__(self, saved_step: int | None = None) -> None:
        self.saved_step = saved_step  # step of the newest checkpoint that is known to be complete
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

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
        """Copy the state of this moment and begin to write it; arguments as of `save_checkpoint`.

        Frozen arguments are not copied again. Waits for the previous checkpoint. Raises CheckpointError if that one
        could not be written.
        """
        self.join()
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        for name, part in parts.items():
            if part is not None and not isinstance(part, Frozen):
                parts[name] = Frozen(self._copy(part.state_dict(), (name,)))
        state = copy.deepcopy(state)

        def write() -> None:
            try:
                save_checkpoint(run_folder, state=state, **parts, **options)
                self.saved_step = state.step
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written; returns at once."""
        if self._error is not None:
            self.join()

    def join(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError if the checkpoint could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
