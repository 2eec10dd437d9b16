"""script/compare.py on handwritten run folders with known numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from script.compare import main, side_names
from src.compare.changes import Window, _draw, _interval, _percent, changes, measure_run, tail_share
from src.compare.report import Comparison, Options, grids, notes, read_data, write_data
from src.compare.runs import ComparisonError, Curve, differences, find_runs, read_run, read_sides
from tests.helpers import ROOT

OPTIONS = Options(early=0.5, late=0.5, num_draw=500, seed=0)


def write_run(
    folder: Path,
    seed: int = 0,
    val: dict[int, float] | None = None,
    gap: float | None = 2.0,
    loss: float = 1.0,
    total: int = 40,
    warmup: int = 0,
) -> Path:
    """Write a run folder with validations `val` (step -> mm), training frames `gap` mm better, and a constant loss."""
    folder.mkdir(parents=True)
    config = f"GENERAL: {{seed: {seed}, total_step: {total}, dropout_warmup_step: {warmup}, output_root: {folder}}}\n"
    (folder / "config.yaml").write_text(config)
    rows = []
    for step, value in (val or {0: 90.0, 10: 20.0, 20: 16.0, 30: 12.0, 40: 12.0}).items():
        if step > 0:
            rows.append({"step": step, "subset": "train", "loss_total": loss, "dropout_rate": 0.1 * (step > warmup)})
        rows.append({"step": step, "subset": "val", "mpjpe_cam": value, "mpjpe_rel": value / 2})
        if gap is not None:
            rows.append({"step": step, "subset": "train_eval", "mpjpe_cam": value - gap, "loss_total": loss / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scaled(factor: float) -> dict[int, float]:
    return {0: 90.0, 10: 20.0 * factor, 20: 16.0 * factor, 30: 12.0 * factor, 40: 12.0 * factor}


def compared(tmp_path: Path, ours: list[Path], theirs: list[Path]) -> Comparison:
    read, skipped = read_sides({"ours": find_runs(map(str, ours)), "theirs": find_runs(map(str, theirs))})
    return Comparison(read, OPTIONS, skipped)


def test_measures_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", gap=2.0, loss=3.0), "mpjpe_cam")
    found = measure_run(run, Window.common([run], 0.5, 0.25))
    assert found["val_mean"] == pytest.approx(15.0), "step 0 does not count"
    assert found["val_std"] == pytest.approx(np.std([20, 16, 12, 12], ddof=1))
    assert (found["val_best"], found["val_last"]) == (12.0, 12.0)
    assert found["gap_early"] == pytest.approx(2.0)
    assert found["gap_late"] == pytest.approx(2.0)
    assert (found["loss_mean"], found["eval_loss_mean"]) == (3.0, 1.5)
    assert measure_run(run, Window(end=20, early=10, late=10))["val_mean"] == pytest.approx(18.0)


def test_paired_by_seed(tmp_path: Path) -> None:
    """If every run is 10 % better than its pair, the paired interval is a point; the unpaired one is wide."""
    for seed, level in enumerate((1.0, 2.0, 3.0)):
        write_run(tmp_path / f"ours/{seed}", seed, scaled(0.9 * level))
        write_run(tmp_path / f"theirs/{seed}", seed, scaled(level))
        write_run(tmp_path / f"other/{seed}", seed + 7, scaled(level))
    by_key = {
        c.measure.key: c for c in compared(tmp_path, [tmp_path / "ours"], [tmp_path / "theirs"]).changes()["ours"]
    }
    change = by_key["val_mean"]
    assert change.is_paired
    assert change.percent == pytest.approx(-10.0)
    assert (change.low, change.high) == (pytest.approx(-10.0), pytest.approx(-10.0))
    assert change.side.mean == pytest.approx(27.0)
    assert change.against.std == pytest.approx(15.0)
    unpaired = compared(tmp_path, [tmp_path / "ours"], [tmp_path / "other"]).changes()["ours"][0]
    assert not unpaired.is_paired
    assert unpaired.percent == pytest.approx(-10.0)
    assert unpaired.low < -30
    assert unpaired.high > 20


@pytest.mark.parametrize("num", [5, 20])
@pytest.mark.parametrize("is_paired", [True, False])
def test_interval_covers_the_truth(num: int, is_paired: bool) -> None:
    """In experiments with a true change of -10 %, about 19 of 20 intervals cover it, also with 5 runs per side."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(300):
        a, b = rng.normal(9, 1, num), rng.normal(10, 1, num)
        low, high = _interval(a, b, _draw(num, num, is_paired, 4000, trial), _percent)
        hits += low <= -10 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_tail_share() -> None:
    """Against scipy's quantiles; with two or three runs both give the outermost draws."""
    for num in (4, 5, 6, 10, 50):
        exact = stats.norm.cdf(-np.sqrt(num / (num - 1)) * stats.t.ppf(0.975, num - 1))
        assert tail_share(num) == pytest.approx(exact, rel=0.15)
    assert tail_share(2) < 1e-4
    assert tail_share(1000) == pytest.approx(0.025, rel=0.02)


