"""The folder: sources, bundles and wheels beside the script that uses them."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_kit.parts import pack, write_sums
from fusionroute.runtime.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("run.sh")
ARCHIVE = "kit.tar"
FOLDERS = ("sources", "bundles", "wheels")
MEGABYTE = 10**6


def lay_out(out: Path, bundles: Sequence[Path]) -> Path:
    """Sources and bundles in an empty folder; returns where the wheels go. Raises InputError where it holds something."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name a new folder for the kit.")
    for name in FOLDERS:
        (out / name).mkdir(parents=True, exist_ok=True)
    for name in tracked():
        target = out / "sources" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    for bundle in bundles:
        shutil.copytree(bundle, out / "bundles" / bundle.name)
    return out / "wheels"


def tracked() -> list[str]:
    """The checkout's files: what git tracks, and what it does not ignore. Raises InputError outside of one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"git does not list the files of {REPOSITORY}: make the kit in a clone.") from error
    return [name for name in listed.split("\0") if name and (REPOSITORY / name).is_file() and not (REPOSITORY / name).is_symlink()]


def close(out: Path, requirements: Sequence[str], megabytes: int | None) -> None:
    """Add the script and what it reads; with `megabytes`, put the folders in parts of at most that size each."""
    (out / "wheels" / "requirements.txt").write_text("".join(f"{each}\n" for each in requirements), encoding="utf-8")
    shutil.copy2(SCRIPT, out / "run.sh")
    (out / "run.sh").chmod(0o755)
    if megabytes is None:
        write_sums(out, [path for path in out.rglob("*") if path.is_file() and path.parent.name == "wheels"])
        return
    write_sums(out, pack(out, FOLDERS, ARCHIVE, megabytes * MEGABYTE))
    for name in FOLDERS:
        shutil.rmtree(out / name)
