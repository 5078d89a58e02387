"""The command that Optimum finds: a parser like Optimum's hands all arguments on to the exporter's command line."""

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusionroute.fr_export.commands import export
from fusionroute.fr_export.export import Request
from fusionroute.fr_export.families import FAMILIES
from tests.support.paths import REPOSITORY


@dataclass(frozen=True)
class CommandInfo:
    name: str
    help: str


class Base:
    """What the command needs of optimum.commands.base.BaseOptimumCLICommand."""

    COMMAND: CommandInfo

    def __init__(self, args: Any):
        self.args = args

    @classmethod
    def register(cls, subparsers: Any) -> None:
        parser = subparsers.add_parser(cls.COMMAND.name, help=cls.COMMAND.help)
        cls.parse_args(parser)  # type: ignore[attr-defined]
        parser.set_defaults(func=cls)


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """As `optimum-cli` builds it."""
    modules = {
        name: ModuleType(name)
        for name in ("optimum", "optimum.commands", "optimum.commands.base", "optimum.commands.export", "optimum.commands.export.base")
    }
    vars(modules["optimum.commands.base"]).update(BaseOptimumCLICommand=Base, CommandInfo=CommandInfo)
    vars(modules["optimum.commands.export.base"])["ExportCommand"] = Base
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("register_fusionroute", REPOSITORY / "fr_export/commands/optimum.py")
    assert spec is not None and spec.loader is not None
    registered = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(registered)
    root = argparse.ArgumentParser("optimum-cli")
    export = root.add_subparsers().add_parser("export").add_subparsers()
    for command, parent in registered.REGISTER_COMMANDS:
        assert parent is Base
        command.register(export)
    return root


def test_all_arguments_reach_the_exporter(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []
    monkeypatch.setattr("fusionroute.fr_export.export.export", lambda request, stages: requests.append(request))
    monkeypatch.setattr(export, "show", lambda *_: None)
    given = ["--family", "gemma2", "--router", "r", "--expert", "math=a b", "--expert", "code=c", "--lambda", "0.25", "--force"]
    args = parser.parse_args(["export", "fusionroute", *given])
    with pytest.raises(SystemExit) as end:
        args.func(args).run()
    assert end.value.code == 0
    assert requests == [
        Request(
            family=FAMILIES["gemma2"], router="r", experts={"math": "a b", "code": "c"}, precisions=("fp32", "int8"), targets=("ort:cpu",),
            out=Path("dist/gemma2"), lam=0.25, force=True,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "status", "word"),
    [(["--help"], 0, "--max-seq-len"), (["--family", "mamba"], 2, "mamba"), (["-x"], 2, "-x"), ([], 2, "--family")],
)
def test_help_and_wrong_usage_are_the_exporters(
    parser: argparse.ArgumentParser, given: list[str], status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parser.parse_args(["export", "fusionroute", *given])
    with pytest.raises(SystemExit) as end:
        args.func(args).run()
    said = "".join(capsys.readouterr())
    assert end.value.code == status and word in said and "optimum-cli export fusionroute" in said


def test_the_wheel_puts_it_where_optimum_looks() -> None:
    line = '"fr_export/commands/optimum.py" = "optimum/commands/register/register_fusionroute.py"'
    assert f"[tool.hatch.build.targets.wheel.force-include]\n{line}\n" in (REPOSITORY / "pyproject.toml").read_text()
