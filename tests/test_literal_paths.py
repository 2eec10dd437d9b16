"""What exists under its literal name is not a pattern, wherever a path is given."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from script.check_shards import main as check_main
from script.evaluate import parse_overrides
from src.compare.runs import find_runs
from src.config_parse import quote_paths
from src.data.check_shards import check_shards
from src.data.loader import build_train_loader
from src.data.shards.paths import resolve_source
from src.predict.photo import find_photos
from tests.data_shards import data_config, native_sample, write_shard

ODD = ("hands [2024]", "a{x,y}", "a{b", "st*r", "q?", "~", "it's, (1)=2")


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path, *patterns: str) -> list[str]:
    return [str(path.relative_to(root)) for path in resolve_source(root, patterns)]


@pytest.mark.parametrize("odd", ODD)
def test_a_folder_with_special_characters_is_taken_literally(tmp_path: Path, odd: str) -> None:
    make(tmp_path, f"{odd}/0.tar", f"{odd}/1.tar", "hands 2/9.tar", "ax/9.tar", "star/9.tar", "qq/9.tar")
    both = [f"{odd}/0.tar", f"{odd}/1.tar"]
    for pattern in (odd, f"{odd}/*", f"{odd}/{{0..1}}.tar", f"{odd}/[01].tar", str(tmp_path / odd / "*.tar")):
        assert names(tmp_path, pattern) == both, pattern
    assert names(tmp_path, f"{odd}/1.tar") == both[1:]
    assert resolve_source(tmp_path / odd, ["*"]) == [tmp_path / name for name in both]
    (tmp_path / "top").mkdir()
    shutil.move(tmp_path / odd, tmp_path / "top" / odd)
    assert names(tmp_path, f"*/{odd}/0.tar") == [f"top/{odd}/0.tar"]


def test_what_does_not_exist_literally_is_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "a1/0.tar", "a2/0.tar", "b/c/0.tar")
    assert names(tmp_path, "a[12]") == names(tmp_path, "a{1,2}/*") == names(tmp_path, "a?") == ["a1/0.tar", "a2/0.tar"]
    assert names(tmp_path, "**") == names(tmp_path, "**/*.tar") == ["a1/0.tar", "a2/0.tar", "b/c/0.tar"]


def test_shards_in_capitals_hidden_files_and_compressed_archives(tmp_path: Path) -> None:
    make(tmp_path, "a/0.TAR", "a/1.Tar", "a/._0.TAR", "a/._1.Tar", "b/0.tar.gz", "c/0.tgz", "d/._0.tar")
    assert names(tmp_path, "a") == names(tmp_path, "a/*") == ["a/0.TAR", "a/1.Tar"]
    for pattern in ("b", "b/*", "c/*.tgz"):
        with pytest.raises(ValueError, match=r"(0\.tar\.gz|0\.tgz) is compressed: unpack it"):
            names(tmp_path, pattern)
    with pytest.raises(ValueError, match="matches"):
        names(tmp_path, "d/*")


def test_shards_one_folder_deeper_are_pointed_at(tmp_path: Path) -> None:
    make(tmp_path, "hamer/freihand-train/0.tar", "hamer/convert.json", "hamer/a.tar.index")
    with pytest.raises(ValueError, match=r"the folders in .*hamer contain shards: add '/\*' to the pattern"):
        names(tmp_path, "hamer")
    assert names(tmp_path, "hamer/*") == ["hamer/freihand-train/0.tar"]
    with pytest.raises(ValueError, match="matches; correct"):
        names(tmp_path, "hamer/*.index")


def test_folders_and_broken_links_among_shards_are_not_ignored(tmp_path: Path) -> None:
    make(tmp_path, "a/2.tar/9.tar")
    write_shard(tmp_path / "a/0.tar", [native_sample(0)])
    (tmp_path / "a/1.tar").symlink_to(tmp_path / "gone.tar")
    os.mkfifo(tmp_path / "a/3.tar")
    assert names(tmp_path, "a") == ["a/0.tar", "a/1.tar", "a/2.tar"]
    assert names(tmp_path, "a/1.tar") == ["a/1.tar"]
    assert [dict(report.bad_count) for report in check_shards(resolve_source(tmp_path, ["a"]))[1:]] == [
        {"unreadable": 1},
        {"unreadable": 1},
    ]
    for number, why in ((1, "No such file or directory"), (2, "Is a directory")):
        with pytest.raises(
            ValueError, match=rf"DATA.train.source: {tmp_path}/a/{number}.tar: {why}; everything named .tar"
        ):
            build_train_loader(data_config(tmp_path, train=("a",)), "mano")
        (tmp_path / f"a/{number}.tar").rename(tmp_path / f"a/{number}")


def test_scripts_take_such_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hands [2024] {a}"
    write_shard(folder / "0.tar", [native_sample(0)])
    indexes = ["--index_dir", str(tmp_path / "index [1]"), "--num_process", "1"]
    assert check_main([str(folder), *indexes]) == 0
    assert check_main(["*", "--root", str(folder), *indexes]) == 0
    assert capsys.readouterr().out.count("1 healthy frames, 0 corrupt") == 2
    make(folder, "run/metrics.jsonl", "a [1].jpg", "._a [1].jpg")
    assert find_runs([str(folder)]) == find_runs([f"{folder}/*"]) == [folder / "run"]
    assert find_photos(folder) == [folder / "a [1].jpg"]


@pytest.mark.parametrize("odd", ODD)
def test_a_path_on_the_command_line_is_not_parsed_as_a_list(tmp_path: Path, odd: str) -> None:
    (tmp_path / odd).mkdir()
    _, changes = parse_overrides([f"DATA.root={tmp_path / odd}", "DATA.val.source=[a,b]"])
    assert changes == {"DATA.root": str(tmp_path / odd), "DATA.val.source": ["a", "b"]}
    plain = ["DATA.root=data", "GENERAL.resume_path=a,b", 'DATA.root="/x [1]"', "DATA.val.source=[a]", "--help", "x"]
    assert quote_paths(plain) == plain
    assert quote_paths(["GENERAL.output_root=/new [1]"]) == ["GENERAL.output_root='/new [1]'"]
