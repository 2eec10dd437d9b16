"""Export a trained network: a file for other programs, a small checkpoint or a backbone folder, checked against it.

python script/export.py checkpoint/2026-01-31/12-00-00_stage1-demo --to torch_export onnx
python script/export.py RUN/checkpoints/best --to onnx --output exported --tolerance 0.01
python script/export.py RUN --to backbone --output model/my-backbone
python script/export.py RUN/checkpoints/best --to checkpoint --precision fp16 --output model/hand-mini

Exit code: 0 exported, 1 the outputs differ (nothing is kept), 2 wrong arguments. See docs/PREDICT.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)

if TYPE_CHECKING:
    from src.export.onnx import Difference

DONE, DIFFERS, WRONG_ARGUMENTS = 0, 1, 2
CHECKPOINT, BACKBONE = "checkpoint", "backbone"
SUFFIX = {"torch_export": ".pt2", "onnx": ".onnx"}
NEEDS = {"torch_export": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), CHECKPOINT: (), BACKBONE: ()}
TOLERANCE = {"fp32": 0.01, "fp16": 0.5}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint, e.g. RUN/checkpoints/best"
    )
    parser.add_argument("--to", choices=tuple(NEEDS), nargs="+", required=True, help="what to write")
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder; default: %(default)s")
    parser.add_argument("--name", default="posenet", help="of the files, without suffix; default: %(default)s")
    parser.add_argument(
        "--precision", choices=tuple(TOLERANCE), help="of the weights of --to checkpoint; default: fp32, unchanged"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of an earlier export; a model card keeps what you wrote"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="MM",
        help="largest difference in mm and px; a hundredth of it for rotations and shape; default: 0.01 (fp16: 0.5)",
    )
    parser.add_argument("--hand_model", help="path of MANO_RIGHT.pkl; default: the checkpoint's")
    args = parser.parse_args(argv)
    if args.precision is not None and CHECKPOINT not in args.to:
        parser.error("--precision belongs to --to checkpoint; the other files are float32")
    if len(set(args.to)) > 1 and (alone := {CHECKPOINT, BACKBONE} & set(args.to)):
        parser.error(f"--to {min(alone)} fills a folder of its own; export the other files with another call")
    args.precision = args.precision or "fp32"
    args.tolerance = TOLERANCE[args.precision] if args.tolerance is None else args.tolerance
    if not args.tolerance >= 0:
        parser.error("--tolerance must not be negative")
    for kind in args.to:
        if missing := [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]:
            parser.error(
                f"--to {kind} needs {', '.join(missing)}: .venv/bin/pip install -c constraints.txt '.[export]'"
            )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_paths(args)
        return export(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"export: {error}\n")
        return WRONG_ARGUMENTS
    except KeyboardInterrupt:
        sys.stderr.write("export: interrupted\n")
        return 130


def check_paths(args: argparse.Namespace) -> None:
    """Raise ValueError if the checkpoint does not exist or the output does."""
    if not args.checkpoint.exists() and args.checkpoint.name != "best":
        raise ValueError(f"{args.checkpoint}: there is no such folder; give a run folder or a checkpoint in one")
    if CHECKPOINT in args.to:
        files = [args.output / name for name in ("manifest.json", "model.safetensors")]
    elif BACKBONE in args.to:
        files = [args.output / "model.safetensors"]
    else:
        files = [output_file(args, kind) for kind in args.to]
    if not args.overwrite and (existing := [file for file in files if file.exists()]):
        raise ValueError(f"{existing[0]} exists; choose --overwrite or another --output")
    is_source = args.output.resolve() == args.checkpoint.resolve() or (args.output / "optimizer.pt").exists()
    if CHECKPOINT in args.to and is_source:
        raise ValueError(f"--output {args.output} is a checkpoint to export from; name another folder")


def output_file(args: argparse.Namespace, kind: str) -> Path:
    """The file of one kind of export, `torch_export` or `onnx`."""
    return args.output / f"{args.name}{SUFFIX[kind]}"


def export(args: argparse.Namespace) -> int:
    """Load, export, compare, report."""
    from src.checkpoint.network import load_network
    from src.export.onnx import ExportError, trace
    from src.export.onnx import export as export_file
    from src.export.release import release, release_backbone
    from src.utils.console import console

    loaded = load_network(args.checkpoint, args.hand_model)
    hand_model, output = loaded.network.hand.name, args.output
    console.print(f"{loaded.folder}, step {loaded.step}, hand model {hand_model}", soft_wrap=True)
    lines = []
    try:
        with console.status(f"exporting to {output}"):
            if CHECKPOINT in args.to:
                differences = release(loaded, output, args.precision, args.tolerance)
                report(f"checkpoint, {args.precision}: {output}", differences)
                lines = [f"{size(output)}; edit {output / 'README.md'}"]
            elif BACKBONE in args.to:
                release_backbone(loaded, output)
                file = output / "model.safetensors"
                lines = [f"{file}: {size(file)}; use it with MODEL.backbone.backbone_str={output}"]
            else:
                program = trace(loaded.network)
                for kind in dict.fromkeys(args.to):
                    file = output_file(args, kind)
                    report(f"{kind}: {file}", export_file(loaded, program, kind, file, args.tolerance))
                    lines.append(f"{file}: {size(file)}")
                if hand_model != "standin":
                    lines.append("the files contain MANO's arrays: its licence does not allow you to redistribute them")
    except ExportError as error:
        sys.stderr.write(f"export: {error}\n")
        return DIFFERS
    for line in lines:
        console.print(line, soft_wrap=True)
    return DONE


def size(path: Path) -> str:
    """The size of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.1f} MB, read back and compared"


def report(title: str, differences: Sequence[Difference]) -> None:
    """Print how far each output differs from the network's own."""
    from rich.table import Table

    from src.export.onnx import OUTPUTS
    from src.utils.console import console

    table = Table("output", "what", "largest difference", "allowed", title=title, title_justify="left")
    for d in differences:
        table.add_row(d.name, OUTPUTS[d.name][0], f"{d.largest:.2g}", f"{d.allowed:.2g}")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
