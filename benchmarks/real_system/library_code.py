"""Functions of Python's standard library as this interpreter has it: a signature, a docstring, and the next line.

Whole files belong to one split, so nothing that is tested was learnt from. Nothing here runs code: it is parsed.
"""

import ast
import functools
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_system.tasks import Draw, Task

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__", "encodings", "pydoc_data", "ensurepip"}
_CHARACTERS = 600  # of a function, at most: it must fit a prompt
_LINES = range(3, 26)


@dataclass(frozen=True)
class Function:
    """The lines of one function, without its indentation, and the index of the first line after the docstring."""

    file: str
    lines: tuple[str, ...]
    body: int


@functools.cache
def functions() -> tuple[Function, ...]:
    """All short functions with a docstring, in the order of files and lines."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT & {*file.relative_to(root).parts}]
    return tuple(function for file in files for function in _functions(file, file.relative_to(root).as_posix()))


def _functions(file: Path, name: str) -> list[Function]:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):  # other encodings, and examples of wrong code
        return []
    lines = source.split("\n")
    functions = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        indent = node.col_offset
        own = tuple(line[indent:].rstrip() for line in lines[node.lineno - 1 : node.end_lineno])
        docstring = node.body[0]
        if len(own) in _LINES and sum(map(len, own)) <= _CHARACTERS and docstring.end_lineno is not None:
            functions.append(Function(name, own, docstring.end_lineno - node.lineno + 1))
    return functions


def next_line(rng: random.Random) -> Task:
    """A function up to some line of its body; the line after it is the answer. Spaces around it do not count."""
    while True:
        function = rng.choice(functions())
        places = [at for at in range(function.body, len(function.lines)) if function.lines[at].strip()]
        at = rng.choice(places)
        line = function.lines[at].strip()
        if not line.startswith("#") and len(line) > 3:
            break
    shown = "\n".join(function.lines[:at]).rstrip()
    prompt = f"Write the next line of this Python function.\n\n```python\n{shown}\n```"
    return Task(prompt, line, "code", lambda answer: same_line(answer, line), f"code {function.file}")


def body(rng: random.Random) -> Task:
    """A signature with its docstring; the whole body is the answer. For training: few answers could be told right."""
    function = rng.choice(functions())
    shown, rest = "\n".join(function.lines[: function.body]), "\n".join(function.lines[function.body :]).strip("\n")
    prompt = f"Write the body of this Python function.\n\n```python\n{shown}\n```"
    return Task(prompt, rest, "code", lambda answer: answer.strip("\n") == rest, f"code {function.file}")


def same_line(answer: str, line: str) -> bool:
    """Whether an answer is the line: quotes, spaces and a comment behind it aside."""
    return _normal(answer) == _normal(line)


def _normal(line: str) -> str:
    """The statement as Python would print it, where it parses alone, with a body where it opens a block."""
    text = line.strip()
    for candidate in (text, f"{text} pass", f"if x:\n  pass\n{text} pass", f"try:\n  pass\n{text} pass"):
        try:
            return ast.unparse(ast.parse(candidate))
        except (SyntaxError, ValueError, RecursionError):
            continue
    return " ".join(text.split())


KINDS: dict[Draw, float] = {next_line: 2, body: 1}
TESTED: dict[Draw, float] = {next_line: 1}
