"""--help and refused configurations import no heavy package; OpenMP threads spin briefly."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

HEAVY = {"torch", "transformers", "accelerate", "aim", "cv2"}


@pytest.mark.parametrize(
    ("argument", "code"),
    [("--help", 0), ("GENERAL.totl_step=5", 2), ("MODEL.backbone.hidden_size=7", 2), ("DATA.root=/nowhere", 2)],
)
def test_nothing_heavy_is_imported(argument: str, code: int) -> None:
    config = "stage1-dino_large" if argument.startswith("DATA") else "stage1-demo"
    command = [sys.executable, "-X", "importtime", str(ROOT / "script/stage1.py"), f"--config-name={config}", argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    imported = set(re.findall(r"^import time:.*\|\s+(\w+)$", done.stderr, re.MULTILINE))
    assert "hydra" in imported
    assert not imported & HEAVY


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs GNU OpenMP, which torch uses on Linux")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '1000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_openmp_spin_count(given: dict[str, str], expected: str) -> None:
    """The limit reaches torch's OpenMP, and the user's own setting takes precedence."""
    for package in ("src.config", "tests"):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        done = subprocess.run(
            [sys.executable, "-c", f"import {package}, torch"],
            capture_output=True, text=True, cwd=ROOT, timeout=300, check=True,
            env={**clean, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        )  # fmt: skip
        assert expected in done.stderr
