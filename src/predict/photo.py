"""Read images in any common format, apply their EXIF orientation and derive a camera from EXIF.

Pixels, boxes and cameras all refer to the upright image, as a viewer shows it. Training reads stored pixels instead
(src/data/sample.py), because the annotations of data sets refer to those.
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
from src.utils.files import is_hidden

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
GUESS = "a guess: the image's diagonal, a view of 53 degrees"
_FULL_FRAME_DIAGONAL = math.hypot(36.0, 24.0)  # mm; CIPA DCG-001: the 35 mm equivalent has the same diagonal angle
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # EXIF FocalPlaneResolutionUnit
_PLAUSIBLE = (0.2, 30.0)  # focal length over image diagonal; EXIF values outside this range are ignored


class PhotoError(ValueError):
    """An image that cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera and its source."""

    focal: tuple[float, float]  # px
    princpt: tuple[float, float]  # px
    source: str  # for messages: "EXIF: 26 mm equivalent", "the command line", ...


@dataclass(frozen=True)
class Photo:
    """One image, upright, with the camera from EXIF or a guess."""

    path: Path
    image: np.ndarray  # [H, W, 3] uint8 RGB
    camera: Camera


def find_photos(path: Path) -> list[Path]:
    """The file itself, or every image in the folder, sorted by name. Raises ValueError if there is none.

    Hidden files are ignored: macOS puts `._a.jpg` beside `a.jpg` on foreign disks.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such image or folder")
    found = sorted(p for p in path.iterdir() if _is_photo(p))
    if not found:
        raise ValueError(f"{path}: there is no image in this folder (looked for {', '.join(SUFFIXES)})")
    return found


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path) and path.is_file()


def read_photo(path: Path, sensor_width: float | None = None) -> Photo:
    """Decode an image completely and derive its camera; `sensor_width` mm completes EXIF with the focal length alone.

    Raises PhotoError with the reason: not an image, truncated, too large.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # invalid EXIF, and sizes below the limit that raises
            file.load()
            stored, exif = file.size, file.getexif()
            image = _as_rgb(ImageOps.exif_transpose(file))
            focal, source = _exif_focal(exif, stored, sensor_width)
    except UnidentifiedImageError as error:
        raise PhotoError("is not an image, or corrupt at its beginning") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(f"cannot be decoded: {error}") from error
    guess, centre = guess_intrinsics(*image.shape[1::-1])
    both = (focal, focal) if focal else tuple(guess.tolist())
    return Photo(path, image, Camera(both, tuple(centre.tolist()), source))


def _as_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8. 16-bit grey keeps its upper byte, where Pillow would clip."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        value = np.asarray(image)
        if image.mode == "F" or value.min() < 0 or value.max() > 0xFFFF:
            raise PhotoError("has 32 bits per pixel, and its white level is unknown; save it with 8 or 16 bits")
        image = Image.fromarray((value >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _exif_focal(exif: Image.Exif, size: tuple[int, int], sensor_width: float | None) -> tuple[float | None, str]:
    """Focal length in px of a stored image of `size` (None if unknown), and its source."""
    lens = exif.get_ifd(IFD.Exif)
    if _was_cropped(lens, size):
        return None, f"{GUESS}; EXIF is ignored because the image was cropped after it was taken"
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
    """Whether EXIF records another aspect ratio than that of the stored image."""
    width, height = _positive(lens.get(Base.ExifImageWidth)), _positive(lens.get(Base.ExifImageHeight))
    if not (width and height):
        return False
    return abs(math.log(max(size) / min(size) * min(width, height) / max(width, height))) > 0.02


def _pixel_pitch(lens: dict, size: tuple[int, int]) -> float | None:
    """Width of one stored pixel on the sensor, mm, also for an image that was downscaled after it was taken."""
    resolution = _positive(lens.get(Base.FocalPlaneXResolution))
    unit = _UNIT_MM.get(lens.get(Base.FocalPlaneResolutionUnit, 2))
    width = _positive(lens.get(Base.ExifImageWidth)) or size[0]
    return unit / resolution * width / size[0] if resolution and unit else None


def _positive(value: object) -> float | None:
    """A positive EXIF number, else None: 0 and 0/0 mean unknown."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) and number > 0 else None
