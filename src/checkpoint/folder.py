"""The reading side of checkpoints: which folder is meant, and whether its files are those that were written.

    <run folder>/checkpoints/checkpoint-<step>/
        model.safetensors   weights
        config.yaml         the run's whole configuration
        backbone.json       shape of the backbone, so that its own weights folder is not needed again
        state.json          step, position in the data, best metric
        optimizer.pt        needed only to resume training
        manifest.json       size and sha256 of every other file

A released network (`script/export.py --to checkpoint`) is the same folder without optimizer.pt, and outside of a run
folder.

Standard library only. Written by src/checkpoint/save.py; read by it and by `PoseNet.from_checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"
CONFIG, BACKBONE = "config.yaml", "backbone.json"
NETWORK_FILES = (STATE, CONFIG, BACKBONE, MODEL)  # what the use of the weights needs; an older checkpoint has two

logger = logging.getLogger("stage1.checkpoint")  # below the logger of src/utils/console.py


def find_checkpoint(path: str | Path, names: Iterable[str] | None = None) -> Path:
    """The newest complete checkpoint at `path`: a run folder, its `checkpoints`, one `checkpoint-<step>`, or `best`.

    Newest is the highest step in `state.json`. A folder that is incomplete or damaged is named in a warning and
    skipped for the one before it. Raises ValueError where none is left; a single checkpoint that was asked for by
    its own path is not replaced by another. `names`: the files that must be whole; all where absent.
    """
    path = Path(path)
    if path.name == "best" and not path.exists():
        path = path.with_name("best.old")  # a crash between the two renames of `swap_in`
    if (path / MANIFEST).exists() or (path / STATE).exists():
        verify(path, names)
        return path
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not parent.is_dir():
        raise ValueError(f"no checkpoint at {path}: give a run folder, its checkpoints folder, or one checkpoint in it")
    for _, folder in by_step(parent):
        try:
            verify(folder, names)
            return folder
        except ValueError as error:
            logger.warning("skipping checkpoint %s: %s", folder, error)
    raise ValueError(f"no complete checkpoint in {parent}")


def by_step(parent: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders in `parent` with the step of their `state.json`, newest first; unreadable ones are named."""
    found = []
    for folder in sorted(p for p in parent.iterdir() if p.is_dir()):
        try:
            found.append((read_step(folder), folder))
        except ValueError as error:
            logger.warning("skipping checkpoint %s: %s", folder, error)
    return sorted(found, key=lambda item: (item[0], item[1].name.startswith("checkpoint-")), reverse=True)


def read_step(path: Path) -> int:
    """The optimizer steps done, from `state.json`. Raises ValueError naming the file when it cannot be read."""
    try:
        step = json.loads((path / STATE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error})") from error
    if not isinstance(step, int):
        raise ValueError(f"{path / STATE} has no whole number as step: {step!r}")
    return step


def read_config_name(path: Path) -> str:
    """The `--config-name` of the run, from `state.json`; empty where it is not recorded."""
    try:
        return str(json.loads((path / STATE).read_text(encoding="utf-8")).get("config_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error})") from error


def is_released(path: Path) -> bool:
    """Whether `path` is a checkpoint that was written without optimizer state, to be used and not to be resumed."""
    try:
        return OPTIMIZER not in _read_manifest(path)
    except ValueError:
        return False


def resume_refusal(path: Path) -> str:
    """Why training cannot be resumed from a released network, and what to do instead."""
    return (
        f"{path}: a trained network without its optimizer state, so training cannot be resumed from it; "
        f"start a new run from its weights with MODEL.init_from={path}"
    )


def _read_manifest(path: Path) -> dict[str, dict]:
    """File name -> its size and sha256. Raises ValueError where there is no valid manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}): the checkpoint is incomplete") from error


def verify(path: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files of a checkpoint with its manifest: first all sizes, then all sha256.

    Args: names: look at these files alone, as far as the manifest has them; at every file where absent.
    Raises ValueError naming the first file that is missing, cut or changed; for a released network where `names` is
    absent, because nothing can be resumed from it.
    """
    manifest = _read_manifest(path)
    sizes = {name: entry["size"] for name, entry in manifest.items()}
    if names is None and OPTIMIZER not in manifest:
        raise ValueError(resume_refusal(path))
    required, wanted = {MODEL, OPTIMIZER, STATE} | sizes.keys(), None if names is None else set(names)
    required = required if wanted is None else required & wanted
    for name in sorted(required):
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != sizes.get(name):
            raise ValueError(f"{file} is damaged: {size} bytes where the manifest says {sizes.get(name)}")
    for name in sorted(required):
        if sha256(path / name) != manifest[name]["sha256"]:
            raise ValueError(f"{path / name} is damaged: its sha256 is not the manifest's")


def sha256(path: Path) -> str:
    """Hex digest of a file; 0.6 s per GB with SHA-NI (1.7 GB/s measured on one core)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
