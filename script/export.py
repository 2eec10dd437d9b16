"""Export a trained network, to one file for other programs or to a small checkpoint, and check that they agree.

python script/export.py checkpoint/2026-01-31/12-00-00_stage1-demo --to torch_export onnx
python script/export.py RUN/checkpoints/best --to onnx --output exported --tolerance 0.01
python script/export.py RUN --to backbone --output model/my-backbone
python script/export.py RUN/checkpoints/best --to checkpoint --precision fp16 --output model/hand-mini

Exit code: 0 exported, 1 the outputs do not agree (nothing is kept), 2 wrong arguments. See docs/PREDICT.md.
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
    from src.model.net import PoseNet

DONE, DIFFERS, WRONG_ARGUMENTS = 0, 1, 2
CHECKPOINT, BACKBONE = "checkpoint", "backbone"
SUFFIX = {"torch_export": ".pt2", "onnx": ".onnx"}
NEEDS = {"torch_export": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), CHECKPOINT: (), BACKBONE: ()}
TOLERANCE = {"fp32": 0.01, "fp16": 0.5}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint), one checkpoint, or `best`")
    parser.add_argument("--to", choices=tuple(NEEDS), nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder; default: %(default)s")
    parser.add_argument("--name", default="posenet", help="of the files, without suffix; default: %(default)s")
    parser.add_argument(
        "--precision", choices=tuple(TOLERANCE), help="of the weights of --to checkpoint; default: fp32, as they are"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of an earlier export; a model card keeps what you wrote"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="MM",
        help="largest difference in mm and px; a hundredth of it for rotations and shape; default: 0.01, fp16: 0.5",
    )
    parser.add_argument("--hand_model", help="where MANO_RIGHT.pkl lies; default: what the checkpoint names")
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
        return export_all(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"export: {error}\n")
        return WRONG_ARGUMENTS
    except KeyboardInterrupt:
        sys.stderr.write("export: interrupted\n")
        return 130


def export_all(args: argparse.Namespace) -> int:
    """Load, export, compare, report."""
    if not args.checkpoint.exists() and args.checkpoint.name != "best":
        raise ValueError(f"{args.checkpoint}: there is no such folder; give a run folder or a checkpoint in one")
    if BACKBONE in args.to:
        return export_backbone(args)
    return export_checkpoint(args) if CHECKPOINT in args.to else export_files(args)


def export_files(args: argparse.Namespace) -> int:
    """Write the network as one file of each kind."""
    files = {kind: args.output / f"{args.name}{SUFFIX[kind]}" for kind in dict.fromkeys(args.to)}
    if not args.overwrite and (existing := [file for file in files.values() if file.exists()]):
        raise ValueError(f"{existing[0]} exists; choose --overwrite or another --output or --name")

    from src.export.onnx import ExportError, export, trace
    from src.utils.console import console

    net = load(args)
    with console.status("tracing"):
        program = trace(net)
    for kind, file in files.items():
        try:
            with console.status(f"exporting to {file}"):
                differences = export(net, program, kind, file, args.tolerance)
        except ExportError as error:
            sys.stderr.write(f"export: {error}\n")
            return DIFFERS
        report(f"{kind}: {file}", differences)
        console.print(f"{file.stat().st_size / 1e6:.1f} MB, read back and compared")
    if net.hand.name != "standin":
        console.print("the files hold MANO's arrays: its licence does not let you pass them on")
    return DONE


def export_checkpoint(args: argparse.Namespace) -> int:
    """Write the network as a checkpoint folder without optimizer state."""
    existing = [args.output / name for name in ("manifest.json", "model.safetensors") if (args.output / name).exists()]
    if existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists; choose --overwrite or another --output")
    if args.output.resolve() == args.checkpoint.resolve() or (args.output / "optimizer.pt").exists():
        raise ValueError(f"--output {args.output} is a checkpoint to export from; name another folder")

    from src.export.onnx import ExportError
    from src.export.release import release
    from src.utils.console import console

    net = load(args)
    try:
        with console.status(f"exporting to {args.output}"):
            differences = release(net, args.output, args.precision, args.tolerance, args.hand_model)
    except ExportError as error:
        sys.stderr.write(f"export: {error}\n")
        return DIFFERS
    report(f"checkpoint, {args.precision}: {args.output}", differences)
    size = sum(file.stat().st_size for file in args.output.iterdir() if file.is_file())
    console.print(f"{size / 1e6:.1f} MB, read back and compared; edit {args.output / 'README.md'}", soft_wrap=True)
    return DONE


def export_backbone(args: argparse.Namespace) -> int:
    """Write the backbone alone as a Hugging Face folder."""
    file = args.output / "model.safetensors"
    if file.exists() and not args.overwrite:
        raise ValueError(f"{file} exists; choose --overwrite or another --output")

    from src.export.onnx import ExportError
    from src.export.release import release_backbone
    from src.utils.console import console

    try:
        release_backbone(load(args), args.output)
    except ExportError as error:
        sys.stderr.write(f"export: {error}\n")
        return DIFFERS
    size = file.stat().st_size
    console.print(f"{file}: {size / 1e6:.1f} MB, read back and equal; use it with "
                  f"MODEL.backbone.backbone_str={args.output}", soft_wrap=True)  # fmt: skip
    return DONE


def load(args: argparse.Namespace) -> PoseNet:
    """The network of the command line."""
    from src.model.net import PoseNet
    from src.utils.console import console

    net = PoseNet.from_checkpoint(args.checkpoint, args.hand_model)
    console.print(f"{net.saved.folder}, step {net.saved.step}, hand model {net.hand.name}", soft_wrap=True)
    return net


def report(title: str, differences: Sequence[Difference]) -> None:
    """Print how far each output is from the network's own."""
    from rich.table import Table

    from src.export.onnx import OUTPUTS
    from src.utils.console import console

    table = Table("output", "what", "largest difference", "allowed", title=title, title_justify="left")
    for d in differences:
        table.add_row(d.name, OUTPUTS[d.name][0], f"{d.largest:.2g}", f"{d.allowed:.2g}")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
