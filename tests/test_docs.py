"""Every command, key, path, link and message form in the documents exists.

Commands are parsed like in a shell and composed with Hydra, but not run.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from script import bench, make_shards
from src.config import schema
from src.config_parse import check_command_line, is_known_key
from src.loss import LOSS_TERMS
from src.train.step import log_line
from tests.helpers import ROOT, compose_config

compose_once = cache(compose_config)  # documents repeat commands

ENGLISH, CHINESE = ROOT / "docs/QUICK_START.md", ROOT / "docs/QUICK_START.zh-CN.md"
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "model/README.md",
    ROOT / "checkpoint/README.md",
]
DOC_IDS = [str(path.relative_to(ROOT)) for path in DOCS]
WRONG_ON_PURPOSE = {"GENERAL.totl_step"}  # shown as an example of a typo
ABSENT = {"config/data/mine.yaml", "config/backbone/dino_base.yaml"}  # created by the reader; named by an error message

FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(r"\b(?:GENERAL|TRAIN|DATA|MODEL|LOSS|AIM)(?:\.(?!md\b)[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./-])(?:script|src|tests|config)/[\w./-]*\w")
MODULE = re.compile(r"python -m (tests\.\w+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE_LINE = re.compile(r"^((?:│   |    )*)(?:├── |└── )(\S+)")
LOG_LINE = re.compile(r"^\d+/\d+ lr=.*[^.\n]$", re.MULTILINE)  # not the abbreviated ones, which end in "..."
SWEEP = re.compile(r"^([^=]+)=([\w.-]+(?:,[\w.-]+)+)$")  # KEY=A,B,C


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(path: Path, language: str | None = None) -> list[str]:
    """The contents of the fenced blocks, optionally of one language."""
    return [body for name, body in FENCE.findall(text_of(path)) if language in (None, name)]


def without_fences(path: Path) -> str:
    return FENCE.sub("", text_of(path))


def commands(path: Path) -> list[list[str]]:
    """The commands of the bash blocks, split into words, without here-documents and comments."""
    found = []
    for body in fences(path, "bash"):
        body = re.sub(r"<<'END'\n.*?^END$", "", body, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        found += [shlex.split(line, comments=True) for line in body.splitlines()]
    return [words for words in found if words]


def in_every_doc(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """(document, match) for every match of a pattern in the documents."""
    return [(name, match) for name, path in zip(DOC_IDS, DOCS) for match in pattern.findall(text_of(path))]


def after(words: list[str], program: str) -> list[str] | None:
    """The arguments of `program` in a command; None if the command runs another program."""
    return words[words.index(program) + 1 :] if program in words else None


def test_chinese_mirror() -> None:
    """Both quick starts have the same code blocks in the same order, the same heading levels and inline code."""
    assert FENCE.findall(text_of(ENGLISH)) == FENCE.findall(text_of(CHINESE))
    levels = [re.findall(r"^(#+) ", without_fences(path), re.MULTILINE) for path in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    boxes = [without_fences(path).count("- [ ]") for path in (ENGLISH, CHINESE)]
    rows = [len(re.findall(r"^\|", without_fences(path), re.MULTILINE)) for path in (ENGLISH, CHINESE)]
    assert boxes[0] == boxes[1]
    assert rows[0] == rows[1]
    words = [sorted(INLINE.findall(without_fences(path))) for path in (ENGLISH, CHINESE)]
    assert words[0] == words[1]


def points(overrides: list[str]) -> list[list[str]]:
    """The first and the last point of a sweep, without the overrides that only Hydra itself can resolve."""
    own = [word for word in overrides if not word.startswith("hydra.") and "${hydra:" not in word]
    own.append("GENERAL.output_root=checkpoint/point")
    first = [SWEEP.sub(lambda match: f"{match[1]}={match[2].split(',')[0]}", word) for word in own]
    last = [SWEEP.sub(lambda match: f"{match[1]}={match[2].split(',')[-1]}", word) for word in own]
    return [first, last]


@pytest.mark.parametrize("path", DOCS, ids=DOC_IDS)
def test_training_commands_compose(path: Path) -> None:
    """Hydra composes every `script/stage1.py` command, and the configuration checks accept it."""
    for words in commands(path):
        arguments = after(words, "script/stage1.py")
        if arguments is None:
            continue
        is_sweep = "-m" in arguments
        name, *overrides = [re.sub(r"\$\w+", "checkpoint/run", word) for word in arguments if word != "-m"]
        assert name.startswith("--config-name="), words
        check_command_line(overrides)
        for point in points(overrides) if is_sweep else [overrides]:
            compose_once(name.removeprefix("--config-name="), *point)


@pytest.mark.parametrize("path", DOCS, ids=DOC_IDS)
def test_other_commands_exist(path: Path) -> None:
    """The converters and benchmarks accept the options, and the Makefile has the targets."""
    makefile = text_of(ROOT / "Makefile").replace("$(STAMP)", ".venv/.installed")
    for words in commands(path):
        for script in (make_shards, bench):
            if (arguments := after(words, f"script/{script.__name__.partition('.')[2]}.py")) is not None:
                script.parse_arguments(arguments)
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[-1])}:", makefile, re.MULTILINE), words


def test_named_configs_exist() -> None:
    for name, config in in_every_doc(re.compile(r"--config-name=([\w-]+)")):
        assert (ROOT / "config" / f"{config}.yaml").is_file(), f"{name} names {config}"


def test_named_keys_exist() -> None:
    found = in_every_doc(KEY)
    assert len(found) > 50
    for name, key in found:
        assert is_known_key(key) or key in WRONG_ON_PURPOSE, f"{name} names {key}"
    assert WRONG_ON_PURPOSE.isdisjoint(schema())


def test_named_paths_exist() -> None:
    found = [(name, path) for name, path in in_every_doc(PATH) if path not in ABSENT]
    found += [(name, module.replace(".", "/") + ".py") for name, module in in_every_doc(MODULE)]
    assert len(found) > 50
    for name, path in found:
        assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("path", DOCS, ids=DOC_IDS)
def test_links_resolve(path: Path) -> None:
    """Relative links and images exist, and so do the headings that they point at."""
    for target in LINK.findall(without_fences(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", without_fences(linked), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_file_tree() -> None:
    """Every file and folder in the tree of README.md exists."""
    (tree,) = [body for body in fences(ROOT / "README.md") if "├── Makefile" in body]
    parents: list[str] = []
    for line in tree.splitlines():
        match = TREE_LINE.match(line)
        assert match, line
        depth = len(match[1]) // 4
        parents[depth:] = [match[2].rstrip("/")]
        path = ROOT.joinpath(*parents)
        assert path.is_dir() if match[2].endswith("/") else path.is_file(), path


def test_log_line_form() -> None:
    """The log lines in the documents have the format of the real one."""
    metrics = dict.fromkeys(LOSS_TERMS, 1.0) | {"lr": 1e-4, "dropout_rate": 0.0, "loss_total": 1.0}
    form = re.sub(r"\d", "0", log_line(3000, 100000, metrics))
    shown = in_every_doc(LOG_LINE)
    assert {name for name, _ in shown} == {"README.md", "docs/QUICK_START.md", "docs/QUICK_START.zh-CN.md"}
    for name, line in shown:
        assert re.sub(r"\d", "0", re.sub(r"\d+\.", "0.", line)) == re.sub(r"0+\.", "0.", form), name
