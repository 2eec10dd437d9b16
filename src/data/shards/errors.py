"""The error for a sample that cannot be used, and the reason codes under which frames are counted."""

from __future__ import annotations

from src.utils.text import one_line

# reason -> what to do about it; docs/DATA.md has the same table with the meaning of each
REASONS: dict[str, str] = {
    "truncated": "copy or download the shard again; what followed is lost as well, and not counted",
    "zeroed": "copy or download the shard again",
    "bad_header": "copy or download the shard again; check that it is a tar archive",
    "no_end_of_archive": "copy or download the shard again, or close the archive in the program that writes it",
    "incomplete": "copy or download the shard again",
    "empty_shard": "delete it, or write it again",
    "compressed": "unpack it, for example: gunzip < a.tar > b.tar",
    "unreadable": "check the permissions and the disk",
    "linked_member": "write the archive with `tar --dereference --hard-dereference`",
    "sparse_member": "write the archive without `tar --sparse`",
    "scattered_members": "extract and write it sorted: `tar --sort=name`, so that the members of a sample are adjacent",
    "duplicate_member": "give each sample its own key; after `tar -r`: extract (the last member wins), write again",
    "dotted_name": "rename the files: the key ends at the first dot, so it must not contain one",
    "too_large": "write shorter clips: a sample must be below 4 GiB",
    "missing_member": "write an image, a json and hand_bbox.npy or joint_img.npy for each sample",
    "bad_json": "write valid JSON",
    "bad_npy": "write the array with numpy.save",
    "bad_pickle": "write the list again with pickle.dumps",
    "unsafe_pickle": "pickle a flat list of encoded images and nothing else",
    "object_array": "store numbers, not Python objects",
    "wrong_dtype": "store bool, integer or float numbers",
    "wrong_shape": "store the shapes of docs/DATA.md, with one image for each annotated frame",
    "bad_value": "correct the value, or set its flag to 0",
    "not_finite": "correct the value, or set its flag to 0",
    "bad_bbox": "store xyxy px, inside the image and at least 1 px wide",
    "bad_intrinsics": "store px, or set has_intr to 0",
    "undecodable_image": "store a valid jpeg, png or webp",
    "crc_image": "copy the shard again: its bytes have changed since it was indexed",
    "crc_note": "copy the shard again: its bytes have changed since it was indexed",
    "stale_index": "do not rewrite shards during a run",
    "unforeseen": "report it, with the sample",
}


class SampleError(Exception):
    """A sample, or a frame of it, that cannot be used. `reason` is the code it is counted under, `detail` explains."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def detail_of(error: Exception) -> str:
    """What exactly is wrong, in at most 200 characters; "" if only the reason is known."""
    return one_line(error.detail[:200]) if isinstance(error, SampleError) else ""


def reason_of(error: Exception) -> str:
    """The reason code for an exception raised while reading a sample.

    Malformed bytes may raise anything: that costs the sample, not the run.
    """
    if isinstance(error, SampleError):
        return error.reason
    return "unreadable" if isinstance(error, OSError) else "unforeseen"
