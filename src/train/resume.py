"""Where a run goes on from: `GENERAL.resume_path`, looked up by the main process and known to all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from src.checkpoint.folder import CONFIG, find_checkpoint
from src.checkpoint.save import find_newest, is_newest, read_state
from src.config import Config
from src.train.preflight import AUTO
from src.utils.console import logger

# Keys below MODEL that give the network its shape: weights written under other values do not fit.
SHAPE_KEYS = {
    "backbone": ("hidden_size", "num_layer", "num_head", "patch_size", "swiglu"),
    "handec": ("dim", "num_layer", "num_head", "dim_head", "dim_mlp"),
}
# Keys that say which samples a run is trained on; `auto` goes on with no run that has others.
DATA_KEYS = ("DATA.root", "DATA.stride", "DATA.train.source")
# Sections and keys that do not change what is trained.
FREE_KEYS = (
    *("AIM", "DATA.index_dir", "DATA.max_bad_fraction", "GENERAL.description", "GENERAL.keep_checkpoint"),
    *("GENERAL.log_step", "GENERAL.num_worker", "GENERAL.output_root", "GENERAL.prefetch_factor"),
    *("GENERAL.resume_path", "GENERAL.vis_step", "MODEL.init_from"),
)


class RunComplete(Exception):
    """`GENERAL.resume_path=auto` found a run that has done all its steps."""


@dataclass
class Origin:
    """What a run starts from."""

    checkpoint: Path | None = None  # verified; None: the run starts anew
    in_place: bool = False  # it goes on in the checkpoint's run folder; else in a new one


def find_origin(cfg: Config, config_name: str, accelerator: Accelerator) -> Origin:
    """The origin that the configuration asks for, the same on every process.

    Raises ValueError where the path holds no complete checkpoint, the run has no step left, or the network has changed;
    RunComplete where `auto` finds a run that has no step left.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [_look(cfg, config_name)]
        except (ValueError, RunComplete) as error:
            answer = [error]
    origin = broadcast_object_list(answer)[0]
    if isinstance(origin, Exception):
        raise origin
    return origin


def _look(cfg: Config, config_name: str) -> Origin:
    asked = cfg.GENERAL.resume_path
    if asked is None:
        return Origin()
    if asked == AUTO:
        checkpoint = find_newest(Path(cfg.GENERAL.output_root), config_name)
        if checkpoint is None:
            where = f"the newest run of {config_name} below {cfg.GENERAL.output_root}"
            logger.info(f"GENERAL.resume_path=auto: no complete checkpoint yet in {where}; starting anew")
            return Origin()
    else:
        checkpoint = find_checkpoint(asked)
    if changes := list(network_changes(checkpoint, cfg)):
        raise ValueError(
            "\n".join(changes) + f"\nResume with the values of the checkpoint {checkpoint}, or take over the weights "
            f"that fit with MODEL.init_from={checkpoint} and without GENERAL.resume_path"
        )
    changes = setting_changes(checkpoint, cfg)
    if asked == AUTO:
        _check_data(checkpoint, changes)
    _check_steps(cfg, checkpoint)
    logger.info(f"going on from {checkpoint}")
    if changes:
        logger.warning("with other settings than it was written with: %s", "; ".join(changes.values()))
    # A run folder goes on by its newest complete checkpoint; a single checkpoint may have been an older one.
    by_name = asked != AUTO and (Path(asked).resolve() == checkpoint.resolve() or Path(asked).name == "best")
    return Origin(checkpoint, in_place=not by_name or is_newest(checkpoint))


def _check_steps(cfg: Config, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    if state.step < cfg.GENERAL.total_step or state.validation_due:
        return
    if cfg.GENERAL.resume_path == AUTO:
        raise RunComplete(f"{checkpoint} is at step {state.step}: the run is complete, nothing is left to do")
    raise ValueError(
        f"GENERAL.total_step={cfg.GENERAL.total_step}: {checkpoint} is at step {state.step} already, "
        f"nothing is left to do; ask for more steps"
    )


def setting_changes(checkpoint: Path, cfg: Config) -> dict[str, str]:
    """Key -> words, for each setting that changes what is trained and differs from the checkpoint's."""
    if not (checkpoint / CONFIG).is_file():
        return {}
    saved = _flat(OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG)))
    now = _flat(OmegaConf.to_container(OmegaConf.create(asdict(cfg))))
    free = tuple(f"{key}." for key in FREE_KEYS)
    return {
        key: f"{key}={now[key]} (was {saved[key]})"
        for key in sorted(saved.keys() & now.keys())
        if saved[key] != now[key] and not f"{key}.".startswith(free)
    }


def _flat(tree: Any, above: str = "") -> dict[str, Any]:
    """{"A": {"b": 1}} -> {"A.b": 1}; named sources stay together."""
    if not isinstance(tree, dict) or above in DATA_KEYS:
        return {above: tree}
    return {
        key: value
        for name, below in tree.items()
        for key, value in _flat(below, f"{above}.{name}" if above else name).items()
    }


def _check_data(checkpoint: Path, changes: dict[str, str]) -> None:
    """Raises ValueError where the newest run of this configuration was trained on something else."""
    if other := [changes[key] for key in DATA_KEYS if key in changes]:
        run_folder = checkpoint.parent.parent
        raise ValueError(
            f"GENERAL.resume_path=auto: the newest run, {run_folder}, has other data: {'; '.join(other)}\n"
            f"Go on with it all the same by GENERAL.resume_path={run_folder}, name another run, or start anew without "
            "GENERAL.resume_path; runs with a GENERAL.output_root of their own do not get in each other's way"
        )


def network_changes(checkpoint: Path, cfg: Config) -> Iterator[str]:
    """One line for each key of the network's shape that differs from what the checkpoint was written with."""
    if not (checkpoint / CONFIG).is_file():
        return  # written before checkpoints carried their configuration
    saved, now = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG))["MODEL"], asdict(cfg.MODEL)
    for section, names in SHAPE_KEYS.items():
        for name in names:
            before, after = saved.get(section, {}).get(name), now[section][name]
            if before is not None and before != after:
                yield f"MODEL.{section}.{name}={after}: the checkpoint was written with {before}"
