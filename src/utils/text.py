"""Text that others wrote, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` in characters that can be encoded: names in a tar may hold any bytes (as surrogates), JSON half a pair."""
    return text.encode("utf-8", "backslashreplace").decode()
