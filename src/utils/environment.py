"""Importing this module ends a script with exit code 2 and one line if a package it needs is missing or too old.

Scripts import it before any third-party package. It uses the standard library alone and takes about 20 ms.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# PyPI name -> module name, where they differ
MODULES = {"hydra-core": "hydra", "opencv-python-headless": "cv2", "pillow": "PIL"}


def environment_problems(pyproject: str) -> Iterator[str]:
    """What is missing or older than the lower bounds in a pyproject.toml; dependencies with a marker are optional."""
    required = pyproject.partition("\ndependencies = [")[2].partition("\n]")[0]
    minimum = dict(re.findall(r'^ *"([\w-]+)>=([\d.]+)[^;"]*"', required, re.MULTILINE))
    if missing := [name for name in minimum if find_spec(MODULES.get(name, name)) is None]:
        yield f"{', '.join(missing)} not installed"
    for name in minimum:
        with suppress(PackageNotFoundError):  # missing, or the module is from another package, such as opencv-python
            if _numbers(installed := version(name)) < _numbers(minimum[name]):
                yield f"{name} {installed} is older than {minimum[name]}"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


if found := "; ".join(environment_problems(PYPROJECT.read_text(encoding="utf-8"))):
    sys.stderr.write(
        f"{Path(sys.argv[0]).name}: {found} ({sys.executable}). Run `make .venv/.installed` and "
        f"use .venv/bin/python, or run `{sys.executable} -m pip install -c constraints.txt -e .`\n"
    )
    raise SystemExit(2)
