"""Run folders: created so that no two runs share one, found again, locked.

A run writes to `<root>/<YYYY-MM-DD>/<HH-MM-SS>_<config>/`; a second run of the same second gets the suffix `-2`, etc.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from src.config import Config
from src.utils.files import make_new_folder, try_lock


def config_yaml(cfg: Config) -> str:
    """The resolved configuration as the text of `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def create_run_folder(root: Path, config_name: str) -> Path:
    """Create and return a new, empty run folder below `root`.

    `os.mkdir` is atomic on every file system we know, NFS included: of two runs that want one name, one gets it.
    Raises ValueError if the folder cannot be created (read-only, full, or a file in the way).
    """
    now = datetime.now()
    stem = f"{now:%H-%M-%S}_{_safe_name(config_name)}"
    day = Path(root) / f"{now:%Y-%m-%d}"
    try:
        day.mkdir(parents=True, exist_ok=True)
        return make_new_folder(day, stem)
    except OSError as error:
        raise ValueError(
            f"cannot make a run folder below {root}: {error.strerror or error}; name a folder that you may write"
        ) from error


def _safe_name(config_name: str) -> str:
    """`config_name` with only characters that are safe in a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", config_name)


def find_run(root: Path, config_name: str) -> Path | None:
    """The newest run folder of `config_name` below `root`, by the date and time in its name; None without any."""
    pattern = re.compile(rf"(\d\d-\d\d-\d\d)_{re.escape(_safe_name(config_name))}(?:-(\d+))?")
    found = []
    for folder in Path(root).glob("[0-9]*-[0-9]*-[0-9]*/*"):
        match = pattern.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((folder.parent.name, match[1], int(match[2] or 1), folder))
    return max(found)[-1] if found else None


def lock_run_folder(run_folder: Path) -> IO[str]:
    """Claim `run_folder` for this process until it ends or the returned file is closed. Keep the file referenced.

    A POSIX record lock: forked data workers do not inherit it, and it ends with the process, however that ends.
    Raises ValueError if another living process holds it.
    """
    file = open(run_folder / ".lock", "a")  # noqa: SIM115  (stays open as long as the run)
    if not try_lock(file):
        file.close()
        raise ValueError(f"another process is training in {run_folder}; wait for it or start a new run")
    return file
