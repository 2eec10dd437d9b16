"""Comparisons of configurations: resume and compare.py ignore the same keys, and say which value is whose."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.compare.runs import Run, differences
from src.config import flatten, housekeeping_keys, schema
from src.train.resume import _check_changes, changed_settings
from tests.helpers import compose_config

OVERRIDES = (
    *("GENERAL.vis_step=7", "GENERAL.log_step=7", "DATA.max_bad_fraction=0.5", "AIM.experiment=other"),
    *("DATA.root=elsewhere", "DATA.stride=2", "MODEL.handec.num_layer=1"),
)
REPORTED = {"DATA.root", "DATA.stride", "MODEL.handec.num_layer"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(asdict(compose_config("stage1-demo"))))
    return path


def test_housekeeping_keys_exist() -> None:
    keys = set(housekeeping_keys())
    assert keys < set(schema())
    assert {"GENERAL.output_root", "DATA.index_dir", "AIM.repo"} < keys
    assert not keys & {"GENERAL.seed", "DATA.root", "MODEL.init_from"}, "a run from other weights or data is another"


def test_resume_and_compare_ignore_the_same_keys(checkpoint: Path) -> None:
    old, new = compose_config("stage1-demo"), compose_config("stage1-demo", *OVERRIDES)
    runs = [Run("", flatten(asdict(cfg)), "mpjpe_cam", {}) for cfg in (old, new)]
    assert changed_settings(checkpoint, new).keys() == differences(runs).keys() == REPORTED
    assert changed_settings(checkpoint, old) == {}


def test_init_from_is_another_experiment_but_no_change_of_a_resumed_run(checkpoint: Path) -> None:
    old, new = compose_config("stage1-demo"), compose_config("stage1-demo", "MODEL.init_from=model/hand-mini")
    runs = [Run("", flatten(asdict(cfg)), "mpjpe_cam", {}) for cfg in (old, new)]
    assert differences(runs) == {"MODEL.init_from": [None, "model/hand-mini"]}
    assert changed_settings(checkpoint, new) == {}


def test_messages_name_both_values(checkpoint: Path) -> None:
    changes = changed_settings(checkpoint, compose_config("stage1-demo", "DATA.stride=2"))
    with pytest.raises(ValueError, match=r"was trained on different data:\n    DATA\.stride=2 in this command, 1"):
        _check_changes(checkpoint, changes, is_auto=True)
    changes = changed_settings(checkpoint, compose_config("stage1-demo", *OVERRIDES))
    with pytest.raises(ValueError, match=r"MODEL\.handec\.num_layer=1 in this command, 2 in the checkpoint\nResume"):
        _check_changes(checkpoint, changes, is_auto=False)


def test_named_sources_are_compared_as_a_whole(checkpoint: Path) -> None:
    cfg = compose_config("stage1-demo")
    cfg.DATA.train.source = {"a": {"source": ["train/*"], "weight": 2.0}}
    assert changed_settings(checkpoint, cfg).keys() == {"DATA.train.source"}
