"""What a run prints about itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from src.config import AimConfig
from src.train.report import describe_dropout, where_to_look
from tests.helpers import compose_config

AIM = AimConfig(server_url=None, repo="checkpoint", experiment="demo")


@pytest.mark.parametrize(
    ("version", "reason"),
    [((3, 12), "(AIM is not installed)"), ((3, 13), "(AIM is not installed and has no wheel for this Python)")],
)
def test_curves_without_aim(version: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is Python 3.13 only on Python 3.13."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", version)
    assert where_to_look(Path("run"), AIM, "demo seed 1", is_behind=False).endswith(
        f"metrics.jsonl in the run folder {reason}"
    )


def test_curves_after_aim_has_failed() -> None:
    assert "python script/sync_aim.py 'a run'" in where_to_look(Path("a run"), AIM, "demo seed 1", is_behind=True)


def test_dropout_that_never_starts_is_noted() -> None:
    assert describe_dropout(compose_config("stage1-demo")) is None
    note = describe_dropout(compose_config("stage1-demo", "GENERAL.total_step=40", "GENERAL.warmup_step=5"))
    assert note.startswith("dropout stays 0 in this run: GENERAL.dropout_warmup_step=400")
