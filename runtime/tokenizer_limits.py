"""Whether a tokenizer.json is bounded: what it makes of a text is no more than a multiple of it. Imports nothing of this package.

It is run as a program too, `python tokenizer_limits.py BYTES < tokenizer.json`, in a process that may hang, and may take
so much memory, and 64 bytes for each of the file: it then reads the file with the native library, and encodes and decodes
some texts. The library is imported before the file is read.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MOST_BYTES = 1 << 28  # of a tokenizer.json: those of vocabularies of 256k tokens have 35 MB
MOST_STEPS = 100  # normalisers, pre-tokenisers, post-processors and decoders together
MOST_GROWTH = 64  # how many times longer a text may become
MOST_ADDED = 1000  # characters that a step may add once
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PRECOMPILED = b"Precompiled"  # tables of SentencePiece, which are looked at before the library reads them
TRIALS = ("", "a", "Hello, world! 12+30=42", "a" * 300, " " * 300, "\n\t\r", "äöü ﷺ 漢字 🙂 \u0301\u200d", "<bos>\x00\ufffd")


def unbounded(content: bytes) -> str | None:
    """Why a tokenizer.json is refused; None where it is bounded."""
    if len(content) > MOST_BYTES:
        return f"it has more than {MOST_BYTES} bytes"
    try:
        tokenizer = json.loads(content)
        return unbounded_parts([tokenizer.get(name) for name in PARTS])
    except ValueError as error:
        return " ".join(str(error).split())
    except (TypeError, AttributeError, RecursionError) as error:
        return f"it is no tokenizer: {type(error).__name__}"


def unbounded_parts(parts: list[Any]) -> str | None:
    """The same of its parts, without the vocabulary."""
    try:
        chains = [list(steps(part)) for part in parts]
        if sum(map(len, chains)) > MOST_STEPS:
            return f"it has more than {MOST_STEPS} steps"
        for chain in chains:
            growth = 1.0
            for step in chain:
                growth *= growth_of(step)
            if growth > MOST_GROWTH:
                return f"it makes texts more than {MOST_GROWTH} times longer"
    except ValueError as error:
        return " ".join(str(error).split())
    except (TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"it is no tokenizer: {type(error).__name__}"
    return None


def steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of the tokenizer, those of sequences in their order."""
    if part is None:
        return
    inner = [part[name] for name in ("normalizers", "pretokenizers", "processors", "decoders") if name in part]
    if not inner:
        yield part
    for each in inner:
        for step in each:
            yield from steps(step)


def growth_of(step: dict[str, Any]) -> float:
    """How many times longer a step makes a text at most. Raises ValueError for one that is broken."""
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"], str(step["content"])
        if "String" in pattern and not pattern["String"]:
            raise ValueError("it replaces nothing by something")
        return max(1.0, len(content) / len(pattern["String"]) if "String" in pattern else 1.0 + len(content))
    if kind == "Prepend" and len(str(step["prepend"])) > MOST_ADDED:
        raise ValueError(f"it prepends more than {MOST_ADDED} characters")
    if kind == "FixedLength" and int(step["length"]) < 1:
        raise ValueError("it has pieces without a character")
    if kind == "Precompiled":
        check_charsmap(step["precompiled_charsmap"])
    if kind == "TemplateProcessing":
        if max(len(step["single"]), len(step["pair"])) > MOST_ADDED:
            raise ValueError(f"its template has more than {MOST_ADDED} pieces")
        return max(1.0, sum("Sequence" in piece for piece in step["single"]))
    return 1.0


def check_charsmap(charsmap: str) -> None:
    """Raise ValueError for a table of SentencePiece that tells of more bytes than it has: its reader asks for them at once."""
    try:
        table = base64.b64decode(charsmap, validate=True)
    except ValueError as error:
        raise ValueError("its charsmap is no base64") from error
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or size > len(table) - 4:
        raise ValueError("its charsmap is cut off")


def limit_memory(most: int) -> None:
    """Let this process take so many bytes, and write no core file; without effect on Windows."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """Print why the tokenizer.json on stdin is refused, and return 1; 0 where it is bounded and works."""
    with suppress(ImportError):  # told below
        import tokenizers  # noqa: F401
    content = sys.stdin.buffer.read(MOST_BYTES + 1)
    limit_memory(int(sys.argv[1]) + 64 * len(content))
    reason = unbounded(content) if PRECOMPILED in content or len(content) > MOST_BYTES else None
    if reason is None:
        reason = refused(content)
    if reason is not None:
        print(reason)
    return 0 if reason is None else 1


def refused(content: bytes) -> str | None:
    """Why the library, or what it has read, is refused; None where it works. Python takes as long for a vocabulary as the
    library, so that only the other parts are read again.
    """
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        parts = [getattr(tokenizer, name) for name in PARTS]
        reason = unbounded_parts([None if part is None else json.loads(part.__getstate__()) for part in parts])
    except BaseException as error:  # its panics are no Exceptions
        return unbounded(content) or " ".join(str(error).split())
    if reason is None:
        for text in TRIALS:
            with suppress(BaseException):  # costs a request, which is told then
                tokenizer.decode(tokenizer.encode(text).ids)
    return reason


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once: to take a large vocabulary apart takes a tenth of the time