def test_single_runs_have_no_interval(tmp_path: Path) -> None:
    ours, theirs = write_run(tmp_path / "a", val=scaled(0.5)), write_run(tmp_path / "b")
    comparison = compared(tmp_path, [ours], [theirs])
    change = comparison.changes()["ours"][0]
    assert change.percent == pytest.approx(-50.0)
    assert np.isnan(change.low)
    assert np.isnan(change.side.std)
    assert any("needs 3 runs" in note and "chance" in note for note in notes(comparison))


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    """Their change is shown, but a 95 % interval of two runs would mean nothing."""
    for seed in range(3):
        write_run(tmp_path / f"theirs/{seed}", seed)
    for seed, factor in enumerate((0.5, 0.6)):
        write_run(tmp_path / f"ours/{seed}", seed, scaled(factor))
    comparison = compared(tmp_path, [tmp_path / "ours"], [tmp_path / "theirs"])
    (grid,) = grids(comparison)
    assert grid.rows[0] == ("validation, mean", "8.25 ± 1.06", "15.00 ± 0.00", "-45.0", "")
    assert all(row[-1] == "" for row in grid.rows)
    assert any("needs 3 runs on each side, and one has 2" in note for note in notes(comparison))
    write_run(tmp_path / "ours/2", 2, scaled(0.7))
    (grid,) = grids(compared(tmp_path, [tmp_path / "ours"], [tmp_path / "theirs"]))
    assert grid.rows[0][-1].startswith("[")


def test_unfinished_shorter_and_without_training_frames(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "a", val={0: 90.0, 10: 20.0, 20: 16.0}, gap=None)
    comparison = compared(tmp_path, [ours], [write_run(tmp_path / "b")])
    assert comparison.window.end == 20
    by_key = {change.measure.key: change for change in comparison.changes()["ours"]}
    assert by_key["val_mean"].percent == pytest.approx(0.0)
    assert not {"gap_early", "gap_late", "eval_loss_mean"} & by_key.keys(), "absent, not zero"
    text = "\n".join(notes(comparison))
    assert "Not finished: " in text
    assert "step 20 of 40" in text
    assert "Steps 1 to 20, which all runs have" in text
    assert "No row `loss without dropout`: " in text
    assert "DATA.train.eval_sample" in text


def test_a_run_without_validations_is_skipped(tmp_path: Path) -> None:
    for name in ("a/0", "b/0"):
        write_run(tmp_path / name)
    begun = write_run(tmp_path / "a/1", val={0: 90.0})
    comparison = compared(tmp_path, [tmp_path / "a"], [tmp_path / "b"])
    assert [len(runs) for runs in comparison.side.values()] == [1, 1]
    assert any(note.startswith(f"Skipped: {begun}") for note in notes(comparison))
    with pytest.raises(ComparisonError, match="nothing to compare yet"):
        compared(tmp_path, [begun], [tmp_path / "b"])


def test_a_negative_gap_has_no_percentage(tmp_path: Path) -> None:
    """A gap of 0 mm or less has no change in %; the difference is in mm."""
    comparison = compared(tmp_path, [write_run(tmp_path / "a", gap=1.0)], [write_run(tmp_path / "b", gap=-1.0)])
    gap = next(change for change in comparison.changes()["ours"] if change.measure.key == "gap_late")
    assert np.isnan(gap.percent)
    assert gap.difference == pytest.approx(2.0)


