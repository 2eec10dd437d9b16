"""Photographs as people have them: any format and orientation, and what their EXIF says about the camera.

The EXIF orientation is carried out first; pixels, boxes and cameras then all mean the upright picture, as a viewer
shows it. Training reads stored pixels instead (src/data/sample.py): annotations of data sets refer to those.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import IFD, Base

from src.geometry.camera import guess_intrinsics

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
GUESS = "a guess: the image's diagonal, a view of 53 degrees"
_FULL_FRAME_DIAGONAL = math.hypot(36.0, 24.0)  # mm; CIPA DCG-001: the 35 mm equivalent has the same diagonal angle
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # EXIF FocalPlaneResolutionUnit
_PLAUSIBLE = (0.2, 30.0)  # focal length over image diagonal; a tag that says otherwise is nonsense


class PhotoError(ValueError):
    """A picture that cannot be read; the message says why."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera and where it is known from."""

    focal: tuple[float, float]  # px
    princpt: tuple[float, float]  # px
    source: str  # for people: "EXIF: 26 mm equivalent", "the command line", ...


@dataclass(frozen=True)
class Photo:
    """One picture, upright, and the camera that EXIF or a guess gives it."""

    path: Path
    image: np.ndarray  # [H, W, 3] uint8 RGB
    camera: Camera


def find_photos(path: Path) -> list[Path]:
    """The picture itself, or every picture in the folder by name. Raises ValueError where there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such picture or folder")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"{path}: there is no picture in this folder (looked for {', '.join(SUFFIXES)})")
    return found


def read_photo(path: Path, sensor_width: float | None = None) -> Photo:
    """Decode a picture completely and work out its camera; `sensor_width` mm is for EXIF that knows only the lens.

    Raises PhotoError with the reason: not a picture, truncated, too large.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # odd EXIF, and sizes below the limit that raises
            file.load()
            stored, exif = file.size, file.getexif()
            image = _as_rgb(ImageOps.exif_transpose(file))
            focal, source = _exif_focal(exif, stored, sensor_width)
    except UnidentifiedImageError as error:
        raise PhotoError("is no picture, or damaged at its beginning") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(f"cannot be decoded: {error}") from error
    guess, centre = guess_intrinsics(*image.shape[1::-1])
    both = (focal, focal) if focal else tuple(guess.tolist())
    return Photo(path, image, Camera(both, tuple(centre.tolist()), source))


def _as_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8. 16 bits of grey lose their lower half, where Pillow would clip them."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        value = np.asarray(image)
        if image.mode == "F" or value.min() < 0 or value.max() > 0xFFFF:
            raise PhotoError("has 32 bits a pixel, and nothing says which number is white; save it with 8 or 16")
        image = Image.fromarray((value >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _exif_focal(exif: Image.Exif, size: tuple[int, int], sensor_width: float | None) -> tuple[float | None, str]:
    """Focal length in px of a stored picture of `size`, or None, and where it comes from."""
    lens = exif.get_ifd(IFD.Exif)
    if _was_cropped(lens, size):
        return None, f"{GUESS}; EXIF is not used, since the picture was cropped after it was taken"
    millimetre = _positive(lens.get(Base.FocalLength))
    equivalent = _positive(lens.get(Base.FocalLengthIn35mmFilm))
    pixel = _pixel_pitch(lens, size)
    if sensor_width and millimetre:
        focal, source = millimetre / sensor_width * max(size), f"EXIF: {millimetre:g} mm on {sensor_width:g} mm given"
    elif equivalent:
        focal, source = equivalent / _FULL_FRAME_DIAGONAL * math.hypot(*size), f"EXIF: {equivalent:g} mm equivalent"
    elif millimetre and pixel:
        focal, source = millimetre / pixel, f"EXIF: {millimetre:g} mm, pixels of {1000 * pixel:.3g} um"
    else:
        return None, GUESS
    if not _PLAUSIBLE[0] < focal / math.hypot(*size) < _PLAUSIBLE[1]:
        return None, f"{GUESS}; {source} is not plausible"
    return focal, source


def _was_cropped(lens: dict, size: tuple[int, int]) -> bool:
    """Whether EXIF tells of a picture of another shape."""
    width, height = _positive(lens.get(Base.ExifImageWidth)), _positive(lens.get(Base.ExifImageHeight))
    if not (width and height):
        return False
    return abs(math.log(max(size) / min(size) * min(width, height) / max(width, height))) > 0.02


def _pixel_pitch(lens: dict, size: tuple[int, int]) -> float | None:
    """Width of one stored pixel on the sensor, mm, with regard to a picture that was made smaller since."""
    resolution = _positive(lens.get(Base.FocalPlaneXResolution))
    unit = _UNIT_MM.get(lens.get(Base.FocalPlaneResolutionUnit, 2))
    width = _positive(lens.get(Base.ExifImageWidth)) or size[0]
    return unit / resolution * width / size[0] if resolution and unit else None


def _positive(value: object) -> float | None:
    """An EXIF number where it says anything: 0 and 0/0 mean unknown."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) and number > 0 else None
