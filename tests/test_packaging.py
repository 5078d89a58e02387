"""Installs serve an app that has a `runtime` of its own: a checkout, an editable install, a wheel, one of the sdist."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from fusionroute.runtime import FusionRuntime, __version__
from tests.support.exporting import export_system
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape

PROMPT = [2, 5, 9]

APP = """
import sys
import calibration, export, runtime
from fusionroute import FusionRuntime, __version__

assert (calibration.OWNER, export.OWNER, runtime.OWNER) == ("app",) * 3
with FusionRuntime.load(sys.argv[1]) as system:
    print(*system.generate([2, 5, 9], max_new_tokens=4).token_ids)
"""


def run(*command: object, folder: Path, **variables: str) -> str:
    """What a command prints; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    ended = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def pip_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source folder, made without a network."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, folder=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def editable_wheel(folder: Path) -> Path:
    """What `pip install --editable` makes of the checkout and installs: links, not copies."""
    build = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    return folder / run(sys.executable, "-c", build, folder, folder=REPOSITORY).split()[-1]


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a virtual environment with a wheel installed and this environment's other packages at hand."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, folder=folder)
    (Path(packages) / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkout."""
    return pip_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small system."""
    return export_system(tmp_path_factory.mktemp("system"), Shape(layers=1, experts=2, tokenizer=True), ("fp32",))[0]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A folder with modules of the names that our folders have."""
    (tmp_path / "runtime").mkdir()
    for name in ("runtime/__init__.py", "calibration.py", "export.py"):
        (tmp_path / name).write_text('OWNER = "app"\n')
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def check_app(python: Path, command: tuple[object, ...], app: Path, bundle: Path, **variables: str) -> None:
    """From the app's folder, the library and the command load the bundle and generate what this process does."""
    with FusionRuntime.load(bundle) as system:
        expected = system.generate(PROMPT, max_new_tokens=4).token_ids
    assert run(python, "app.py", bundle, folder=app, **variables).split() == list(map(str, expected))
    ids = ",".join(map(str, PROMPT))
    generated = run(*command, "generate", bundle, "--prompt-ids", ids, "--max-new-tokens", 4, "--json", folder=app, **variables)
    assert json.loads(generated)["token_ids"] == expected
    inspected = run(*command, "inspect", bundle, "--json", folder=app, **variables)
    assert [model["name"] for model in json.loads(inspected)["models"]] == ["router", "expert0", "expert1"]
    for prefix in (command, (python, "-m", "fusionroute")):
        assert run(*prefix, "--version", folder=app, **variables).startswith(f"fusionroute {__version__}")


def test_an_app_uses_a_checkout(app: Path, bundle: Path) -> None:
    python = Path(sys.executable)
    check_app(python, (python, "-m", "fusionroute"), app, bundle, PYTHONPATH=str(REPOSITORY))


def test_an_app_uses_a_wheel(wheel: Path, app: Path, bundle: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel)
    check_app(python, (python.with_name("fusionroute"),), app, bundle)


def test_an_app_uses_an_editable_install(app: Path, bundle: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", editable_wheel(tmp_path))
    check_app(python, (python.with_name("fusionroute"),), app, bundle)
    where = run(python, "-c", "import fusionroute.runtime.engine as engine; print(engine.__file__)", folder=app).strip()
    assert Path(where) == REPOSITORY / "runtime" / "engine.py", "an edit in the checkout takes effect"


def test_the_wheel_puts_one_package_at_the_top(wheel: Path) -> None:
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {name.parts[0] for name in names} == {"fusionroute", f"fusionroute-{__version__}.dist-info", "optimum"}
    assert [str(name) for name in names if name.parts[0] == "optimum"] == ["optimum/commands/register/register_fusionroute.py"]
    package = {str(name) for name in names if name.parts[0] == "fusionroute"}
    for folder in ("runtime", "calibration", "fr_export"):
        tracked = run("git", "ls-files", folder, folder=REPOSITORY).split() if (REPOSITORY / ".git").exists() else []
        assert {f"fusionroute/{name}" for name in tracked} <= package
    assert {f"fusionroute/{name}" for name in ("__init__.py", "__main__.py", "py.typed", "runtime/py.typed")} <= package
    assert not [name for name in package if name.endswith(".pyc")]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path / "sdist", folder=REPOSITORY)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    again = pip_wheel(sdist, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
