"""Checkpoints: everything a resume needs, written beside and renamed, so that a crash never costs an older one.

    <run folder>/checkpoints/checkpoint-<step>/   model.safetensors  optimizer.pt  state.json  manifest.json
                                                  config.yaml  backbone.json
    <run folder>/checkpoints/best/                the same files (hard links) of the best checkpoint so far

A checkpoint's step is read from `state.json`, never from a folder's name. Nothing here runs code from a file: weights
are safetensors, the rest is read with `weights_only=True`. Rank 0 writes. The learning rate is a pure function of the
step, so there is no scheduler to save.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from src.checkpoint.checkpoint_files import fsync, swap_in, torch_load, torch_save, write_manifest
from src.checkpoint.folder import MODEL, OPTIMIZER, STATE, by_step, find_checkpoint, verify
from src.checkpoint.run_folder import find_run

logger = logging.getLogger("stage1.checkpoint")  # below the logger of src/utils/console.py

_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (disk full, read-only folder); every older one still loads."""


@dataclass
class TrainState:
    """What a resume needs besides weights and optimizer. Saved as `state.json`.

    No random generator is in it: what a step draws is seeded by (seed, step, rank), see src/train/step.py.
    """

    step: int = 0  # optimizer steps done
    data_position: int = 0  # next position in the data order
    best_metric: float | None = None  # lowest validation value so far, in the metric's unit
    best_step: int | None = None
    config_name: str = ""  # the run's --config-name; `auto` looks for it
    validation_due: bool = False  # a stop came between this step and the validation that belongs to it
    skipped_step: int = 0  # steps left out so far because the loss or gradient was not finite
    skipped_in_row: int = 0  # of them, those in a row up to this step
    tracker: dict[str, int] = field(default_factory=dict)  # Tracker.state(): journal offsets in bytes
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else can be written as JSON


def save_checkpoint(
    run_folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    scaler: Any = None,
    texts: Mapping[str, str] | None = None,
    keep: int = 3,
    is_best: bool = False,
) -> Path:
    """Write `checkpoints/checkpoint-<step>` of `run_folder`, make it `best` if asked, keep the newest `keep`.

    Give the bare model (no DDP or compile wrapper). `texts` (file name -> content) are sealed with the rest: what tells
    how to build the network. An older checkpoint is removed only after this one is complete; one
    of a later step is never touched.
    Raises CheckpointError where the disk refuses; then nothing of the new checkpoint remains and all older ones do.
    """
    assert keep >= 1
    parent = Path(run_folder) / "checkpoints"
    final = parent / f"checkpoint-{state.step}"
    temporary = parent / f"{_TEMPORARY}{final.name}"
    with _explained(final, temporary):
        parent.mkdir(exist_ok=True)
        _remove_leftovers(parent)
        temporary.mkdir()
        save_model(model, str(temporary / MODEL))
        scaler_state = None if scaler is None else scaler.state_dict()
        torch_save({"optimizer": optimizer.state_dict(), "scaler": scaler_state}, temporary / OPTIMIZER)
        (temporary / MODEL).chmod((temporary / OPTIMIZER).stat().st_mode)  # safetensors writes for the owner alone
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_manifest(temporary)
        swap_in(temporary, final)
        if is_best:
            _make_best(final)
    _prune(parent, final, state.step, keep)
    return final


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: Any = None,
    verified: bool = False,
) -> TrainState:
    """Verify the checkpoint folder `path` (unless `find_checkpoint` just has) and fill model, optimizer and scaler.

    Raises ValueError naming the file that is damaged, or what of the model or optimizer does not fit.
    """
    if not verified:
        verify(path)
    state = read_state(path)
    try:
        load_model(model, str(path / MODEL))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path / MODEL} does not fit this model: {error}; resume with the config that wrote it, "
            f"or take over the weights that fit with MODEL.init_from={path}"
        ) from error
    if optimizer is not None:
        saved = torch_load(path / OPTIMIZER)
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise ValueError(f"{path / OPTIMIZER} does not fit this optimizer: {error}") from error
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
    return state


def read_state(path: Path) -> TrainState:
    """The TrainState of the checkpoint folder `path`. Raises ValueError naming the file when it cannot be read."""
    try:
        data = json.loads((path / STATE).read_text(encoding="utf-8"))
        known = {f.name for f in fields(TrainState)}
        state = TrainState(**{k: v for k, v in data.items() if k in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error})") from error
    if not isinstance(state.step, int):
        raise ValueError(f"{path / STATE} has no whole number as step: {state.step!r}")
    return state


def is_newest(checkpoint: Path) -> bool:
    """Whether `checkpoint` lies in a run folder and no complete checkpoint there is of a later step."""
    if checkpoint.parent.name != "checkpoints":
        return False
    return read_state(checkpoint).step >= max(step for step, _ in by_step(checkpoint.parent))


def find_newest(root: Path, config_name: str) -> Path | None:
    """The newest complete checkpoint of the newest run of `config_name` below `root`; None where it has none yet."""
    run_folder = find_run(root, config_name)
    if run_folder is None or not (run_folder / "checkpoints").is_dir():
        return None
    try:
        return find_checkpoint(run_folder)
    except ValueError as error:
        logger.warning("%s; starting anew", error)
        return None


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(final: Path, temporary: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one CheckpointError, and leave no half-written folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        existing = next(p for p in final.parents if p.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error} ({free:.0f} MiB free there). Older checkpoints are untouched; "
            f"make room or make the folder writable, then resume with GENERAL.resume_path={final.parent.parent}"
        ) from error


def _make_best(checkpoint: Path) -> None:
    """Link the files of `checkpoint` into `best` (copy where the file system has no hard links)."""
    temporary = checkpoint.with_name(f"{_TEMPORARY}best")
    try:
        temporary.mkdir()
        for file in checkpoint.iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copyfile(file, temporary / file.name)
                fsync(temporary / file.name)
        fsync(temporary)
        swap_in(temporary, checkpoint.with_name("best"))
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_leftovers(parent: Path) -> None:
    """Remove what a killed process left half-written or replaced; a run folder has one writer (`lock_run_folder`)."""
    replaced = [folder for folder in parent.glob("*.old") if folder.with_suffix("").exists()]
    for folder in [*parent.glob(f"{_TEMPORARY}*"), *replaced]:
        shutil.rmtree(folder)


def _prune(parent: Path, newest: Path, step: int, keep: int) -> None:
    """Remove all but `newest` and the `keep - 1` before it; never `best`, never what cannot be read."""
    kept = 1
    for other_step, folder in by_step(parent):
        if folder == newest or not folder.name.startswith("checkpoint-"):
            continue
        if other_step > step or kept < keep:
            kept += other_step < step
            continue
        shutil.rmtree(folder, ignore_errors=True)
