"""Write docs/refusals.md: every sentence with which a command or a call ends on purpose, read from the source.

`python .ci/refusals.py` writes the page, `--check` exits with 1 where it is not up to date.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/refusals.md"
ERRORS = {"InputError", "FusionError", "BundleError", "UnavailableError", "ClosedError", "BusyError", "NumericalError", "BadParameter"}
AREAS = {  # heading → folders or files; the first that fits
    "Checkpoints": ("fr_export/checkpoints", "fr_export/families"),
    "Commands": ("fr_export/commands", "runtime/commands", "runtime/command_errors.py", "calibration/commands.py"),
    "Training": ("fr_export/training", "fr_export/tasks"),
    "Evaluation": ("fr_export/evaluation", "fr_export/evaluate.py"),
    "Exporting": ("fr_export", "calibration"),
    "TensorRT": ("runtime/tensorrt",),
    "Devices": ("runtime/backends",),
    "Loading and generating": ("runtime",),
}
INTRO = """# All refusals

Every sentence with which a command or a call ends on purpose. `…` stands for a name or a number of yours. Each says
what was expected and how to mend it. [Troubleshooting](troubleshooting.md) goes from what you see to what to do.

The page is written from the source: `python .ci/refusals.py`.
"""


def sentences(file: Path) -> Iterator[str]:
    """The messages of a file's errors, with `…` for what is filled in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and called(node.func) in ERRORS and (text := template(node.args[0])):
            yield " ".join(text.split())


def called(function: ast.expr) -> str:
    """The last name of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def template(message: ast.expr) -> str:
    """A message's text; empty where it is no text of the source, such as another error's."""
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if isinstance(message, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in message.values)
    if isinstance(message, ast.BinOp):
        return template(message.left) + template(message.right)
    return ""


def area(file: Path) -> str:
    """The heading that a file's sentences stand below."""
    name = file.relative_to(ROOT).as_posix()
    return next(heading for heading, places in AREAS.items() if any(name == place or name.startswith(f"{place}/") for place in places))


def page() -> str:
    """The whole page."""
    listed: dict[str, set[str]] = {heading: set() for heading in AREAS}
    for folder in ("fr_export", "calibration", "runtime"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            listed[area(file)].update(text for text in sentences(file) if len(text.split("…")) <= 1 or text.strip("…: ").count(" ") > 2)
    parts = [INTRO]
    for heading, texts in listed.items():
        parts.append(f"## {heading}\n\n" + "\n".join(f"- {quoted(text)}" for text in sorted(texts)) + "\n")
    return "\n".join(parts)


def quoted(text: str) -> str:
    """A sentence as code, so that no character in it is markup."""
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def main() -> int:
    """Write or check the page; the exit status."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
