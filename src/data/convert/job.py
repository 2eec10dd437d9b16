"""Runs a conversion: each chunk of the job becomes one shard, written by parallel processes.

A shard depends on its chunk only, so it is identical to the byte for any number of processes and after interruptions.
`output/.convert/` has a note for each finished chunk; repeating the call converts the rest.
`output/convert.json` records the arguments; a call with different ones is refused.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from src.data.convert.chunk import Chunk, ConvertSummary, Job, Progress, Request, take
from src.data.convert.mano_check import (
    NUM_CHECK,
    Convention,
    Conventions,
    apply_convention,
    can_check,
    describe,
    find_convention,
)
from src.data.shards.errors import SampleError
from src.data.shards.processes import map_processes
from src.data.shards.writer import HandRecord, write_shard
from src.hand.mano_file import load_hand_arrays
from src.utils.files import write_atomic

VERSION = 2  # increment it if the same input gives different hands
MANIFEST = "convert.json"
NOTES = ".convert"
_CHECK_PER_CHUNK = 16  # hands per side, so that the check covers several sequences
_CHECK_CHUNKS = 200


def run(job: Job, request: Request, progress: Progress | None = None) -> ConvertSummary:
    """Write every shard of the job that does not exist yet.

    Raises:
        ValueError: nothing to convert, a MANO file that cannot be used, the output folder belongs to another call, or a
            worker process was killed.
    """
    if not job.chunks:
        raise ValueError(f"--input {request.input}: contains nothing of split {request.split!r} of {job.name}")
    if request.mano is not None:
        load_hand_arrays(request.mano)  # an unusable file is refused before the output folder is bound to it
    notes = _open_output(job, request)
    todo = [chunk for chunk in job.chunks if not _is_done(chunk, request.output, notes)]
    total = sum(chunk.size for chunk in job.chunks)
    done = total - sum(chunk.size for chunk in todo)
    if progress:
        progress(done, total)
    conventions, lines = _check_mano(job, request, notes)
    work = [
        (chunk, request.output, _note_path(notes, chunk), conventions.get(chunk.group, {}), request.mano)
        for chunk in todo
    ]
    try:
        context = multiprocessing.get_context("spawn")  # forking a process with running torch threads can hang
        for size in map_processes(convert_chunk, work, request.num_process, context, _exit_with_parent):
            done += size
            if progress:
                progress(done, total)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (out of memory?); repeat the call to continue, with a lower --num_process if "
            "necessary"
        ) from None
    for part in request.output.glob("**/.*.tar.*.part"):  # left by killed processes
        part.unlink()
    return _summary(job, notes, lines)


def _summary(job: Job, notes: Path, lines: list[str]) -> ConvertSummary:
    """Add up the notes of all chunks. Raises ValueError if not a single hand could be used."""
    found = [json.loads(_note_path(notes, chunk).read_text(encoding="utf-8")) for chunk in job.chunks]
    skipped: Counter[str] = Counter()
    withheld: Counter[str] = Counter()
    example: dict[str, str] = {}
    for note in found:
        skipped.update(note["skipped"])
        withheld.update(note["withheld"])
        example = {**note["example"], **example}
    lines = [*job.note, *lines] + [
        f"{job.name}: skipped as {reason}, for example: {example[reason]}" for reason in sorted(example)
    ]
    num_hand = [note["num_hand"] for note in found]
    if not any(num_hand):
        shutil.rmtree(notes)  # so that this call, or one with other options, starts again
        (notes.parent / MANIFEST).unlink()
        raise ValueError("\n".join([f"{job.name}: no hand could be used ({dict(skipped)})", *lines]))
    num_shard = sum(n > 0 for n in num_hand)
    return ConvertSummary(
        sum(num_hand), num_shard, dict(sorted(skipped.items())), dict(sorted(withheld.items())), tuple(lines)
    )


def _digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else None


def _note_path(notes: Path, chunk: Chunk) -> Path:
    return notes / f"{chunk.name}.json"


def _is_done(chunk: Chunk, output: Path, notes: Path) -> bool:
    """Whether a chunk has a note, and its shard exists if the note counts any hand."""
    path = _note_path(notes, chunk)
    return path.exists() and (
        (output / f"{chunk.name}.tar").exists() or json.loads(path.read_text(encoding="utf-8"))["num_hand"] == 0
    )


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _open_output(job: Job, request: Request) -> Path:
    """Create the output folder, or check that it belongs to the same call; returns the folder of notes."""
    wanted = {
        "version": VERSION,
        "converter": job.name,
        "input": str(request.input.resolve()),
        "split": request.split,
        "num_per_shard": request.num_per_shard,
        "mano": _digest(request.mano),
        "mano_left": _digest(request.mano_left),
        "options": request.options,
    }
    path, notes = request.output / MANIFEST, request.output / NOTES
    if path.exists():
        try:
            found = _arguments(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}: does not parse; delete the folder {request.output} and start again") from None
        for key, value in _arguments(wanted).items():
            if found.get(key) != value:
                raise ValueError(
                    f"--output {request.output}: was written with {key}={found.get(key)!r}, this call has {value!r}; "
                    "delete that folder, or choose another one"
                )
    elif any(request.output.glob("**/*.tar")):
        raise ValueError(f"--output {request.output}: contains shards but no {MANIFEST}; choose an empty folder")
    _write_json(path, wanted)
    return notes


def _arguments(manifest: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a manifest, with each option of the converter under its own name."""
    return {**manifest, **manifest.get("options", {}), "options": None}


