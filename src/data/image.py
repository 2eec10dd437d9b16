"""Encoded images: what their headers say, and their pixels."""

from __future__ import annotations

import cv2
import numpy as np

from src.data.shards.errors import SampleError

# An EXIF orientation is ignored: annotations refer to the stored pixels.
_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_PNG = b"\x89PNG\r\n\x1a\n"
_NO_SIZE = frozenset({0x01, *range(0xD0, 0xD9)})  # jpeg markers that stand alone
_FRAME = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """[H, W, 3] uint8 RGB as stored.

    Raises:
        SampleError: undecodable_image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE)
    except cv2.error:
        image = None
    if image is None:
        raise SampleError("undecodable_image", f"{len(data)} bytes do not decode")
    return image


def image_info(data: bytes | memoryview) -> tuple[str, tuple[int, int]]:
    """(jpg, png or webp, (width, height)) from the header of encoded bytes; the pixels are not decoded.

    Raises:
        SampleError: undecodable_image.
    """
    if data[:8] == _PNG and len(data) >= 24:
        return "png", (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return "webp", _webp_size(bytes(data[12:30]))
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME:
            return "jpg", (int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big"))
        at += 1 if marker == 0xFF else 2 if marker in _NO_SIZE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise SampleError("undecodable_image", "neither a jpeg nor a png nor a webp header")


def _webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) from a WebP's first chunk (RFC 9649): lossy, lossless or extended."""
    kind = head[:4]
    if kind == b"VP8 " and head[11:14] == b"\x9d\x01\x2a":
        return int.from_bytes(head[14:16], "little") & 0x3FFF, int.from_bytes(head[16:18], "little") & 0x3FFF
    if kind == b"VP8L" and head[8] == 0x2F:
        bits = int.from_bytes(head[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(head[12:15], "little") + 1, int.from_bytes(head[15:18], "little") + 1
    raise SampleError("undecodable_image", f"a webp whose first chunk is {kind!r}")
