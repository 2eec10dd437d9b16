"""Writes checkpoints while training goes on: a copy of every tensor in host memory, then a thread with the files.

The copy goes into buffers that are kept from one checkpoint to the next. On a GPU the loop stands still for it. On a
CPU the thread makes that of weights and moments too: until the optimizer's next step nobody changes them, and that step
waits for whatever is left (`settle`). A disk that refuses is told by the next call of `poll`, `save` or `join`.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.checkpoint.save import TrainState, save_checkpoint


@dataclass
class Frozen:
    """Stands in for a model, an optimizer or a scaler: what it was when the copy was made, in host memory."""

    value: Any

    def state_dict(self) -> Any:
        return self.value


class HostCopy:
    """Copies trees of tensors to host memory; memory is taken once. Tensors that share storage still do in the copy."""

    def __init__(self) -> None:
        self._buffer: dict[tuple, torch.Tensor] = {}

    def reserve(self, tree: Any, at: tuple = ()) -> None:
        """Take the memory for trees like this one, so that the first copy is as quick as the others."""
        for path, tensor in _tensors(tree, at):
            self._host(path, tensor).zero_()

    def __call__(self, tree: Any, at: tuple = ()) -> Any:
        """A copy of dicts, lists and tensors. Valid until the next copy at the same place."""
        seen: dict[tuple, torch.Tensor] = {}
        source: list[torch.Tensor] = []
        copies: list[torch.Tensor] = []

        def walk(value: Any, path: tuple) -> Any:
            if isinstance(value, torch.Tensor):
                key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
                if not value.numel() or key not in seen:
                    seen[key] = self._host(path, value)
                    source.append(value.detach())
                    copies.append(seen[key])
                return seen[key]
            if isinstance(value, dict):
                return {name: walk(item, (*path, name)) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(walk(item, (*path, index)) for index, item in enumerate(value))
            return copy.deepcopy(value)

        result = walk(tree, at)
        if source:
            with _one_thread():
                torch._foreach_copy_(copies, source, non_blocking=True)
        if any(tensor.is_cuda for tensor in source):
            torch.cuda.current_stream().synchronize()
        return result

    def _host(self, path: tuple, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffer.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffer[path] = buffer
        return buffer


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let this thread copy alone: where cores are busy, hundreds of small copies each wait for a helper to wake up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tensors(tree: Any, path: tuple) -> Iterator[tuple[tuple, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for name, item in tree.items():
            yield from _tensors(item, (*path, name))
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from _tensors(item, (*path, index))


def _is_live(part: Any) -> bool:
    return part is not None and not isinstance(part, Frozen)


def _without(tree: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


class CheckpointWriter:
    """One checkpoint at a time, in a thread."""

    def __init__(self, saved_step: int | None = None) -> None:
        self.saved_step = saved_step  # step of the newest checkpoint that is known to be whole
        self._copy = HostCopy()
        self._reserved = False
        self._copied = threading.Event()  # not set while the thread copies what the optimizer's next step will change
        self._copied.set()
        self._hooked: weakref.ref | None = None  # the optimizer whose steps wait for that
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the host memory in the background, once. Call when the optimizer has its moments, after a step."""
        if self._reserved:
            return
        self._reserved = True
        trees = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self._start(lambda: [self._copy.reserve(tree, (name,)) for name, tree in trees.items()])

    def save(
        self,
        run_folder: Path,
        *,
        model: nn.Module | Frozen,
        optimizer: torch.optim.Optimizer | Frozen,
        scaler: Any,
        state: TrainState,
        **how: Any,
    ) -> None:
        """Begin to write a checkpoint of this moment. Arguments as of `save_checkpoint`.

        What is frozen already is taken as it is. Waits for the one before. Raises CheckpointError where that one could
        not be written.
        """
        self.join()
        self._reserved = True
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        values = {name: part.state_dict() for name, part in parts.items() if _is_live(part)}
        late = self._left_to_the_thread(values, model, optimizer)
        early = {name: self._copy(_without(tree, late.get(name, ())), (name,)) for name, tree in values.items()}
        state = copy.deepcopy(state)

        def write() -> None:
            try:
                copies = {name: {**early[name], **self._copy(tree, (name,))} for name, tree in late.items()}
            finally:
                self._copied.set()
            frozen = {name: Frozen(tree) for name, tree in {**early, **copies}.items()}
            save_checkpoint(run_folder, state=state, **{**parts, **frozen}, **how)
            self.saved_step = state.step

        self._copied.clear()
        self._start(write)

    def settle(self) -> None:
        """Wait until the copy is complete; the optimizer whose moments are in it does so before each step."""
        self._copied.wait()

    def _left_to_the_thread(
        self, values: dict[str, dict[str, Any]], model: nn.Module | Frozen, optimizer: torch.optim.Optimizer | Frozen
    ) -> dict[str, dict[str, Any]]:
        """Of the values what nobody changes before the optimizer's next step, which waits for the copy from now on:
        weights and moments that lie in host memory."""
        if not (_is_live(model) and _is_live(optimizer)) or any(p.device.type != "cpu" for p in model.parameters()):
            return {}
        optimizer = getattr(optimizer, "optimizer", optimizer)  # within Accelerate's wrapper
        if self._hooked is None or self._hooked() is not optimizer:
            optimizer.register_step_pre_hook(lambda *_: self.settle())
            self._hooked = weakref.ref(optimizer)
        weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return {
            "model": {name: value for name, value in values["model"].items() if name in weights},
            "optimizer": {"state": values["optimizer"]["state"]},
        }

    def poll(self) -> None:
        """Raises CheckpointError where a checkpoint could not be written. Costs nothing."""
        if self._error is not None:
            self.join()

    def join(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _start(self, work: Any) -> None:
        def run() -> None:
            time.sleep(0.001)  # lets go of Python's lock, so that the loop goes on first
            try:
                work()
            except Exception as error:
                self._error = error

        assert self._thread is None
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
