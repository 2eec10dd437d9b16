"""Write checkpoints, and read them back to resume training. A crash while writing never costs an older checkpoint.

    <run folder>/checkpoints/checkpoint-<step>/   the files that src/checkpoint/folder.py lists
    <run folder>/checkpoints/best/                the same files (hard links) of the best checkpoint so far

The step is read from `state.json`, never from a folder's name. No code is executed from a file: weights are
safetensors, the optimizer state is read with `weights_only=True`. Only rank 0 writes. The learning rate is a pure
function of the step, so there is no scheduler to save.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from src.checkpoint.folder import (
    BACKBONE,
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    by_step,
    find_checkpoint,
    fsync,
    read_state_file,
    swap_in,
    write_manifest,
)
from src.checkpoint.network import load_weights
from src.checkpoint.run_folder import config_yaml, find_run
from src.config import Config
from src.model.net import PoseNet

logger = logging.getLogger("stage1.checkpoint")  # below the logger of src/utils/console.py

_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (disk full, read-only folder). Every older one still loads."""


@dataclass
class TrainState:
    """What resuming needs besides weights and optimizer; saved as `state.json`.

    It holds no random generator: each step is seeded by (seed, step, rank), see src/train/step.py.
    """

    step: int = 0  # optimizer steps done
    data_position: int = 0  # next position in the data order
    best_metric: float | None = None  # lowest validation value so far, in the metric's unit
    best_step: int | None = None
    config_name: str = ""  # the run's --config-name; GENERAL.resume_path=auto searches for it
    validation_due: bool = False  # the run was stopped between this step and the validation that belongs to it
    skipped_step: int = 0  # steps skipped so far because the loss or gradient was not finite
    skipped_in_row: int = 0  # how many of them are consecutive, up to this step
    tracker: dict[str, int] = field(default_factory=dict)  # Tracker.state(): journal offsets in bytes
    extra: dict[str, Any] = field(default_factory=dict)  # anything else that is valid JSON


def network_texts(cfg: Config, net: PoseNet) -> dict[str, str]:
    """File name -> content of the text files that describe the network in a checkpoint."""
    return {CONFIG: config_yaml(cfg), BACKBONE: json.dumps(net.backbone.shape(), indent=1)}


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
    """Write `checkpoints/checkpoint-<step>` of `run_folder`, link it as `best` if requested, keep the newest `keep`.

    An older checkpoint is removed only after this one is complete; checkpoints of a later step are never touched.

    Args:
        model: without DDP or compile wrapper.
        texts: file name -> content of further files, sealed by the manifest too; see `network_texts`.

    Raises:
        CheckpointError: the disk refuses. Nothing of the new checkpoint remains, all older ones do.
    """
    assert keep >= 1
    parent = run_folder / "checkpoints"
    final = parent / f"checkpoint-{state.step}"
    temporary = parent / f"{_TEMPORARY}{final.name}"
    try:
        parent.mkdir(exist_ok=True)
        _remove_leftovers(parent)
        temporary.mkdir()
        save_model(model, str(temporary / MODEL))
        scaler_state = None if scaler is None else scaler.state_dict()
        with open(temporary / OPTIMIZER, "wb") as file:
            torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler_state}, file)
        (temporary / MODEL).chmod((temporary / OPTIMIZER).stat().st_mode)  # safetensors makes it readable by owner only
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_manifest(temporary)
        swap_in(temporary, final)
        if is_best:
            _make_best(final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(parent / f"{_TEMPORARY}best", ignore_errors=True)
        # torch.save hides the OSError of a failed write behind a RuntimeError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        existing = next(p for p in final.parents if p.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason} ({free:.0f} MiB free there). Older checkpoints are untouched; "
            f"make room or make the folder writable, then resume with GENERAL.resume_path={run_folder}"
        ) from error
    _prune(parent, final, state.step, keep)
    return final


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: Any = None,
) -> TrainState:
    """Fill model, optimizer and scaler from a checkpoint that `find_checkpoint` has verified.

    Raises ValueError naming the tensors of model or optimizer that do not fit.
    """
    state = read_state(path)
    try:
        load_weights(model, path)
    except ValueError as error:
        raise ValueError(
            f"{error}; resume with the config that wrote it, or load the weights that fit with MODEL.init_from={path}"
        ) from error
    if optimizer is not None:
        saved = _torch_load(path / OPTIMIZER)
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise ValueError(f"{path / OPTIMIZER} does not fit this optimizer: {error}") from error
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
    return state


def read_state(path: Path) -> TrainState:
    """The TrainState of the checkpoint folder `path`; unknown keys are ignored. Raises ValueError naming the file."""
    known = {f.name for f in fields(TrainState)}
    return TrainState(**{k: v for k, v in read_state_file(path).items() if k in known})


def is_newest(checkpoint: Path) -> bool:
    """Whether `checkpoint` is in a run folder that holds no complete checkpoint of a later step."""
    is_in_run = checkpoint.parent.name == "checkpoints"
    return is_in_run and read_state(checkpoint).step >= max(step for step, _ in by_step(checkpoint.parent))


def find_newest(root: Path, config_name: str) -> Path | None:
    """The newest complete checkpoint of the newest run of `config_name` below `root`; None without any."""
    run_folder = find_run(root, config_name)
    if run_folder is None or not (run_folder / "checkpoints").is_dir():
        return None
    try:
        return find_checkpoint(run_folder)
    except ValueError as error:
        logger.warning("%s; starting a new run", error)
        return None


def _torch_load(path: Path) -> Any:
    """`torch.load` of tensors and plain containers; ValueError for anything that would execute code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a file of tensors that we wrote; refused: {error}") from error


def _make_best(checkpoint: Path) -> None:
    """Hard-link the files of `checkpoint` into `best`; copy them on file systems without hard links."""
    temporary = checkpoint.with_name(f"{_TEMPORARY}best")
    temporary.mkdir()
    for file in checkpoint.iterdir():
        try:
            os.link(file, temporary / file.name)
        except OSError:
            shutil.copyfile(file, temporary / file.name)
            fsync(temporary / file.name)
    fsync(temporary)
    swap_in(temporary, checkpoint.with_name("best"))


def _remove_leftovers(parent: Path) -> None:
    """Remove folders that a killed process left incomplete or replaced. Safe: a locked run folder has one writer."""
    replaced = [folder for folder in parent.glob("*.old") if folder.with_suffix("").exists()]
    for folder in [*parent.glob(f"{_TEMPORARY}*"), *replaced]:
        shutil.rmtree(folder)


def _prune(parent: Path, newest: Path, step: int, keep: int) -> None:
    """Remove all but `newest` and the `keep - 1` before it; never `best`, never folders that cannot be read."""
    earlier = [
        folder
        for other_step, folder in by_step(parent)
        if other_step <= step and folder != newest and folder.name.startswith("checkpoint-")
    ]
    for folder in earlier[keep - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
