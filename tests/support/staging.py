"""Small folders that staging takes for bundles, and what lies beside them."""

import json
from pathlib import Path

from fusionroute.fr_export.bundle.staged_folder import StagedBundle

FILES = ("graphs/a.onnx", "tokenizer.json")
DEAD = 2**22 + 1  # beyond the largest process id


def fill(folder: Path, text: str) -> None:
    """A folder that staging takes for a bundle."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "family": "x", "models": [], "files": dict.fromkeys(FILES)}))


def stage(out: Path, text: str = "new", force: bool = False) -> None:
    with StagedBundle(out, force) as staging:
        fill(staging.folder, text)
        assert staging.folder.parent == out.resolve().parent, "a rename must not cross file systems"


def contents(folder: Path) -> dict[str, str]:
    """All files and links below a folder, hidden ones too."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: "link" if path.is_symlink() else path.read_text() for name, path in paths.items() if path.is_symlink() or path.is_file()}


def bundle(text: str, name: str = "bundle") -> dict[str, str]:
    return {f"{name}/{file}": text for file in FILES}


def texts(folder: Path) -> dict[str, str]:
    return {name: text for name, text in contents(folder).items() if not name.endswith("manifest.json")}


def notes(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