def test_a_gap_near_zero_has_an_interval_in_mm(tmp_path: Path) -> None:
    """If draws of the other side are below 0, the interval is that of the difference."""
    for seed, gap in enumerate((-1.0, 0.5, 2.0)):
        write_run(tmp_path / f"ours/{seed}", seed, gap=gap + 3.0)
        write_run(tmp_path / f"theirs/{seed}", seed, gap=gap)
    comparison = compared(tmp_path, [tmp_path / "ours"], [tmp_path / "theirs"])
    gap = next(change for change in comparison.changes()["ours"] if change.measure.key == "gap_late")
    assert np.isnan(gap.percent)
    assert (gap.difference, gap.low, gap.high) == pytest.approx((3.0, 3.0, 3.0))
    assert ("(+3.00 mm)", "([+3.00, +3.00] mm)") in [row[3:] for row in grids(comparison)[0].rows]
    assert any("values in parentheses are differences" in note for note in notes(comparison))


def test_notes_explain_missing_rows(tmp_path: Path) -> None:
    """A single checkpoint has no std and no early part; diverged runs are named and do not break the plot."""
    once = write_run(tmp_path / "once", val={0: 90.0, 40: 12.0})
    good = write_run(tmp_path / "good")
    comparison = compared(tmp_path, [once], [good])
    text = "\n".join(notes(comparison))
    assert f"No row `validation, std`: {tmp_path.name}/once would need two validations" in text
    assert f"No row `gap, early`: {tmp_path.name}/once would need a validation in the early steps" in text
    assert "No row `gap, late`" not in text
    rows = [row[0] for row in grids(comparison)[0].rows]
    assert "gap, late" in rows
    assert not {"validation, std", "gap, early"} & set(rows)

    lost = [write_run(tmp_path / f"lost{i}", i, {0: 90.0, 20: np.nan, 40: np.nan}, None, np.nan) for i in range(4)]
    half = write_run(tmp_path / "half", val={0: 90.0, 20: 13.0, 40: np.nan})
    text = "\n".join(notes(compared(tmp_path, [half, lost[0]], [good])))
    assert "half: 1 of 2 validations were not finite" in text
    assert "lost0: 2 of 2 validations were not finite" in text
    assert f"No row `validation, mean`: {tmp_path.name}/lost0 would need a finite value" in text
    both = [*map(str, lost[:2]), "--against", *map(str, lost[2:]), "--output", str(tmp_path / "out")]
    assert main(both) == 0, "runs without a finite number are not an error"
    assert (tmp_path / "out" / "curves.png").is_file()


def test_resumed_metrics_and_truncated_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "subset": "val", "mpjpe_cam": 8.0}) + "\n")
        file.write(json.dumps({"step": 50, "subset": "val", "mpjpe_cam": "nan"}) + "\n")
        file.write('{"step": 60, "subset": "val", "mpj')
    (folder / "config.resumed-40.yaml").write_text("GENERAL: {seed: 0, total_step: 60}\n")
    run = read_run(folder, "mpjpe_cam")
    assert run.val.step.tolist() == [0, 10, 20, 30, 40, 50]
    assert run.val.value[3] == 8.0
    assert np.isnan(run.val.value[5])
    assert run.config["GENERAL.total_step"] == 60
    assert run.last_step < run.total_step
    assert measure_run(run, Window.common([run], 0.5, 0.5))["val_last"] == 12.0


def test_differences_of_configurations(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(w), seed=w, warmup=w), "mpjpe_cam") for w in (0, 10)]
    assert differences(runs) == {"GENERAL.dropout_warmup_step": [0, 10]}, "seed and output_root do not count"


def test_curve_between_and_at() -> None:
    curve = Curve(np.array([0, 10, 20]), np.array([1.0, np.nan, 3.0]))
    assert curve.between(0, 20).step.tolist() == [10, 20]
    np.testing.assert_allclose(curve.at(np.array([10, 30])), [2.0, np.nan])


def test_data_file_gives_the_same_comparison(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"ours/{seed}", seed, scaled(0.9 + 0.01 * seed), warmup=10)
        write_run(tmp_path / f"theirs/{seed}", seed, scaled(1 + 0.1 * seed))
    first = compared(tmp_path, [tmp_path / "ours"], [tmp_path / "theirs"])
    write_data(first, tmp_path / "data.json")
    again = read_data(tmp_path / "data.json", OPTIONS)
    assert notes(again) == notes(first)
    for one, two in zip(first.changes()["ours"], again.changes()["ours"], strict=True):
        assert (one.percent, one.low, one.high) == pytest.approx((two.percent, two.low, two.high), rel=1e-3)


