"""Predict the hands in images with a trained network: numbers, meshes and overlays.

python script/predict.py checkpoint/2026-01-31/12-00-00_stage1-demo hand.jpg --handedness left
python script/predict.py RUN/checkpoints/best photos/ --boxes boxes.json --output predicted

Exit code: 0 all predicted, 1 an image was skipped, 2 wrong arguments. See docs/PREDICT.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)
from src.predict.outputs import KINDS, name_outputs

DONE, SKIPPED_SOME, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint, e.g. RUN/checkpoints/best"
    )
    parser.add_argument("photos", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--boxes", type=Path, help="JSON list of hands; without it each image is a crop of one hand")
    parser.add_argument("--handedness", choices=("left", "right"), help="of every hand; overrides the boxes file")
    parser.add_argument("--focal", type=_positive, nargs="+", metavar="PX", help="one focal length, or two: x and y")
    parser.add_argument("--princpt", type=_finite, nargs=2, metavar=("X", "Y"), help="px; default: the image centre")
    parser.add_argument("--sensor_width", type=_positive, metavar="MM", help="longer side of the sensor, for EXIF")
    parser.add_argument("--output", type=Path, default=Path("prediction"), help="folder; default: %(default)s")
    parser.add_argument("--write", choices=KINDS, nargs="+", default=KINDS, help="default: all")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the outputs of an earlier prediction")
    existing.add_argument("--skip_existing", action="store_true", help="continue an interrupted prediction")
    parser.add_argument("--hand_model", help="path of MANO_RIGHT.pkl; default: the checkpoint's")
    parser.add_argument("--batch_size", type=int, default=16, help="hands at once; default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.focal is not None and len(args.focal) > 2:
        parser.error(f"--focal takes one number or two, not {len(args.focal)}")
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    return args


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _positive(text: str) -> float:
    if (value := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return predict(args)
    except ValueError as error:
        sys.stderr.write(f"predict: {error}\n")
        return WRONG_ARGUMENTS
    except OSError as error:
        sys.stderr.write(f"predict: stopped: {error}; continue with --skip_existing\n")
        return WRONG_ARGUMENTS
    except KeyboardInterrupt:
        sys.stderr.write("predict: interrupted; continue with --skip_existing\n")
        return INTERRUPTED


def predict(args: argparse.Namespace) -> int:
    """Check the arguments, load the network, predict, print a summary. Heavy imports wait for the checks."""
    from src.predict.boxes import read_boxes
    from src.predict.photo import find_photos

    photos = find_photos(args.photos)
    boxes, unknown = read_boxes(args.boxes, photos) if args.boxes else (None, [])
    if boxes is not None and not any(boxes.values()):
        listed = f"it lists {unknown[0]}{', ...' if len(unknown) > 1 else ''}" if unknown else "it is empty"
        raise ValueError(
            f"{args.boxes} lists none of the images at {args.photos}: {listed}. "
            "Paths in it are relative to the file itself or to the folder of images"
        )
    if args.output.resolve() in {photo.parent.resolve() for photo in photos}:
        raise ValueError(f"--output {args.output} is the folder of the images; name another folder")
    outputs = name_outputs(photos, args.output)
    finished = [photo for photo in photos if outputs[photo].existing()]
    if finished and not (args.overwrite or args.skip_existing):
        raise ValueError(
            f"outputs of {len(finished)} of {len(photos)} images already exist, e.g. "
            f"{outputs[finished[0]].existing()[0]}; choose --overwrite, --skip_existing or another --output"
        )
    if args.skip_existing:
        photos = [photo for photo in photos if not outputs[photo].is_finished(args.write)]

    import torch

    from src.predict.predictor import Predictor
    from src.predict.run import Options, predict_photos
    from src.utils.console import console, progress_bar

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor.load(args.checkpoint, args.hand_model, _checked_device(device))
    loaded = predictor.loaded
    hand_model = loaded.network.hand.name
    console.print(f"{loaded.folder}, step {loaded.step}, hand model {hand_model}, on {device}", soft_wrap=True)
    if boxes is None and photos:
        what = "the whole image is" if len(photos) == 1 else f"each of the {len(photos)} whole images is"
        console.print(f"warning: no --boxes, so {what} treated as the crop of one hand; pass --boxes if hands are "
                      "small in the image or it shows several", soft_wrap=True)  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    focal = None if args.focal is None else (args.focal[0], args.focal[-1])
    is_right = None if args.handedness is None else args.handedness == "right"
    princpt = args.princpt and tuple(args.princpt)
    options = Options(is_right, focal, princpt, args.sensor_width, args.batch_size, frozenset(args.write))
    with progress_bar() as progress:
        task = progress.add_task("predicting", total=len(photos))

        def advance(path: Path, problem: str | None) -> None:
            progress.advance(task)
            if problem:
                progress.console.print(f"skipped {path}: {problem}", soft_wrap=True)

        summary = predict_photos(predictor, photos, boxes, outputs, options, advance)
    for line in summary.lines(args.output, unknown, len(finished) if args.skip_existing else 0):
        console.print(line, soft_wrap=True)
    return SKIPPED_SOME if summary.skipped else DONE


def _checked_device(name: str) -> str:
    """The name of an available device. Raises ValueError otherwise."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


if __name__ == "__main__":
    raise SystemExit(main())
