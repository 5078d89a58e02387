"""A calibration against torch on exactly the served positions; taken from its cache, killed and taken up again, and
refused elsewhere.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.calibration.observe import OTHERS, observe
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import NOBODY, RecordedText
from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle.recording import SCHEME, write_recording_bundle
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision import calibrate as calibrating
from fusionroute.fr_export.precision.calibrate import cache_folder, calibrate, check, identify
from fusionroute.fr_export.precision.kv_scales import caches
from fusionroute.fr_export.verify.torch_reference import load, reference
from fusionroute.runtime.errors import InputError
from tests.support.layer_inputs import layers_of, linear_inputs
from tests.support.rounded_caches import keys_and_values
from tests.support.systems import Shape, make_system

PROMPTS = ["12+30=", "def f(x):", "Es war", "a", "What?"]
NEW = 8
SHAPES = {
    "llama3": Shape("llama3", layers=1, tokenizer=True, expert_config={"num_hidden_layers": 2}, config={"attention_bias": True}),
    "gemma2": Shape("gemma2", layers=2, dtype=torch.bfloat16),
}


def quiet() -> Stages:
    return Stages(Console(quiet=True))


@dataclass(frozen=True)
class Case:
    system: System
    graphs: dict[str, Graph]
    bundle: Path

    def calibrate(self, cache: Path, stages: Stages | None = None, prompts: list[str] = PROMPTS, **options: Any) -> Table:
        return calibrate(
            self.system,
            self.graphs,
            prompts,
            FusionSettings(),
            lambda: self.bundle,
            SCHEME.name,
            cache,
            stages or quiet(),
            **({"new_tokens": NEW} | options),
        )


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A system whose last expert is never chosen, and its bundle."""
    folder, shape = tmp_path_factory.mktemp("calibrate"), SHAPES[request.param]
    router, experts = make_system(folder, shape)
    head = load_file(Path(router) / "routing_head.safetensors")
    head["routing_head.bias"][-1] = -1e4
    save_file(head, Path(router) / "routing_head.safetensors")
    system = System.open(FAMILIES[shape.family], router, experts, max_seq_len=48)
    graphs = Traces(system, quiet()).of()
    with patch.object(Traces, "of", return_value=graphs):
        traces = Traces(system, quiet())
        return Case(system, graphs, write_recording_bundle(system, {}, traces, FusionSettings(), SCHEME, folder / "bundle", quiet()))


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return case.calibrate(tmp_path_factory.mktemp("cache"))


def same(one: Table, other: Table) -> None:
    """Bit for bit."""
    assert one.identity == other.identity and list(one.models) == list(other.models)
    for text, again in zip(one.texts, other.texts, strict=True):
        np.testing.assert_array_equal(text.ids, again.ids)
        np.testing.assert_array_equal(text.experts, again.experts)
    for model, observers in one.models.items():
        assert list(observers) == list(other.models[model])
        for matrix, seen in observers.items():
            for name, value in vars(seen).items():
                np.testing.assert_array_equal(value, vars(other.models[model][matrix])[name])


