"""Read protocol-buffer messages by field number, without a schema or a dependency.

wandb's and TensorBoard's files need a dozen fields between them. Their own packages bring hundreds
of megabytes to a box that only wants to ship a run, and they are strict where a file whose writer
was killed must still be read; the wire format is five rules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from endlex.protocol import EndlexError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MASK64 = (1 << 64) - 1


class Message:
    """The fields of one message, by number, each a list in the order they came."""

    def __init__(self, content: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _iter_fields(content):
            self._fields.setdefault(number, []).append(value)

    def integers(self, number: int) -> list[int]:
        """Every varint of a field as signed 64-bit integers; packed ones are unpacked."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(_signed(value))
            else:
                position = 0
                while position < len(value):
                    item, position = _read_varint(value, position)
                    found.append(_signed(item))
        return found

    def integer(self, number: int, default: int = 0) -> int:
        """The field's last value as a signed 64-bit integer."""
        return (self.integers(number) or [default])[-1]

    def floats(self, number: int, kind: str) -> list[float]:
        """Every value of a `float` (kind "f") or `double` (kind "d") field, packed or not."""
        size = struct.calcsize(f"<{kind}")
        found: list[float] = []
        for value in self._fields.get(number, []):
            if isinstance(value, bytes) and len(value) % size == 0:
                found += struct.unpack(f"<{len(value) // size}{kind}", value)
        return found

    def strings(self, number: int) -> list[str]:
        """Every value of a text field; what is not UTF-8 becomes a replacement character."""
        return [value.decode("utf-8", "replace") for value in self.contents(number)]

    def string(self, number: int) -> str:
        """The field's last value as text, empty when it is absent."""
        return (self.strings(number) or [""])[-1]

    def contents(self, number: int) -> list[bytes]:
        """Every value of a bytes field."""
        return [value for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def messages(self, number: int) -> list[Message]:
        """Every value of a message field."""
        return [Message(value) for value in self.contents(number)]

    def message(self, number: int) -> Message:
        """The field's last message, an empty one when it is absent."""
        return (self.messages(number) or [Message(b"")])[-1]

    def __contains__(self, number: int) -> bool:
        return number in self._fields


def _iter_fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(content):
        key, position = _read_varint(content, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _read_varint(content, position)
            yield number, value
            continue
        if kind == BYTES:
            size, position = _read_varint(content, position)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise EndlexError(f"a damaged record: field {number} has wire type {kind}")
        if position + size > len(content):
            raise EndlexError(f"a damaged record: field {number} ends beyond it")
        yield number, content[position : position + size]
        position += size


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    """Return an unsigned varint and the position after it."""
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & MASK64, position
    raise EndlexError("a damaged record: a number in it does not end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