def _check_mano(job: Job, request: Request, notes: Path) -> tuple[dict[str, Conventions], list[str]]:
    """The MANO convention of each group and side, and lines to print. The notes keep it for later calls."""
    if request.mano is None:
        return {}, [f"{job.name}: {job.without_mano}"]
    conventions: dict[str, Conventions] = {}
    lines: list[str] = []
    for group in dict.fromkeys(chunk.group for chunk in job.chunks):
        path = notes / group / "mano.json"
        if not path.exists():
            chunks = [chunk for chunk in job.chunks if chunk.group == group]
            _write_json(path, {k: asdict(v) for k, v in _check_group(job, chunks, request.mano).items()})
        found = {k: Convention(**v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
        conventions[group] = found
        if not found:
            lines.append(f"{group or job.name}: no hand has both MANO parameters and joints; convention not checked")
        lines += [describe(group or job.name, side, found[side], job.tolerance_mm) for side in sorted(found)]
    return conventions, lines


def _check_group(job: Job, chunks: list[Chunk], mano: Path) -> Conventions:
    """Find the convention from the first hands of each side; a side without hands to check is omitted."""
    hands: dict[str, list[HandRecord]] = {side: [] for side in job.sides}
    for chunk in chunks[:_CHECK_CHUNKS]:
        fresh: Counter[str] = Counter()
        for record in filter(can_check, take(islice(chunk.read(*chunk.arguments), 8 * _CHECK_PER_CHUNK))):
            if fresh[record.handedness] < _CHECK_PER_CHUNK and len(hands[record.handedness]) < NUM_CHECK:
                hands[record.handedness].append(record)
                fresh[record.handedness] += 1
        if all(len(found) >= NUM_CHECK for found in hands.values()):
            break
    found = {side: find_convention(hands[side], mano, side, job.tolerance_mm, job.left_file_shape) for side in hands}
    return {side: convention for side, convention in found.items() if convention is not None}


def _exit_with_parent() -> None:
    """End this worker when its parent dies; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def convert_chunk(chunk: Chunk, output: Path, note: Path, conventions: Conventions, mano: Path | None) -> int:
    """Write one chunk's shard, then its note (a chunk without a note is converted again); returns `chunk.size`."""
    skipped: list[SampleError] = []
    withheld: Counter[str] = Counter()

    def hands() -> Iterator[HandRecord]:
        for record in take(chunk.read(*chunk.arguments), skipped):
            withheld.update(record.withheld)
            yield apply_convention(record, conventions, mano)

    num_hand = write_shard(hands(), output / f"{chunk.name}.tar")
    example = {skip.reason: skip.detail for skip in reversed(skipped) if skip.detail}
    reasons = Counter(skip.reason for skip in skipped)
    _write_json(note, {"num_hand": num_hand, "skipped": reasons, "withheld": +withheld, "example": example})
    return chunk.size
