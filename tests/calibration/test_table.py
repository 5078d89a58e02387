"""The calibration table on disk, in numbers and on the terminal."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fusionroute.calibration import checksummed_file
from fusionroute.calibration.commands import VERB
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import NOBODY, RecordedText
from fusionroute.calibration.table import KIND, Table, figures
from fusionroute.runtime.commands.verbs import run_verb
from fusionroute.runtime.errors import InputError
from tests.support.commands import Command, in_folder

ROWS = {"router": 400, "math": 30, "code": 0}


def inputs(model: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(model))
    wide = rng.standard_normal((ROWS[model], 6)) * [1, 1, 2, 3, 4, 50]
    return {"model.layers.10.q": wide.astype(np.float32), "model.layers.2.q": rng.standard_normal((ROWS[model], 4)).astype(np.float32)}


def example_table() -> Table:
    texts = [RecordedText(np.array([1, 2, 3, 4], np.int32), np.array([NOBODY, 0, 0, NOBODY], np.int8))]
    texts.append(RecordedText(np.array([7, 8], np.int32), np.array([1, NOBODY], np.int8)))
    models: dict[str, dict[str, Observer]] = {}
    for model in ROWS:
        models[model] = {matrix: Observer(matrix, x.shape[1]) for matrix, x in inputs(model).items()}
        for matrix, x in inputs(model).items():
            models[model][matrix].see(x)
    return Table(texts, models, "ab" * 32)


def test_there_and_back(tmp_path: Path) -> None:
    table = example_table()
    table.save(tmp_path / "t.safetensors")
    again = Table.load(tmp_path / "t.safetensors")
    assert again.identity == table.identity
    assert [list(observers) for observers in again.models.values()] == [list(observers) for observers in table.models.values()]
    assert list(again.models) == list(table.models) == ["router", "math", "code"], "the order of the experts"
    for model, observers in table.models.items():
        for matrix, observer in observers.items():
            for name, value in vars(observer).items():
                np.testing.assert_array_equal(vars(again.models[model][matrix])[name], value)
    for one, other in zip(again.texts, table.texts, strict=True):
        for name in ("ids", "experts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (tmp_path / "t.safetensors").stat().st_size < 12_000 * len(ROWS) * 2


@pytest.mark.parametrize("table", [Table([], {}, ""), Table(example_table().texts, {}, "x"), Table([], example_table().models, "x")])
def test_parts_alone(tmp_path: Path, table: Table) -> None:
    table.save(tmp_path / "t")
    again = Table.load(tmp_path / "t")
    assert len(again.texts) == len(table.texts) and list(again.models) == list(table.models)


def test_tables_that_lack_something(tmp_path: Path) -> None:
    example_table().save(tmp_path / "t")
    tensors, about = checksummed_file.read(tmp_path / "t", KIND)
    for change in ("lengths", "ids", "router/model.layers.2.q/counts"):
        checksummed_file.write(tmp_path / "t", KIND, {name: x for name, x in tensors.items() if name != change}, about)
        with pytest.raises(InputError) as caught:
            Table.load(tmp_path / "t")
        assert "make" in str(caught.value) and "again" in str(caught.value) and "\n" not in str(caught.value)
    checksummed_file.write(tmp_path / "t", KIND, tensors, {"identity": "x", "models": "[1]"})
    with pytest.raises(InputError, match=f"The {KIND} .* lacks a part or holds a wrong one"):
        Table.load(tmp_path / "t")


def test_figures() -> None:
    for model in ("router", "math"):
        for matrix, x in inputs(model).items():
            summary = figures(example_table().models[model][matrix])
            channels = np.abs(x).max(0)
            assert summary["rows"] == len(x) and summary["absmax"] == channels.max()
            assert summary["outliers"] == pytest.approx(channels.max() / np.median(channels))
            assert summary["p99.99"] == pytest.approx(np.percentile(np.abs(x), 99.99), rel=0.2)
            assert summary["mse"] is not None and 0.5 * channels.max() < summary["mse"] <= channels.max()
    assert figures(example_table().models["code"]["model.layers.2.q"]) == {"rows": 0, "absmax": 0, "p99.99": 0, "mse": 0, "outliers": None}


def test_summary() -> None:
    summary = example_table().summary()
    assert (summary["texts"], summary["tokens"], summary["answered"]) == (2, 6, 3)
    assert summary["shares"] == pytest.approx({"math": 2 / 3, "code": 1 / 3})


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    example_table().save(tmp_path / "t.safetensors")
    with in_folder("calibration", lambda: run_verb("calibrate", VERB), tmp_path, monkeypatch, capsys) as run:
        yield run


def test_the_command(command: Command) -> None:
    ended = command("t.safetensors")
    assert ended.status == 0 and ended.err == ""
    for words in ("2 texts, 6 tokens, 3 answered", "66.7%", "33.3%", "router", "model.layers.10.q", "400", "outlier ratio"):
        assert words in ended.out
    shown = f"{figures(example_table().models['router']['model.layers.10.q'])['absmax']:.4g}"
    assert shown in ended.out
    ended = command("t.safetensors", "--json")
    assert ended.status == 0 and json.loads(ended.out) == json.loads(json.dumps(example_table().summary()))


def test_the_command_on_what_is_no_table(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-3])
    for file in ("missing", "broken", "."):
        ended = command(file)
        assert ended.status == 1 and ended.out == ""
        assert ended.err.startswith("error: The calibration table ") and ended.err.count("\n") == 1
    assert "Traceback" in command("missing", "--debug").err
    assert command().status == 2 and command("t.safetensors", "--yaml").status == 2
