"""Text from outside, made printable."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with unencodable characters escaped: names in a tar can be any bytes (surrogates), JSON half a pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """`printable`, with control characters escaped, too: a name may hold line breaks and terminal sequences."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], printable(text))
