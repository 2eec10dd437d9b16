"""What a new user meets on the command line: each mistake ends in seconds with one message that names the fix."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from script.check_shards import find_shards
from script.check_shards import parse_arguments as parse_check_arguments
from src.config import AimConfig, ConfigError, flatten, schema
from src.config_parse import OTHER_NAMES, check_command_line, is_known_key
from src.tracking.tracker import Tracker, name_run
from src.train.report import where_to_look
from src.utils.environment import PYPROJECT, environment_problems
from tests.helpers import ROOT, compose_config

CONFIGS = sorted(path.stem for path in (ROOT / "config").glob("stage1-*.yaml") if path.stem != "stage1-base")
SCRIPTS = sorted((ROOT / "script").glob("*.py"))


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(
        words, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=60, check=False
    )


def refused(*arguments: str, cwd: Path = ROOT) -> str:
    """What script/stage1.py prints on stderr as it refuses these arguments."""
    done = run(ROOT / "script/stage1.py", *arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# ---- the environment


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_without_its_packages_names_the_installation(script: Path) -> None:
    done = run("-ES", script, "--help")  # -S: without site-packages
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script.name}: torch, transformers, ")
    assert "not installed" in line
    assert "make .venv/.installed" in line
    assert "pip install -c constraints.txt -e ." in line


def test_outdated_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformers-5.17.0.dist-info").mkdir()
    (tmp_path / "transformers-5.17.0.dist-info/METADATA").write_text("Name: transformers\nVersion: 5.17.0\n")
    done = run(ROOT / "script/predict.py", "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("predict.py: transformers 5.17.0 is older than 5.20 (")


def test_environment_problems_read_pyproject() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    assert list(environment_problems(text)) == []
    assert list(environment_problems(text.replace("numpy>=1.26", "numpy>=1000.2"))) != []
    optional = "\ndependencies = [\n    \"nowhere>=1; python_version < '3.13'\",\n]"
    assert list(environment_problems(optional)) == []
    assert list(environment_problems(optional.replace(";", '",  #'))) == ["nowhere not installed"]


# ---- names of configurations, keys and options


@pytest.mark.parametrize("arguments", [["--config-name=stage1-dmeo"], ["--config-name", "stage1-dmeo"]])
def test_unknown_config_lists_those_that_exist(arguments: list[str]) -> None:
    error = refused(*arguments)
    assert f"choose one of {', '.join(CONFIGS)}; did you mean stage1-demo?" in error
    assert len(CONFIGS) == 5


def test_unknown_config_in_short_form_and_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config-name=nowhere"):
        check_command_line(["-cn", "nowhere"])
    check_command_line(["-cn", "stage1-mini.yaml", "--cfg", "job"])
    check_command_line([f"--config-dir={tmp_path}", "--config-name=mine", "data=mine"])
    check_command_line([])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_composes(name: str) -> None:
    assert compose_config(name).GENERAL.total_step > 0


def test_unknown_file_of_a_group() -> None:
    error = refused("data=lab", "+dropout=gate,liner", "-m")
    assert "data=lab: there is no config/data/lab.yaml; choose one of demo, labs; did you mean labs?" in error
    assert "dropout=liner: there is no config/dropout/liner.yaml; choose one of" in error


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("batch_size=8", "TRAIN.sample_per_device"),
        ("+TRAIN.batch_size=8", "TRAIN.sample_per_device"),
        ("--batch-size", "TRAIN.sample_per_device"),
        ("learning_rate=1e-3", "TRAIN.lr"),
        ("lr=1e-3", "TRAIN.lr"),
        ("--lr=1e-3", "TRAIN.lr"),
        ("epochs=3", "GENERAL.total_step, in optimizer steps"),
        ("trainer.max_steps=3", "GENERAL.total_step"),
        ("weight_decay=0", "TRAIN.weight_decay"),
        ("+optimizer.weight_decay=0", "TRAIN.weight_decay"),
        ("resume=auto", "GENERAL.resume_path"),
        ("++num_workers=2", "GENERAL.num_worker"),
        ("GENERAL.num_workers=2", "GENERAL.num_worker"),
        ("seed=1", "GENERAL.seed"),
        ("TRAIN.seed=1", "GENERAL.seed"),
        ("--seed", "GENERAL.seed"),
        ("output_dir=runs", "GENERAL.output_root"),
        ("grad_clip=1", "TRAIN.max_grad"),
        ("DATA.vall.source=[a]", "DATA.val.source"),
    ],
)
def test_names_of_other_tools_point_to_ours(argument: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_command_line([argument])
    assert key in str(error.value)


def test_names_of_other_tools_are_not_ours() -> None:
    names = [name for names in OTHER_NAMES.values() for name in names.split()]
    ours = {key.rpartition(".")[2] for key in schema()}
    assert all(is_known_key(key) for key in OTHER_NAMES)
    assert len(set(names)) == len(names)
    assert not ours & set(names)


def test_all_unknown_names_at_once() -> None:
    error = refused("--config-name=stage1-demo", "batch_size=3", "epochs=5", "--output_dir=x", "GENERAL.totl_step=4")
    assert error.splitlines()[1:] == [
        "batch_size: there is no such key; use TRAIN.sample_per_device",
        "epochs: there is no such key; use GENERAL.total_step, in optimizer steps",
        "GENERAL.totl_step: there is no such key; did you mean GENERAL.total_step?",
        "--output_dir: there is no such option; use GENERAL.output_root=...",
    ]


def test_overrides_that_hydra_knows() -> None:
    known = ["hydra.sweep.dir=x", "hydra/launcher=basic", "~DATA.train.source", "+launch=slurm"]
    check_command_line(known)
    with pytest.raises(ConfigError, match=r"launch=slurn: .* did you mean slurm\?"):
        check_command_line([*known[:-1], "+launch=slurn"])


# ---- values


@pytest.mark.parametrize(("text", "value"), [("1e5", 100_000), ("2e3", 2_000), ("7000.0", 7_000)])
def test_whole_floats_are_integers(text: str, value: int) -> None:
    cfg = compose_config("stage1-dino_large", f"GENERAL.total_step={text}", "GENERAL.warmup_step=1e1")
    assert cfg.GENERAL.total_step == value
    assert type(cfg.GENERAL.total_step) is type(cfg.GENERAL.warmup_step) is int
    assert compose_config("stage1-demo", "DATA.val.max_sample=1e2").DATA.val.max_sample == 100


@pytest.mark.parametrize("text", ["1.5", "inf", "1e-1"])
def test_other_floats_are_not_integers(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"GENERAL\.total_step={float(text)}.*Expected int"):
        compose_config("stage1-demo", f"GENERAL.total_step={text}")


def test_wrong_types_and_wrong_values_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("stage1-demo", "GENERAL.log_step=0", "TRAIN.lr=fast", "MODEL.backbone.num_head=0")
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "GENERAL.log_step",
        "TRAIN.lr",
        "MODEL.backbone.num_head",
    ]


def test_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"DATA\.val\.source is missing: set it"):
        compose_config("stage1-demo", "DATA.val.source=???")


def test_flatten() -> None:
    tree = {"A": {"b": 1, "c": {}, "d": {"e": 2}}, "f": None}
    assert flatten(tree) == {"A.b": 1, "A.c": {}, "A.d.e": 2, "f": None}
    assert flatten(tree, whole=["A.d"]) == {"A.b": 1, "A.c": {}, "A.d": {"e": 2}, "f": None}


# ---- data


def test_all_missing_sources_at_once(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.tar").touch()
    arguments = ["backbone=tiny", "MODEL.hand_model=standin", f"DATA.root={tmp_path}"]
    sources = ["DATA.train.source=[here/*,gone/*,'here/{a,b}.tar']", "DATA.val.source=[away/*]"]
    train, val = refused(*arguments, *sources).splitlines()[1:]
    assert train.startswith("DATA.train.source=['gone/*', 'here/{a,b}.tar: here/b.tar']: no *.tar file below DATA.root")
    assert val.startswith("DATA.val.source=['away/*']: ")


def test_check_shards_reads_hand_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative sources are below --root; without it in the working directory, or else below HAND_DATA_ROOT."""
    shard = {place: tmp_path / place / "set/a.tar" for place in ("here", "lab", "other")}
    for path in shard.values():
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "lab/only.tar").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HAND_DATA_ROOT", str(tmp_path / "lab"))

    def found(*arguments: str) -> list[Path]:
        return find_shards(parse_check_arguments(arguments))

    assert found("only.tar") == [tmp_path / "lab/only.tar"]
    assert found("set/*") == [shard["here"]]
    assert found("set/*", "--root", str(tmp_path / "other")) == [shard["other"]]
    with pytest.raises(ValueError, match=f"DATA.root='{tmp_path}/lab'"):
        found("nowhere/*")
    monkeypatch.setenv("HAND_DATA_ROOT", "")
    assert found("set/*") == [shard["here"]]
    with pytest.raises(ValueError, match=r"no \*\.tar file"):
        found("only.tar")


