"""The error for a sample that cannot be used, and the reason code under which it is counted."""

from __future__ import annotations


class SampleError(Exception):
    """A sample, or a frame of it, that cannot be used. `reason` is the code it is counted under, `detail` explains."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def reason_of(error: Exception) -> str:
    """The reason code for an exception raised while reading a sample.

    Malformed bytes may raise anything: that costs the sample, not the run.
    """
    if isinstance(error, SampleError):
        return error.reason
    return "unreadable" if isinstance(error, OSError) else "unforeseen"
