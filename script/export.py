"""Export a trained network to one file for other programs, and check that it computes the same.

python script/export.py checkpoint/2026-01-31/12-00-00_stage1-demo --to torch_export onnx
python script/export.py RUN/checkpoints/best --to onnx --output exported --tolerance 0.01

Exit code: 0 exported, 1 the outputs do not agree (nothing is kept), 2 wrong arguments. See docs/PREDICT.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

DONE, DIFFERS, WRONG_ARGUMENTS = 0, 1, 2
SUFFIX = {"torch_export": ".pt2", "onnx": ".onnx"}
NEEDS = {"torch_export": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint), one checkpoint, or `best`")
    parser.add_argument("--to", choices=tuple(SUFFIX), nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder; default: %(default)s")
    parser.add_argument("--name", default="posenet", help="of the files, without suffix; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier export")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="MM",
        help="largest difference in mm and px; a hundredth of it for rotations and shape; default: %(default)s",
    )
    parser.add_argument("--hand_model", help="where MANO_RIGHT.pkl lies; default: what the checkpoint names")
    args = parser.parse_args(argv)
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
    """Load, export, compare, tell."""
    files = {kind: args.output / f"{args.name}{SUFFIX[kind]}" for kind in dict.fromkeys(args.to)}
    if not args.overwrite and (existing := [file for file in files.values() if file.exists()]):
        raise ValueError(f"{existing[0]} exists; choose --overwrite or another --output or --name")
    if not args.checkpoint.exists() and args.checkpoint.name != "best":
        raise ValueError(f"{args.checkpoint}: there is no such folder; give a run folder or a checkpoint in one")

    from rich.table import Table

    from src.engine.console import console
    from src.engine.export import OUTPUTS, ExportError, export, trace
    from src.model.net import PoseNet

    net = PoseNet.from_checkpoint(args.checkpoint, args.hand_model)
    console.print(f"{net.saved.folder}, step {net.saved.step}, hand model {net.hand.name}", soft_wrap=True)
    with console.status("tracing"):
        program = trace(net)
    for kind, file in files.items():
        try:
            with console.status(f"exporting to {file}"):
                differences = export(net, program, kind, file, args.tolerance)
        except ExportError as error:
            sys.stderr.write(f"export: {error}\n")
            return DIFFERS
        table = Table("output", "what", "largest difference", "allowed", title=f"{kind}: {file}", title_justify="left")
        for d in differences:
            table.add_row(d.name, OUTPUTS[d.name][0], f"{d.largest:.2g}", f"{d.allowed:.2g}")
        console.print(table)
        console.print(f"{file.stat().st_size / 1e6:.1f} MB, read back and compared")
    if net.hand.name != "standin":
        console.print("the files hold MANO's arrays: its licence does not let you pass them on")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
