"""The configuration of an evaluation: the checkpoint's, with the command line's changes. Imports no torch, no Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.config import Config, ConfigError, flatten, named_sources
from src.config_parse import is_known_key, parse_config
from src.data.shards.paths import resolve_source
from src.hand.load import hand_model_problem

_DATA_LOCATION = ("DATA.root", "DATA.val.source", "DATA.train.source")
_WHOLE = ("DATA.val.source", "DATA.train.source")  # free-form mappings: replaced, never merged


def evaluation_config(
    saved: Mapping[str, Any], defaults: dict[str, Any], changes: Mapping[str, Any], has_data_group: bool
) -> Config:
    """The checked configuration.

    Args:
        saved: the checkpoint's. Keys unknown to this version are ignored.
        defaults: `config/stage1-base.yaml` with the command line's data group, for missing keys; modified in place.
        changes: dotted key -> value, from the command line.
        has_data_group: take DATA from `defaults` instead of the checkpoint.

    Raises:
        ConfigError: lists every wrong key.
    """
    tree = defaults
    for key, value in flatten(saved, _WHOLE).items():
        if is_known_key(key) and not (has_data_group and key.startswith("DATA.")):
            _set(tree, key, value)
    if any(key in _DATA_LOCATION for key in changes) and not any(key.startswith("DATA.demo") for key in changes):
        tree["DATA"]["demo"] = None  # not the demo's own shards
    for key, value in changes.items():
        _set(tree, key, value)
    tree["DATA"]["train"]["source"] = tree["DATA"]["val"]["source"]  # an evaluation does not read it
    tree["GENERAL"]["resume_path"] = tree["MODEL"]["init_from"] = None
    return parse_config(tree)


def check_files_exist(cfg: Config) -> None:
    """Refuse a hand model or patterns of shards that are not there. Raises ConfigError with a line a problem."""
    problems = []
    if problem := hand_model_problem(cfg.MODEL.hand_model):
        problems.append(f"MODEL.hand_model={problem}")
    if cfg.DATA.demo is None:
        patterns = [pattern for named in named_sources(cfg.DATA.val.source) for pattern in named.patterns]
        try:
            resolve_source(cfg.DATA.root, patterns, key="DATA.val.source")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def source_labels(cfg: Config) -> dict[Path, str]:
    """Shard -> name of its data set, for shards that do not name it: the source's name in the configuration, else the
    first folder below DATA.root, else the shard's two parent folders."""
    labels = {}
    for named in named_sources(cfg.DATA.val.source):
        for shard in resolve_source(cfg.DATA.root, list(named.patterns), key="DATA.val.source"):
            labels[shard] = named.name if isinstance(cfg.DATA.val.source, Mapping) else _folder_label(shard, cfg)
    return labels


def _folder_label(shard: Path, cfg: Config) -> str:
    root = Path(cfg.DATA.root).expanduser().absolute()
    inside = shard.relative_to(root).parts if shard.is_relative_to(root) else ()
    return inside[0] if len(inside) > 1 else "/".join(shard.parts[-3:-1])


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[leaf] = value
