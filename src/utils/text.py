"""Text from outside, made printable."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with unencodable characters escaped: names in a tar can be any bytes (surrogates), JSON half a pair."""
    return text.encode("utf-8", "backslashreplace").decode()
