"""Messages in the wire format of protocol buffers, read without a package: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

BYTES, VARINT, EIGHT, FOUR = 2, 0, 1, 5  # wire types
NUMBER = -1

# a field's number, and where its content begins and ends; of a number: the number itself, and NUMBER
Field = tuple[int, int, int]


def fields(content: bytes, place: int, end: int) -> list[Field]:
    """The fields of the message that lies between two bytes of `content`; those of 4 and 8 bytes are passed over.

    A graph has hundreds of thousands, so the short cases stand in line. Raises ValueError where the bytes are no message.
    """
    listed = []
    while place < end:
        tag = content[place]
        place += 1
        if tag > 127:
            tag, place = varint(content, place - 1)
        kind = tag & 7
        if kind == BYTES:
            length = content[place] if place < end else 0
            place += 1
            if length > 127:
                length, place = varint(content, place - 1)
            listed.append((tag >> 3, place, place + length))
            place += length
        elif kind == VARINT:
            value, place = varint(content, place)
            listed.append((tag >> 3, value, NUMBER))
        elif kind in (EIGHT, FOUR):
            place += 8 if kind == EIGHT else 4
        else:
            raise ValueError("it is no ONNX file")
    if place > end:
        raise ValueError("it is cut off")
    return listed


def numbers(content: bytes, place: int, end: int) -> list[int]:
    """The numbers of a packed field. Raises ValueError."""
    listed = []
    while place < end:
        value, place = varint(content, place)
        listed.append(value)
    return listed


def varint(content: bytes, place: int) -> tuple[int, int]:
    """A number that begins at a byte, and where the next begins. Raises ValueError."""
    value = shift = 0
    while place < len(content) and shift < 70:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("it is cut off")
