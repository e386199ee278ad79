"""Which bytes of a file a download asks for (RFC 9110, section 14), and how they are answered."""

from __future__ import annotations

import re
from dataclasses import dataclass

from endlex.server.errors import ApiError

SINGLE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class ByteRange:
    """Bytes from `start` up to, not including, `end`; `partial` for a 206."""

    start: int
    end: int
    partial: bool


def parse_range(header: str | None, size: int) -> ByteRange:
    """Return what a Range header asks of a file; several ranges, or another unit, mean all of it.

    Raises:
        ApiError: 416, nothing of it lies in the file.
    """
    match = SINGLE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return ByteRange(0, size, False)
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < int(first):
            return ByteRange(0, size, False)
    if start >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        raise ApiError(416, f"the file has {size:,} bytes: ask for some of them", headers)
    return ByteRange(start, end, True)
