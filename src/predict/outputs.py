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


@dataclass(frozen=True)
class Outputs:
    """The names of one image's output files, whether or not they exist."""

    folder: Path
    name: str

    @property
    def json(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def npz(self) -> Path:
        return self.folder / f"{self.name}.npz"

    @property
    def overlay(self) -> Path:
        return self.folder / f"{self.name}_overlay.jpg"

    def mesh(self, hand: int, is_right: bool) -> Path:
        return self.folder / f"{self.name}_{hand}_{'right' if is_right else 'left'}.obj"

    def existing(self) -> list[Path]:
        """The files that an earlier prediction of this image wrote."""
        pattern = re.compile(rf"{re.escape(self.name)}_\d+_(left|right)\.obj")
        meshes = [p for p in sorted(self.folder.glob("*.obj")) if pattern.fullmatch(p.name)]
        return [p for p in (self.json, self.npz, self.overlay, *meshes) if p.exists()]

    def is_finished(self, kinds: Collection[str]) -> bool:
        """Whether an earlier prediction wrote these kinds of files completely; the JSON is written last."""
        if "json" in kinds:
            return self.json.exists()
        found = self.existing()
        return self.npz in found if "npz" in kinds else bool(found)


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
