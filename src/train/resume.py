"""Where a run starts: `GENERAL.resume_path`, looked up by the main process and broadcast to the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from src.checkpoint.folder import CONFIG, find_checkpoint
from src.checkpoint.save import find_newest, is_newest, read_state
from src.config import Config, flatten, housekeeping_keys
from src.config_parse import FREE_FORM
from src.train.preflight import AUTO
from src.utils.console import logger

# The network's shape: weights saved with other values do not fit.
SHAPE_KEYS = (
    *(f"MODEL.backbone.{name}" for name in ("hidden_size", "num_layer", "num_head", "patch_size", "swiglu")),
    *(f"MODEL.handec.{name}" for name in ("dim", "num_layer", "num_head", "dim_head", "dim_mlp")),
)
# The training data: `auto` refuses a run with other values.
DATA_KEYS = ("DATA.root", "DATA.stride", "DATA.train.source")


class RunComplete(Exception):
    """`GENERAL.resume_path=auto` found a run that has done all its steps."""


def find_origin(cfg: Config, config_name: str, accelerator: Accelerator) -> tuple[Path | None, bool]:
    """What the run starts from, the same on every process: a verified checkpoint (None: from scratch), and whether to
    continue in its run folder instead of a new one.

    Raises ValueError where the path has no complete checkpoint, no step is left, or the network has another shape;
    RunComplete where `auto` finds a run with no step left.
    """
    message: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            message = [_look_up(cfg, config_name)]
        except (ValueError, RunComplete) as error:
            message = [error]
    origin = broadcast_object_list(message)[0]
    if isinstance(origin, Exception):
        raise origin
    return origin


def _look_up(cfg: Config, config_name: str) -> tuple[Path | None, bool]:
    path = cfg.GENERAL.resume_path
    if path is None:
        return None, False
    if path == AUTO:
        checkpoint = find_newest(Path(cfg.GENERAL.output_root), config_name)
        if checkpoint is None:
            where = f"the newest run of {config_name} below {cfg.GENERAL.output_root}"
            logger.info(f"GENERAL.resume_path=auto: no complete checkpoint yet in {where}; starting a new run")
            return None, False
    else:
        checkpoint = find_checkpoint(path)
    changes = changed_settings(checkpoint, cfg)
    _check_changes(checkpoint, changes, is_auto=path == AUTO)
    _check_steps(cfg, checkpoint)
    logger.info(f"resuming from {checkpoint}")
    if changes:
        logger.warning("changed settings: %s", "; ".join(changes.values()))
    # A run folder resumes from its newest complete checkpoint; a single checkpoint may be an older one.
    is_single = path != AUTO and (Path(path).resolve() == checkpoint.resolve() or Path(path).name == "best")
    return checkpoint, not is_single or is_newest(checkpoint)


def changed_settings(checkpoint: Path, cfg: Config) -> dict[str, str]:
    """Dotted key -> both values in words, for each setting of training that differs from the checkpoint's."""
    if not (checkpoint / CONFIG).is_file():
        return {}  # an early version wrote checkpoints without their configuration
    saved = flatten(OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG)), whole=FREE_FORM)
    now = flatten(asdict(cfg), whole=FREE_FORM)
    ignored = {*housekeeping_keys(), "MODEL.init_from"}  # only a new run reads init_from
    return {
        key: f"{key}={now[key]} in this command, {saved[key]} in the checkpoint"
        for key in sorted((saved.keys() & now.keys()) - ignored)
        if saved[key] != now[key]
    }


def _check_changes(checkpoint: Path, changes: dict[str, str], is_auto: bool) -> None:
    """Refuse another shape of the network, and with `GENERAL.resume_path=auto` other training data."""

    def listed(keys: Iterable[str]) -> str:
        return "".join(f"    {changes[key]}\n" for key in keys if key in changes)

    if lines := listed(SHAPE_KEYS):
        raise ValueError(
            f"{checkpoint} has a network of another shape:\n{lines}"
            f"Resume with the checkpoint's values, or start a new run from the weights that fit with "
            f"MODEL.init_from={checkpoint} and without GENERAL.resume_path"
        )
    if is_auto and (lines := listed(DATA_KEYS)):
        run_folder = checkpoint.parent.parent
        raise ValueError(
            f"GENERAL.resume_path=auto: the newest run, {run_folder}, was trained on different data:\n{lines}"
            f"Resume it anyway with GENERAL.resume_path={run_folder}, name another run, or start a new one without "
            "GENERAL.resume_path. To keep runs apart, give each its own GENERAL.output_root"
        )


def _check_steps(cfg: Config, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    if state.step < cfg.GENERAL.total_step or state.validation_due:
        return
    if cfg.GENERAL.resume_path == AUTO:
        raise RunComplete(f"{checkpoint} is at step {state.step}: the run is complete, nothing is left to do")
    raise ValueError(
        f"GENERAL.total_step={cfg.GENERAL.total_step}: {checkpoint} is already at step {state.step}, "
        f"nothing is left to do; raise GENERAL.total_step"
    )