@pytest.mark.parametrize("coarse", [False, True])
def test_every_model_is_seen_where_it_serves(
    case: Case, whole: Table, coarse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of inputs in bf16 change a range by a hundredth or two: less than other texts would."""
    relative, absolute = (3e-2, 3e-2) if coarse else (1e-3, 2e-4)
    if not coarse:
        monkeypatch.setattr(calibrating, "coarse_products", contextlib.nullcontext)
        whole = case.calibrate(tmp_path)
    for number, model in enumerate(case.system.models):
        network = load(model)
        inputs = [linear_inputs(network, text.ids.astype(np.int64)) for text in whole.texts]
        for matrix, width in matrices(case.graphs[model.name]).items():
            rows = [np.zeros((0, width), np.float32)]
            for text, inside in zip(whole.texts, inputs, strict=True):
                answered = [t for t, expert in enumerate(text.experts) if (expert != NOBODY if number == 0 else expert == number - 1)]
                if not answered:
                    continue
                read = range(len(text.ids)) if number == 0 else range(max(answered) + 1)
                rows.append(inside[layers_of(matrix)[0]][answered if "lm_head" in matrix else list(read)])
            x, seen = np.concatenate(rows), whole.models[model.name][matrix]
            assert seen.rows == len(x)
            if len(x):
                np.testing.assert_allclose(seen.channel_absmax, np.abs(x).max(0), rtol=relative, atol=absolute)
                np.testing.assert_allclose(seen.mean_square, np.square(x.astype(np.float64)).mean(0), rtol=relative, atol=absolute**2)
                np.testing.assert_allclose(seen.percentile(90), np.percentile(np.abs(x), 90), rtol=0.02)
        held: dict[str, list[np.ndarray]] = {cache: [] for cache in caches(case.graphs[model.name])}
        for place, text in enumerate(whole.texts):
            answered = [t for t, expert in enumerate(text.experts) if expert == number - 1]
            count = max(answered, default=-1) + 1 if number else len(text.ids)
            if model.name == "expert2" and place < OTHERS:  # it is never chosen, and reads a few texts of others
                count = len(text.ids)
            for cache, rows_of_text in keys_and_values(network, text.ids[:count]).items() if count else ():
                held[cache].append(rows_of_text)
        for cache, pieces in held.items():
            x, seen = np.concatenate(pieces), whole.models[model.name][cache]
            assert seen.rows == len(x) > 0
            np.testing.assert_allclose(seen.channel_absmax, np.abs(x).max(0), rtol=relative, atol=absolute)
    idle = {matrix: seen.rows for matrix, seen in whole.models["expert2"].items() if matrix not in caches(case.graphs["expert2"])}
    assert idle and not any(idle.values())
    assert {int(expert) for text in whole.texts for expert in text.experts} == {NOBODY, 0, 1}


def test_the_texts_are_what_the_system_generates(case: Case, whole: Table) -> None:
    assert len(whole.texts) == len(PROMPTS)
    references = reference(case.system, [text.ids.tolist() for text in whole.texts], (0.5, 0.5))
    answered = [
        (text.experts[t], one.experts[t])
        for text, one in zip(whole.texts, references, strict=True)
        for t in np.flatnonzero(text.experts != NOBODY)
    ]
    assert np.mean([mine == torchs for mine, torchs in answered]) > 0.9  # the bundle is int8
    for prompt, text in zip(PROMPTS, whole.texts, strict=True):
        first = int(np.flatnonzero(text.experts != NOBODY)[0]) + 1
        assert 1 <= len(text.ids) - first <= NEW
        if case.system.router.tokenizer is not None:
            assert text.ids[:first].tolist() == case.system.router.tokenizer.encode(prompt).ids
        else:
            assert first == 48 // 2, "random ids, as many as leave room"


def test_the_second_time_all_is_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = case.calibrate(tmp_path)
    assert sorted(path.name for path in (tmp_path / first.identity).iterdir()) == sorted(
        ["texts.safetensors", *(f"model-{model.name}.safetensors" for model in case.system.models)]
    )

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is generated or observed again")

    monkeypatch.setattr(calibrating, "record", never)
    monkeypatch.setattr(calibrating, "observe", never)
    same(case.calibrate(tmp_path), first)


class Killed(BaseException):
    """The process ends here."""


class Counting(Stages):
    """Counts the steps of all stages, and dies at one of them."""

    def __init__(self, last: int = -1):
        super().__init__(Console(quiet=True))
        self.last, self.steps = last, 0

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        with super().stage(name, total) as advance:

            def counted(amount: float) -> None:
                advance(amount)
                self.steps += 1
                if self.steps == self.last:
                    raise Killed

            yield counted


def test_killed_and_taken_up_again(case: Case, whole: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "TOGETHER", 2)
    monkeypatch.setattr(calibrating, "observe", partial(observe, every=0.0))
    counting = Counting()
    same(case.calibrate(tmp_path / "whole", counting), whole)
    for last in range(2, counting.steps + 1, 5):
        cache, killed, after = tmp_path / str(last), Counting(last), Counting()
        with pytest.raises(Killed):
            case.calibrate(cache, killed)
        same(case.calibrate(cache, after), whole)
        if last > 4:
            assert after.steps < counting.steps, "what was done is not done again"
        assert not list(cache.rglob("*.states")) and not list(cache.rglob(".*"))


def test_broken_caches_are_made_again(case: Case, whole: Table, tmp_path: Path) -> None:
    other = case.calibrate(tmp_path / "other", seed=1)
    case.calibrate(tmp_path)
    folder = tmp_path / whole.identity
    for number, file in enumerate(sorted(folder.iterdir())):
        content = file.read_bytes()
        damaged = [
            content[:-9],
            content[:-1] + bytes([content[-1] ^ 1]),
            b"",
            (tmp_path / "other" / other.identity / file.name).read_bytes(),
        ]
        file.write_bytes(damaged[number % len(damaged)])
        (folder / f"{file.stem}.states").write_bytes(b"nonsense")
    same(case.calibrate(tmp_path), whole)
    (folder / "texts.safetensors").unlink()
    (folder / "texts.safetensors").mkdir()
    same(case.calibrate(tmp_path), whole)
    (tmp_path / "file").write_text("no folder")
    same(case.calibrate(tmp_path / "file"), whole)


def test_what_the_identity_depends_on(case: Case, whole: Table) -> None:
    fusion = FusionSettings()
    known = identify(case.system, case.graphs, fusion, PROMPTS, "int8", NEW, 0)
    assert known == whole.identity
    file = Path(case.system.experts[1].folder) / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    variants: list[tuple[Any, ...]] = [
        (case.system, fusion, PROMPTS[1:], "int8", NEW, 0),
        (case.system, fusion, PROMPTS, "int8", NEW, 0, ["expert0"]),
        (case.system, fusion, PROMPTS, "fp32", NEW, 0),
        (case.system, fusion, PROMPTS, "int8", NEW - 1, 0),
        (case.system, fusion, PROMPTS, "int8", NEW, 1),
        (case.system, fusion.replaced(None, 0.3), PROMPTS, "int8", NEW, 0),
        (case.system, fusion.replaced("additive", None), PROMPTS, "int8", NEW, 0),
        (replace(case.system, max_seq_len=47), fusion, PROMPTS, "int8", NEW, 0),
        (replace(case.system, head=replace(case.system.head, bias=case.system.head.bias + 1)), fusion, PROMPTS, "int8", NEW, 0),
    ]
    identities = [identify(system, case.graphs, *rest) for system, *rest in variants]
    os.utime(file, ns=(times[0], times[1] + 1))
    identities.append(identify(case.system, case.graphs, fusion, PROMPTS, "int8", NEW, 0))
    os.utime(file, ns=times)
    assert len({known, *identities}) == len(variants) + 2
    assert identify(case.system, case.graphs, fusion, PROMPTS, "int8", NEW, 0) == known


def test_long_texts_are_cut_to_the_context(case: Case, tmp_path: Path) -> None:
    table = case.calibrate(tmp_path, prompts=["x" * 200], new_tokens=1000)
    assert 25 <= len(table.texts[0].ids) <= 48


def test_weights_that_are_not_finite(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise InputError("The activations that enter m are not all finite: expected numbers.")

    monkeypatch.setattr(Observer, "see", broken)
    with pytest.raises(
        InputError, match=r"^(The router|Expert .expert0.) \(.*\) cannot be calibrated: The activations that enter m are not all finite"
    ):
        case.calibrate(tmp_path)


def test_a_table_of_another_system_is_refused(case: Case, whole: Table) -> None:
    check(whole, case.system, case.graphs)
    router = whole.models["router"]
    matrix = next(iter(router))

    def with_router(observers: dict[str, Observer]) -> Table:
        return replace(whole, models=whole.models | {"router": observers})

    def with_text(ids: list[int], experts: list[int]) -> Table:
        return replace(whole, texts=[*whole.texts, RecordedText(np.array(ids, np.int32), np.array(experts, np.int8))])

    order = ["router", "expert1", "expert0", "expert2"]
    cases = {
        r"is of the models router, expert1, expert0, expert2, the system has router, expert0": replace(
            whole, models={name: whole.models[name] for name in order}
        ),
        "is of the models none, the system has": replace(whole, models={}),
        f"of router lacks the matrix {matrix}": with_router({name: seen for name, seen in router.items() if name != matrix}),
        "of router has more than the model, such as the matrix other": with_router(router | {"other": Observer("other", 4)}),
        f"of router has 5 channels for {matrix}, the model 64": with_router(router | {matrix: Observer(matrix, 5)}),
        "token ids outside the vocabulary of 300": with_text([3, 300], [0, -1]),
        "texts that were not answered by 3 expert": with_text([3, 4], [3, -1]),
    }
    for words, table in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            check(table, case.system, case.graphs)
        assert "calibrate this system instead" in str(caught.value) and "\n" not in str(caught.value)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fusionroute" / "calibration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/fusionroute/calibration").expanduser()