# ---- sweeps and names of runs


def test_sweep_prints_its_point(tmp_path: Path) -> None:
    arguments = ["-m", "--config-name=stage1-claim", "DATA.demo=null", "DATA.root=/nowhere", "GENERAL.seed=7,8"]
    done = run(ROOT / "script/stage1.py", *arguments, "DATA.stride=choice(1,2)", cwd=tmp_path)
    assert done.returncode == 2, "no shards"
    assert done.stdout == "stage1: sweep point 1 of 16: GENERAL.seed=7 dropout=constant DATA.stride=1\n"


def test_run_name_distinguishes_runs() -> None:
    overrides = ["+dropout=gate", "MODEL.handec.dropout=0.2", "GENERAL.seed=3", "GENERAL.resume_path=auto"]
    assert name_run("stage1-demo", overrides, 3) == "stage1-demo dropout=gate MODEL.handec.dropout=0.2 seed 3"
    assert name_run("stage1-demo", [], 42) == "stage1-demo seed 42"


def test_run_folder_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = {"config": {}, "aim": AimConfig(server_url=None, repo=str(tmp_path), experiment="test")}
    for name in ("first", "second"):
        tracker = Tracker(tmp_path, run_name=name, **options)
        tracker.close()
    assert tracker.run_name == "first"


@pytest.mark.parametrize("is_behind", [False, True])
def test_closing_lines_name_the_run_in_aim(tmp_path: Path, is_behind: bool) -> None:
    pytest.importorskip("aim")
    aim = AimConfig(server_url=None, repo="my-repo", experiment="demo")
    closing = where_to_look(tmp_path, aim, "stage1-demo seed 42", is_behind)
    assert "my-repo" in closing
    assert closing.splitlines()[-1] == "in AIM      experiment demo, run stage1-demo seed 42"
