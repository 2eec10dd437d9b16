"""Replay a step whose loss or gradient was not finite, and print the samples and the first module responsible.

python script/replay_batch.py checkpoint/2026-11-25/10-00-00_stage1-demo/bad_batch-1234
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import src.utils.environment  # noqa: F401  (checks that required packages are installed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="bad_batch-<step> in a run folder")
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if available")
    args = parser.parse_args()
    import torch

    from src.train.replay import replay

    try:
        print("\n".join(replay(args.folder, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))))
    except ValueError as error:
        print(f"replay_batch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
