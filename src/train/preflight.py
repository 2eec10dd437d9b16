"""Checks what a run needs (weights, hand model, shards, checkpoint) before anything heavy is imported or written.

Imports neither torch nor transformers, so that a wrong path is reported within two seconds, with all other problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from src.checkpoint.folder import resume_refusal
from src.config import Config, ConfigError, named_sources
from src.data.shards.paths import resolve_source
from src.hand.load import STANDIN, hand_model_problem

AUTO = "auto"  # GENERAL.resume_path: the newest run of this configuration
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def check_files(cfg: Config) -> None:
    """Raises ConfigError if inputs of the run are missing: for each problem the key, its value and the fix."""
    problems = [*_backbone_problems(cfg), *_hand_model_problems(cfg), *_source_problems(cfg), *_resume_problems(cfg)]
    if problems:
        raise ConfigError("\n".join(problems))


def _backbone_problems(cfg: Config) -> Iterator[str]:
    backbone = cfg.MODEL.backbone
    folder, patch_size = Path(backbone.backbone_str), backbone.patch_size
    has_weights = (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES)
    if has_weights and not backbone.random_init:
        patch_size = json.loads((folder / "config.json").read_text())["patch_size"]
    elif not backbone.random_init:
        what = "there are no weights in this folder" if folder.is_dir() else "there is no such folder"
        yield (
            f"MODEL.backbone.backbone_str={backbone.backbone_str}: {what}. Download the weights with\n"
            f"    hf download facebook/{folder.name} --local-dir {backbone.backbone_str}\n"
            f"or start from random weights with MODEL.backbone.random_init=true"
        )
    if cfg.MODEL.img_size % patch_size:
        nearest = max(1, round(cfg.MODEL.img_size / patch_size)) * patch_size
        yield (
            f"MODEL.img_size={cfg.MODEL.img_size}: the backbone cuts patches of {patch_size} px, so the side must be "
            f"a multiple of {patch_size}; try MODEL.img_size={nearest}"
        )


def _hand_model_problems(cfg: Config) -> Iterator[str]:
    if problem := hand_model_problem(cfg.MODEL.hand_model):
        yield f"MODEL.hand_model={problem}, or use the hand that ships with MODEL.hand_model={STANDIN}"


def _source_problems(cfg: Config) -> Iterator[str]:
    if cfg.DATA.demo is not None:
        return  # rendered on first use
    for key, source in (("DATA.train.source", cfg.DATA.train.source), ("DATA.val.source", cfg.DATA.val.source)):
        patterns = [pattern for named in named_sources(source) for pattern in named.patterns]
        try:
            resolve_source(cfg.DATA.root, patterns, key=key)
        except ValueError as error:
            yield str(error)


def _resume_problems(cfg: Config) -> Iterator[str]:
    resume_path = None if cfg.GENERAL.resume_path == AUTO else cfg.GENERAL.resume_path
    for key, path in (("GENERAL.resume_path", resume_path), ("MODEL.init_from", cfg.MODEL.init_from)):
        if path is not None and not Path(path).is_dir():
            or_auto = ", or auto for the newest run of this config" if key == "GENERAL.resume_path" else ""
            yield (
                f"{key}={path}: there is no such folder; give a run folder below {cfg.GENERAL.output_root}/ "
                f"or one of its checkpoints/checkpoint-<step>{or_auto}"
            )
    if resume_path is not None and (refusal := resume_refusal(Path(resume_path))):
        yield f"GENERAL.resume_path={refusal}"
