"""Text that no model here was trained or calibrated on: Python's language reference, part of every Python."""

from pathlib import Path
from pydoc_data.topics import topics

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.verify.compare import LONGEST
from fusionroute.runtime.text import Text


def language_reference() -> str:
    """All topics, in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def passages(system: System, file: Path | None, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of a UTF-8 file, or of the language reference, cut into pieces of at most LONGEST."""
    text = file.read_text(encoding="utf-8") if file else language_reference()
    ids = Text.load(system.router.folder / "tokenizer.json").encode(text)[:tokens]
    return [ids[start : start + LONGEST] for start in range(0, len(ids), LONGEST)]
