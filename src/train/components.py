"""The run folder and the texts that describe a run in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from src.checkpoint.folder import BACKBONE, CONFIG
from src.checkpoint.run_folder import create_run_folder, write_text_atomic
from src.config import Config
from src.model.net import PoseNet


def make_run_folder(cfg: Config, config_name: str, accelerator: Accelerator) -> Path:
    """A new run folder, made by the main process and known to all, with the resolved configuration in it."""
    answer: list[str | None] = [None]
    if accelerator.is_main_process:
        folder = create_run_folder(Path(cfg.GENERAL.output_root), config_name)
        write_config(cfg, folder / "config.yaml")
        answer = [str(folder)]
    return Path(broadcast_object_list(answer)[0])


def write_config(cfg: Config, path: Path) -> None:
    """The resolved configuration, as it is in force."""
    write_text_atomic(path, _config_yaml(cfg))


def _config_yaml(cfg: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def network_texts(cfg: Config, net: PoseNet) -> dict[str, str]:
    """File name -> content of what a checkpoint tells about how to build its network."""
    return {CONFIG: _config_yaml(cfg), BACKBONE: json.dumps(net.backbone.shape(), indent=1)}
