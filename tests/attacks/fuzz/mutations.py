"""Changes of an input that keep its form: other values in JSON, in the header of a tensor file or of an archive's member.

Changes of single bytes would end at the first parser of JSON, or at the first checksum.
"""

import json
import random
import tarfile
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 8, 2**31, 2**63 - 1, 2**63, -(2**63), 10**38, 0.5, 1e308, "", "a", "../a", "/a", "a/b", "a\\b", "\u202e", "\x1b[2J",
    "0" * 64, "graphs/r.onnx", "F16", "BF16", "F64", "ort:cpu", "fp32", "Sequence", "Replace", "LORA", [], {}, [0], [16, 0], [-4, 4], [[]], {"a": 1}, "\ud800",
)  # fmt: skip
BLOCK = tarfile.BLOCKSIZE


def mutated(name: str, content: bytes, draw: random.Random) -> bytes:
    """An input of a target with one to three changes."""
    for _ in range(draw.randint(1, 3)):
        content = once(name, content, draw)
    return content


def once(name: str, content: bytes, draw: random.Random) -> bytes:
    """One change; of single bytes where the input has no form (any more), and now and then."""
    try:
        if draw.random() < 0.2:
            return bytes_changed(content, draw)
        if name in ("tensor_file", "factors"):
            length = int.from_bytes(content[:8], "little")
            text = json_changed(content[8 : 8 + length], draw)
            return len(text).to_bytes(8, "little") + text + content[8 + length :]
        if name == "archive":
            return header_changed(content, draw)
        if name != "graph":
            return json_changed(content, draw)
    except (ValueError, RecursionError, tarfile.HeaderError):
        pass
    return bytes_changed(content, draw)


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """A byte is another, or some are left out, come twice, or come in between."""
    at, length = draw.randint(0, len(content)), draw.choice((1, 2, 8, 40))
    piece = draw.choice((bytes([draw.randrange(256)]), draw.randbytes(length), content[at : at + length] * 2, b""))
    return content[:at] + piece + content[at + draw.choice((0, 1, length)) :]


def json_changed(text: bytes, draw: random.Random) -> bytes:
    """One value of a JSON text is another, is gone, or stands under another key. Raises ValueError for what is no JSON."""
    tree = [json.loads(text)]
    parent, place = draw.choice(places(tree))
    change = draw.random()
    if change < 0.6:
        parent[place] = draw.choice(ODD)
    elif change < 0.75 and isinstance(parent[place], (int, float)):
        parent[place] += draw.choice((-1, 1, 8, 2**32))
    elif change < 0.85:
        del parent[place]
    elif isinstance(parent, dict):
        parent[draw.choice(("a", "b", "router", "", "../a", "F16", *map(str, parent)))] = parent[place]
    else:
        parent.append(parent[place])
    return json.dumps(tree[0] if tree else None).encode()


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All values of a tree, as the object or list that holds each, and its place there."""
    listed = []
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        for place, value in list(parent.items() if isinstance(parent, dict) else enumerate(parent)):
            listed.append((parent, place))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return listed


def header_changed(content: bytes, draw: random.Random) -> bytes:
    """A field of one member's header is another, and its checksum is right. Raises tarfile.HeaderError where there is none."""
    start = draw.randrange(max(1, len(content) // BLOCK)) * BLOCK
    info = tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "strict")
    info.type = draw.choice(
        (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, info.type)
    )
    info.size = draw.choice((0, 1, 63, 64, info.size, 2**33 - 1, 2**40))
    info.name = draw.choice(("manifest.json", "manifest.json.sig", "../a", "/a", "graphs/r.onnx", info.name, "a" * 100))
    return content[:start] + info.tobuf(tarfile.GNU_FORMAT)[:BLOCK] + content[start + BLOCK :]
