"""Copy the missing rows of a run to AIM: `python script/sync_aim.py RUN_FOLDER [--server-url URL | --repo FOLDER]`.

Needed if the run could not reach its AIM server or was killed together with its child processes. The journal in the run
folder is sent from the offset that AIM has acknowledged; doing so twice creates no duplicates.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)
from src.tracking.aim_child import exit_now, sync


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server-url", help="aim://host:port; default: the run's own")
    where.add_argument("--repo", type=Path, help="folder of a local repository")
    arguments = parser.parse_args()
    run_folder = arguments.run_folder.resolve()
    if not (run_folder / "tracker.json").is_file():
        parser.error(f"{run_folder} is not a run folder: it has no tracker.json")
    if arguments.server_url and not arguments.server_url.startswith("aim://"):
        parser.error(f"--server-url must look like aim://127.0.0.1:53800, not {arguments.server_url!r}")
    if importlib.util.find_spec("aim") is None:
        parser.error("AIM is not installed here (it needs Python 3.12 or older); run this on a machine that has it")
    target = arguments.server_url or (str(arguments.repo.resolve()) if arguments.repo else None)
    return sync(run_folder, target)


if __name__ == "__main__":
    exit_now(main())
