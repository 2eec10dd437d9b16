"""The files of one checkpoint folder: written, synced, sealed by a manifest, swapped into place.

`manifest.json` (size and sha256 of every file) is written last: a folder without it was never finished.
src/checkpoint/folder.py names the files and verifies them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from src.checkpoint.folder import MANIFEST, sha256
from src.checkpoint.run_folder import write_text_atomic


def torch_save(value: Any, path: Path) -> None:
    """`torch.save`. Raises OSError where the disk refuses; torch hides that behind a RuntimeError of its own."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def torch_load(path: Path) -> Any:
    """`torch.load` of tensors and plain containers only; ValueError for anything that would run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a file of tensors that we wrote; refused: {error}") from error


def write_manifest(folder: Path) -> None:
    """Sync every file, then write and sync `manifest.json` and the folder: from here on the checkpoint is complete."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for file in files:
        fsync(file)
    manifest = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    fsync(folder / MANIFEST)
    fsync(folder)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap_in(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`. What stood there is complete under `<name>.old` until the new one is in place."""
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
