"""Imports point down only: script -> engine -> {data, model, loss, metric} -> hand -> geometry -> {batch, config}."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# layer -> what it may import of ours, besides itself
MAY_IMPORT = {
    "batch": set(),
    "config": set(),
    "config_parse": {"config"},
    "geometry": {"batch", "config"},
    "hand": {"geometry", "batch", "config"},
    "data": {"utils", "hand", "geometry", "batch", "config"},
    "model": {"utils", "hand", "geometry", "batch", "config"},
    "loss": {"hand", "geometry", "batch", "config"},
    "metric": {"hand", "geometry", "batch", "config"},
    "utils": {"hand", "geometry", "batch", "config"},
    "engine": {"data", "model", "loss", "metric", "utils", "hand", "geometry", "batch", "config", "config_parse"},
}
# third-party package -> the only places that may import it
ONLY_IN = {
    "aim": ("src/engine/aim_child.py",),
    "accelerate": ("src/engine/", "script/"),
    "hydra": ("script/",),
    "transformers": ("src/model/backbone.py",),
}
FILES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("script/**/*.py")])


def imported_modules(path: Path) -> set[str]:
    """Every dotted module name that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import in full"
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    modules = imported_modules(path)
    ours = {layer(m) for m in modules if m.startswith("src.")}
    if relative.parts[0] == "src" and len(relative.parts) > 1 and relative.name != "__init__.py":
        here = layer(".".join(relative.with_suffix("").parts))
        assert ours - {here} <= MAY_IMPORT[here], f"{relative} imports upwards or sideways"
    above = "tests" if relative.parts[0] == "script" else ("tests", "script")  # script/bench.py has script/peers
    assert not any(m.startswith(above) for m in modules)
    for package, places in ONLY_IN.items():
        if any(m.split(".")[0] == package for m in modules):
            assert str(relative).startswith(places), f"{package} belongs in {places}, not in {relative}"


def test_import_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from src.engine import run\ndef f():\n    import aim\n")
    assert imported_modules(file) >= {"src.engine", "src.engine.run", "aim"}
