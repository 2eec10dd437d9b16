"""Imports point down: verbs -> services -> {model, loss, metric} -> utils -> hand -> {geometry, batch, config}.

A verb (a folder for each script a user runs) does not import another verb, a service does not import a verb, and
nothing imports in a circle.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

BASE = {"batch", "config", "geometry", "utils.restricted_pickle"}
HAND = {*BASE, "hand", "utils"}
NETWORK = {"model", "loss", "metric"}
SERVICES = {"checkpoint", "tracking", "distributed", "data", "data.shards", "data.order", "data.demo", "data.convert"}
VERBS = {"train", "evaluate", "predict", "compare", "export"}
BELOW_VERBS = {*HAND, *NETWORK, *SERVICES, "config_parse"}

# room -> the rooms it may import, besides itself
MAY_IMPORT: dict[str, set[str]] = {
    "batch": set(),
    "config": set(),
    "config_parse": {"config"},
    "geometry": {"batch", "config"},
    "utils.restricted_pickle": set(),
    "hand": BASE,
    "utils": {*BASE, "hand"},
    "loss": {*BASE, "hand"},
    "metric": {*BASE, "hand"},
    "model": HAND,
    "data.rng": set(),
    "data.shards": {"batch", "config", "utils", "utils.restricted_pickle"},
    "data.order": {"data.rng", "data.shards", "utils"},
    "data.demo": {"data.rng", "data.shards", *HAND},
    "data": {"data.rng", "data.shards", "data.order", *HAND},
    "data.convert": {"data", "data.shards", *HAND},
    "distributed": {"config", "utils"},
    "checkpoint": {"model", "config_parse", *HAND},
    "tracking": {"checkpoint", *HAND},
    **dict.fromkeys(VERBS, BELOW_VERBS),
}
# third-party package -> the only places that may import it
ONLY_IN = {
    "aim": ("src/tracking/aim_child.py",),
    "accelerate": ("src/train/", "src/evaluate/", "src/distributed/", "script/"),
    "hydra": ("script/",),
    "transformers": ("src/model/backbone.py",),
}
# place -> packages it may not import: the network knows neither files of weights nor photographs
NEVER_IN = {"src/model/": {"safetensors", "PIL", "cv2"}}
FILES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("script/**/*.py")])


def imported_modules(path: Path) -> set[str]:
    """Every dotted module name that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room(module: str) -> str:
    """The room of a module of ours: the longest name in MAY_IMPORT that it is in."""
    parts = module.split(".")[1:]
    return next(name for n in (2, 1) if (name := ".".join(parts[:n])) in MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    modules = imported_modules(path)
    if relative.parts[0] == "src" and relative.name != "__init__.py":
        here = room(".".join(relative.with_suffix("").parts))
        ours = {room(module) for module in modules if module.startswith("src.")}
        assert ours - {here} <= MAY_IMPORT[here], f"{relative} imports upwards or sideways"
        assert not any(module.startswith("script.") for module in modules)
    assert not any(module.startswith("tests.") for module in modules)
    packages = {module.split(".")[0] for module in modules}
    for package, places in ONLY_IN.items():
        if package in packages:
            assert str(relative).startswith(places), f"{package} belongs in {places}, not in {relative}"
    for place, refused in NEVER_IN.items():
        if str(relative).startswith(place):
            assert not packages & refused, f"{relative} may not import {packages & refused}"


def test_no_circle() -> None:
    assert list(TopologicalSorter(MAY_IMPORT).static_order()), "a circle raises CycleError"
    for verb in VERBS:
        assert not MAY_IMPORT[verb] & VERBS
    for service in SERVICES:
        assert not MAY_IMPORT[service] & VERBS


def test_import_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from src.train import run\ndef f():\n    import aim\n")
    assert imported_modules(file) >= {"src.train.run", "aim"}
    assert room("src.data.shards.tar") == "data.shards"
    assert room("src.data.crop.Crop") == "data"
