"""Names of the files of a prediction, and which of them exist already. Standard library only.

<name>.json  <name>.npz  <name>_<hand>_<side>.obj  <name>_overlay.jpg
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("json", "npz", "mesh", "overlay")
JSON, NPZ, OVERLAY = ENDINGS = (".json", ".npz", "_overlay.jpg")


@dataclass(frozen=True)
class Outputs:
    """The names of one image's output files, whether or not they exist."""

    folder: Path
    name: str

    def file(self, ending: str) -> Path:
        """The path with one of ENDINGS."""
        return self.folder / (self.name + ending)

    def mesh(self, hand: int, is_right: bool) -> Path:
        return self.file(f"_{hand}_{'right' if is_right else 'left'}.obj")

    def existing(self) -> list[Path]:
        """The files that an earlier prediction of this image wrote."""
        pattern = re.compile(rf"{re.escape(self.name)}_\d+_(left|right)\.obj")
        meshes = [p for p in sorted(self.folder.glob("*.obj")) if pattern.fullmatch(p.name)]
        return [p for p in (*map(self.file, ENDINGS), *meshes) if p.exists()]

    def is_finished(self, kinds: Collection[str]) -> bool:
        """Whether an earlier prediction wrote these kinds of files completely; the JSON is written last."""
        if "json" in kinds:
            return self.file(JSON).exists()
        found = self.existing()
        return self.file(NPZ) in found if "npz" in kinds else bool(found)


def name_outputs(photos: Sequence[Path], folder: Path) -> dict[Path, Outputs]:
    """Output names from the images' own names. Images that differ in their suffix alone keep it (`a_jpg`, `a_png`); an
    underscore is appended to a name that is taken already (by `a_jpg.png` beside these)."""
    count = Counter(photo.stem for photo in photos)
    names: dict[str, Path] = {}
    for photo in photos:
        name = photo.stem if count[photo.stem] == 1 else photo.name.replace(".", "_")
        while name in names:
            name += "_"
        names[name] = photo
    return {photo: Outputs(folder, name) for name, photo in names.items()}
