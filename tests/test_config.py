"""The shipped configurations compose, every key is typed, and error messages name key, value and fix."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.config import ConfigError, named_sources, schema
from src.config_parse import check_command_line
from tests.helpers import ROOT, compose_config


def test_recipe_defaults() -> None:
    cfg = compose_config("stage1-dino_large")
    general, train, decoder, loss = cfg.GENERAL, cfg.TRAIN, cfg.MODEL.handec, cfg.LOSS
    assert (general.total_step, general.warmup_step, general.dropout_warmup_step) == (100_000, 5_000, 10_000)
    assert (general.log_step, general.vis_step, general.checkpoint_step, general.val_seed) == (10, 100, 3_000, 42)
    assert (train.lr, train.backbone_lr, train.weight_decay, train.max_grad) == (1e-4, 1e-5, 1e-4, 1.0)
    assert (train.sample_per_device, train.grad_accum_step, train.expansion_ratio) == (32, 1, 2.0)
    assert (decoder.num_layer, decoder.num_head, decoder.dim_head, decoder.dim_mlp, decoder.dropout) == (
        4,
        16,
        64,
        4096,
        0.1,
    )
    weights = (loss.lambda_theta, loss.lambda_shape, loss.lambda_trans, loss.lambda_rel, loss.lambda_img)
    assert weights == (3.0, 3.0, 0.05, 0.012, 0.002)
    assert cfg.MODEL.backbone.backbone_str == "model/facebook/dinov2-large"
    assert cfg.AIM.server_url is None


@pytest.mark.parametrize("backbone", ["dinov2_small", "dinov2_base", "dinov2_large", "dinov2_giant", "tiny"])
@pytest.mark.parametrize("augmentation", ["full", "light", "none"])
def test_groups(backbone: str, augmentation: str) -> None:
    overrides = (f"backbone={backbone}", f"augmentation={augmentation}", "data=demo")
    cfg = compose_config(
        "stage1-dino_large", *overrides, "GENERAL.dropout_warmup_step=8000", "MODEL.handec.dropout=0.15"
    )
    assert cfg.GENERAL.dropout_warmup_step == 8000
    assert cfg.MODEL.handec.dropout == 0.15
    assert cfg.MODEL.hand_model == "standin", "the demo's shards are drawn with the stand-in hand"
    assert cfg.DATA.demo is not None


def test_environment_variables_set_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAND_DATA_ROOT", "/data/hands")
    monkeypatch.setenv("AIM_SERVER_URL", "aim://127.0.0.1:53800")
    cfg = compose_config("stage1-dino_large")
    assert cfg.DATA.root == "/data/hands"
    assert cfg.AIM.server_url == "aim://127.0.0.1:53800"


def test_environment_variable_set_but_empty_counts_as_unset(monkeypatch):
    monkeypatch.setenv("HAND_DATA_ROOT", "")
    monkeypatch.setenv("AIM_SERVER_URL", "")
    cfg = compose_config("stage1-dino_large")
    assert (cfg.DATA.root, cfg.AIM.server_url) == ("/mnt/qnap/data/datasets/webdatasets", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+GENERAL.totl_step=3", "GENERAL.totl_step: there is no such key; did you mean GENERAL.total_step?"),
        ("MODEL.handec.dropout=1.0", "MODEL.handec.dropout=1.0: must be in [0, 1)"),
        ("MODEL.handec.dropout=-0.1", "MODEL.handec.dropout=-0.1: must be at least 0"),
        ("MODEL.handec.dropout=nan", "MODEL.handec.dropout=nan: is not a number"),
        ("GENERAL.dropout_warmup_step=-1", "GENERAL.dropout_warmup_step=-1: must be at least 0"),
        ("GENERAL.total_step=many", "GENERAL.total_step=many: Value 'many' of type 'str' could not be converted"),
        ("GENERAL.dropout_schedule=liner", "choose one of gate, linear, cosine; did you mean linear?"),
        ("GENERAL.warmup_step=200000", "GENERAL.warmup_step=200000: longer than GENERAL.total_step=100000"),
        ("TRAIN.scale_f_range=[1.1,0.9]", "TRAIN.scale_f_range=[1.1, 0.9]: must be [low, high]"),
        ("TRAIN.lr=null", "TRAIN.lr=None"),
        ("DATA.train.source=[]", "DATA.train.source=[]: must be a list of patterns"),
        ("AIM.server_url=http://x", "AIM.server_url=http://x: must look like aim://127.0.0.1:53800"),
        ("MODEL.img_mean=[0.5]", "MODEL.img_mean=[0.5]: must be three numbers"),
    ],
)  # fmt: skip
def test_error_messages(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("stage1-dino_large", override)
    assert message in str(error.value)


def test_all_errors_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("stage1-demo", "GENERAL.log_step=0", "TRAIN.lr=-1", "MODEL.handec.num_layer=0")
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "GENERAL.log_step",
        "TRAIN.lr",
        "MODEL.handec.num_layer",
    ]


def test_check_overrides() -> None:
    check_command_line(
        ["GENERAL.seed=1", "data=demo", "+hydra.job.name=x", "hydra/launcher=basic", "~DATA.train.source", "-m"]
    )
    check_command_line(["+DATA.train.source={a: {source: [x], weight: 2}}", "--config-name=stage1-demo"])
    with pytest.raises(ConfigError, match=r"MODEL\.handec\.droput.*MODEL\.handec\.dropout"):
        check_command_line(["MODEL.handec.droput=0.1"])


def test_named_sources() -> None:
    (single,) = named_sources(["a/*", "b/*"])
    assert (single.patterns, single.weight) == (("a/*", "b/*"), 1.0)
    first, second = named_sources({"a": {"source": "a/*", "weight": 3}, "b": ["b/*"]})
    assert (first.name, first.patterns, first.weight) == ("a", ("a/*",), 3.0)
    assert (second.name, second.patterns, second.weight) == ("b", ("b/*",), 1.0)
    for bad in ({"a": {"source": "a/*", "weight": 0}}, {"a": {"sorce": "a/*"}}, [], 3, [3]):
        with pytest.raises(ConfigError):
            named_sources(bad)


def test_every_key_has_a_default() -> None:
    text = "\n".join(path.read_text() for path in sorted((ROOT / "config").glob("**/*.yaml")))
    for key in schema():
        assert re.search(rf"\b{key.rsplit('.', 1)[-1]}\b", text), f"{key} is not in any config file"


def run_stage1(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, str(ROOT / "script/stage1.py"), *arguments, f"GENERAL.output_root={tmp_path}/runs"]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    return result, time.perf_counter() - start


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["GENERAL.totl_step=3"], ["GENERAL.totl_step", "GENERAL.total_step"]),
        (["MODEL.handec.dropout=1"], ["MODEL.handec.dropout=1", "[0, 1)"]),
        (["data=demo"], ["hf download facebook/dinov2-large", "MODEL.backbone.random_init=true"]),
        (["data=demo", "backbone=tiny", "MODEL.img_size=100"], ["MODEL.img_size=100", "MODEL.img_size=98"]),
        (["backbone=tiny"], ["MODEL.hand_model=", "mano.is.tue.mpg.de", "DATA.train.source=", "HAND_DATA_ROOT"]),
        (["data=demo", "backbone=tiny", "GENERAL.resume_path=nowhere"], ["GENERAL.resume_path=nowhere"]),
        (["DATA.train.source=['pipe:rm x']", "backbone=tiny"], ["pipe:", "is not supported"]),
    ],
)
def test_refused_in_seconds_without_output_files(tmp_path: Path, arguments: list[str], messages: list[str]) -> None:
    result, seconds = run_stage1(tmp_path, "--config-name=stage1-dino_large", *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert seconds < 5.0
    assert list(tmp_path.iterdir()) == []