def test_data_file_contains_every_metric(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [write_run(tmp_path / "a", val=scaled(0.5))], [write_run(tmp_path / "b")])
    write_data(comparison, tmp_path / "data.json")
    again = read_data(tmp_path / "data.json", OPTIONS, "mpjpe_rel")
    assert again.metric == "mpjpe_rel"
    assert again.changes()["ours"][0].side.mean == pytest.approx(15.0 * 0.5 / 2)
    with pytest.raises(ComparisonError, match=r"has no mpjpe_pa; choose one.*mpjpe_cam, mpjpe_rel"):
        read_data(tmp_path / "data.json", OPTIONS, "mpjpe_pa")


def test_error_messages(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    empty = write_run(tmp_path / "empty", val={0: 90.0})
    (tmp_path / "none").mkdir()
    with pytest.raises(ComparisonError, match=r"wrong/\*: no such folder, and no match as a glob"):
        find_runs([str(tmp_path / "wrong/*")])
    with pytest.raises(ComparisonError, match="neither this folder nor one below it"):
        find_runs([str(tmp_path / "none")])
    with pytest.raises(ComparisonError, match="is a file; give the run folder"):
        find_runs([str(good / "config.yaml")])
    with pytest.raises(ComparisonError, match=r"empty: no validation after step 0"):
        read_run(empty, "mpjpe_cam")
    with pytest.raises(ComparisonError, match=r"no mpjpe_x was validated; choose one.*mpjpe_cam, mpjpe_rel"):
        read_run(good, "mpjpe_x")
    with pytest.raises(ComparisonError, match="is on two sides"):
        read_sides({"a": [good], "b": [good]})
    (good / "config.yaml").unlink()
    with pytest.raises(ComparisonError, match=r"good: its config.yaml cannot be read"):
        read_run(good, "mpjpe_cam")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ComparisonError, match=r"is not a comparison\.json"):
        read_data(tmp_path / "x.json", OPTIONS)


def test_side_names() -> None:
    assert side_names([["runs/gate"], ["runs/constant"]]) == ["gate", "constant"]
    assert side_names([["a/runs/*/*"], ["b/runs"]]) == ["a/runs", "b/runs"]
    assert side_names([["x"], ["x"]]) == ["x (1)", "x (2)"]


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        write_run(tmp_path / f"ours/{seed}", seed, scaled(0.9))
        write_run(tmp_path / f"more/{seed}", seed, scaled(0.8))
        write_run(tmp_path / f"theirs/{seed}", seed)
    ours, more, theirs = (str(tmp_path / name) for name in ("ours", "more", "theirs"))
    out = tmp_path / "out"
    assert main([ours, "--also", more, "--against", theirs, "--output", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "comparison.md", "curves.png"]
    text = (out / "comparison.md").read_text()
    assert "**ours against theirs, mpjpe_cam in mm**" in text
    assert "**more against theirs, " in text
    assert "| -20.0 |" in text
    assert (out / "curves.png").stat().st_size > 20_000
    capsys.readouterr()
    assert main([ours, "--against", theirs, "--output", str(out)]) == 2, "nothing is overwritten"
    assert "is not empty" in capsys.readouterr().err
    assert main(["--redraw", str(out / "comparison.json"), "--output", str(tmp_path / "again")]) == 0
    again = ["more", "--against", "theirs", "--redraw", str(out / "comparison.json"), "--output", str(tmp_path / "two")]
    assert main(again) == 0
    text = (tmp_path / "two" / "comparison.md").read_text()
    assert "more against theirs" in text
    assert "ours against theirs" not in text
    assert main(["x", *again[1:]]) == 2
    assert "x: unknown side; choose from ours, more, theirs" in capsys.readouterr().err
    assert main([ours, "--against", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, script.compare as c\ntry: c.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'matplotlib', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout


def test_changes_of_unequal_numbers(tmp_path: Path) -> None:
    """Three runs against four: not in pairs, each mean over its own side."""
    ours = [read_run(write_run(tmp_path / f"a{s}", s, scaled(1.0 + s)), "mpjpe_cam") for s in range(3)]
    theirs = [read_run(write_run(tmp_path / f"b{s}", s), "mpjpe_cam") for s in range(4)]
    change = changes(ours, theirs, Window.common(ours + theirs, 0.5, 0.5), 200, 0)[0]
    assert not change.is_paired
    assert change.percent == pytest.approx(100.0)
    assert change.low >= 0
