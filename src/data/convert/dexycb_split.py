"""DexYCB's setups s0 to s3: which subjects, cameras and sequences are train, val and test.

The numbers are from the official toolkit (dex_ycb_toolkit/dex_ycb.py). Subjects and cameras are numbered in order of
their names, sequences in order of their names within a subject (100 each).
"""

from __future__ import annotations

import re
from pathlib import Path

SETUPS = ("s0", "s1", "s2", "s3")
NUM_SEQUENCE = 100
SERIALS = (
    *("836212060125", "839512060362", "840412060917", "841412060263"),
    *("932122060857", "932122060861", "932122061900", "932122062010"),
)
# recording day of each subject, the first part of its folder name
_DAYS = (
    *("20200709", "20200813", "20200820", "20200903", "20200908"),
    *("20200918", "20200928", "20201002", "20201015", "20201022"),
)
_SUBJECT = {
    ("s0", "val"): (0, 1),
    ("s0", "test"): (2, 3, 4, 5, 6, 7, 8, 9),
    ("s1", "train"): (0, 1, 2, 3, 4, 5, 9),
    ("s1", "val"): (6,),
    ("s1", "test"): (7, 8),
}
_SERIAL = {("s2", "train"): (0, 1, 2, 3, 4, 5), ("s2", "val"): (6,), ("s2", "test"): (7,)}
_OBJECT = {
    "train": frozenset(range(20)) - {3, 7, 11, 15, 19},
    "val": frozenset({3, 19}),
    "test": frozenset({7, 11, 15}),
}


def takes_sequence(setup: str, part: str, number: int) -> bool:
    """Whether sequence `number` (0 to 99) of a subject belongs to the part."""
    if setup == "s0":
        return (number % 5 != 4) == (part == "train")
    if setup == "s3":
        return number // 5 in _OBJECT[part]
    return True


def choose_sequences(root: Path, split: str) -> tuple[list[str], frozenset[str] | None]:
    """("subject/sequence" in order, camera serials or None for all) of a split such as "s1/train", or of "all".

    Missing subjects are skipped, so that a part of the download can be used.

    Raises:
        ValueError: no subject of the split exists, or a setup that numbers sequences finds an incomplete subject.
    """
    setup, _, part = split.partition("/")
    numbers = range(len(_DAYS)) if split == "all" else _SUBJECT.get((setup, part), range(len(_DAYS)))
    days = {_DAYS[i] for i in numbers}
    subjects = sorted(p for p in root.glob("20*-*") if p.is_dir() and p.name[:8] in days)
    if not subjects or not (root / "calibration").is_dir():
        raise ValueError(
            f"--input {root}: contains no subject of split {split!r} (20200709-subject-01, ...) beside calibration/; "
            "pass the folder into which DexYCB was unpacked"
        )
    sequences = []
    for subject in subjects:
        names = sorted(p.name for p in subject.iterdir() if p.is_dir() and re.fullmatch(r"\d{8}_\d{6}", p.name))
        if setup in ("s0", "s3") and len(names) != NUM_SEQUENCE:
            raise ValueError(
                f"{subject}: has {len(names)} sequences instead of {NUM_SEQUENCE}, but {setup} selects them by number; "
                "unpack the whole subject, or use s1, s2 or all"
            )
        wanted = [name for i, name in enumerate(names) if split == "all" or takes_sequence(setup, part, i)]
        sequences += [f"{subject.name}/{name}" for name in wanted]
    serials = _SERIAL.get((setup, part))
    return sequences, None if serials is None else frozenset(SERIALS[i] for i in serials)
