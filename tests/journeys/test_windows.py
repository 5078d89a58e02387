"""Layers with a sliding window are given the end of the text alone, and every answer is that of the whole text."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import BundleError, FusionRuntime
from fusionroute.runtime.backends import keys_values
from fusionroute.runtime.backends.keys_values import view_step
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import edit
from tests.support.exporting import export_system
from tests.support.speculation import draft_always
from tests.support.systems import Shape

WINDOW, HEAD = 16, 256  # heads of this size have short blocks: see `view_step`
LENGTH = 2 * view_step(HEAD) + 3 * WINDOW
FAMILIES = {"gemma3": 3, "mistral": 2}  # layers: of Gemma-3 the second one sees all of the text, of Mistral none does
Opened = dict[str, FusionRuntime]


@pytest.fixture(scope="module", params=["gemma3", pytest.param("mistral", marks=pytest.mark.slow)])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    config = {"max_position_embeddings": LENGTH} | ({"sliding_window_pattern": 2} if family == "gemma3" else {})
    shape = Shape(family, heads=2, kv_heads=1, head_dim=HEAD, layers=FAMILIES[family], experts=2, config=config)
    return export_system(tmp_path_factory.mktemp(family), shape, ("fp32", "int8"), max_seq_len=LENGTH)[0]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def both(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The runtime as it is, and one whose views always begin with the text."""
    with ExitStack() as stack:
        options: dict[str, Any] = {"precision": request.param, "device": "cpu", "threads": 1, "exact": request.param == "int8"}
        runtimes = {"views": stack.enter_context(FusionRuntime.load(bundle, **options, speculation="auto"))}
        runtimes["whole"] = stack.enter_context(FusionRuntime.load(bundle, **options, prefix_cache=0))
        for model in (runtimes["whole"].backend.router, *runtimes["whole"].backend.experts):
            model.window = model.window.model_copy(update={"tokens": LENGTH})  # type: ignore[attr-defined]
        yield runtimes


def text(seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 300, LENGTH).tolist()
    return ids


def test_the_manifest_names_the_layers(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    expected = {"tokens": WINDOW, "layers": [0, 2] if manifest.family == "gemma3" else [0, 1]}
    assert manifest.format >= 5, "an older runtime would not know the graphs' inputs"
    for variant in manifest.variants:
        assert {name: window.model_dump() for name, window in variant.windows.items()} == dict.fromkeys(
            ("router", "expert0", "expert1"), expected
        )


@pytest.mark.parametrize("chunk", [256, 7])
def test_scores_are_those_of_the_whole_text_bit_for_bit(both: Opened, chunk: int) -> None:
    ids = text(0)
    scores, expected = (both[name].score(ids, chunk=chunk) for name in ("views", "whole"))
    assert np.array_equal(scores.logits, expected.logits) and np.array_equal(scores.routing, expected.routing)


def test_sessions_rewind_draft_and_lend_as_ever(both: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rewinds to before the view, and drafts; each token is that of a text that is read anew, whole."""
    draft_always(monkeypatch)
    random, ids = np.random.default_rng(1), text(1)
    session = both["views"].session()
    for number in range(6):
        keep = int(random.integers(0, len(session) + 1)) if number % 3 else min(len(session), LENGTH - 40)
        session.rewind(keep)
        session.append(ids[keep : keep + int(random.integers(1, LENGTH - 20 - keep))] if keep < LENGTH - 30 else [7])
        fresh = both["whole"].session()
        fresh.append(session.token_ids)
        tokens = session.steps(6)
        expected = [fresh.step() for _ in tokens]
        assert [(each.id, each.expert) for each in tokens] == [(each.id, each.expert) for each in expected]
        if both["views"].precision == "int8":
            assert [each.logprob for each in tokens] == [each.logprob for each in expected]
        ids = [*session.token_ids, *ids[len(session) :]]
    prompt = ids[: LENGTH - 30]
    for tail in ([5, 6, 7], [8], [9, 10]):
        assert both["views"].generate([*prompt, *tail], 8).token_ids == both["whole"].generate([*prompt, *tail], 8).token_ids


def test_a_saved_text_goes_on(both: Opened, tmp_path: Path) -> None:
    ids = text(2)[: LENGTH - 20]
    session, loaded, fresh = both["views"].session(), both["views"].session(), both["whole"].session()
    session.append(ids)
    session.read()
    session.save(tmp_path / "text")
    loaded.load(tmp_path / "text")
    fresh.append(ids)
    assert [loaded.step().id for _ in range(8)] == [fresh.step().id for _ in range(8)]


def test_a_step_sees_a_window_and_a_step_of_views_at_most(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text is."""
    seen: list[tuple[int, int]] = []
    begin = keys_values.KeysValues.begin_pass

    def noted(self: Any, length: int, count: int) -> None:
        begin(self, length, count)
        seen.append((int(self._seen._total) - count, length))
        assert int(self._lengths._total) == length + count

    monkeypatch.setattr(keys_values.KeysValues, "begin_pass", noted)
    with FusionRuntime.load(bundle, "fp32", "cpu", threads=1) as rt:
        session = rt.session(expert="expert0")
        session.append(text(3)[:-40])
        for _ in range(30):
            session.step()
    step = view_step(HEAD)
    assert all(min(length, WINDOW) <= before < WINDOW + step for before, length in seen) and max(length for _, length in seen) > 2 * step
    assert {length - before for before, length in seen} == {0, step, 2 * step}


def test_a_manifest_that_says_otherwise_is_refused(bundle: Path, tmp_path: Path) -> None:
    def refusal(change: Any) -> str:
        copy = Path(shutil.copytree(bundle, tmp_path / "copy", dirs_exist_ok=True))
        edit(copy, change)
        with pytest.raises(BundleError) as caught:
            FusionRuntime.load(copy, "fp32", "cpu")
        return str(caught.value)

    assert "(the input window.seqlens_k)" in refusal(lambda content: [variant.pop("windows") for variant in content["variants"]])
    content = json.loads((bundle / "manifest.json").read_text())
    window = content["variants"][0]["windows"]["router"] | {"layers": [9]}
    assert "has windows in layers that router has not" in refusal(lambda content: content["variants"][0]["windows"].update(router=window))


def test_heads_that_are_turned_outside_the_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the graph knows positions anyway, and views may begin anywhere, but for the last bits."""
    shape = Shape("gemma2", heads=2, kv_heads=1, head_dim=24, layers=2, experts=1)
    bundle, _ = export_system(tmp_path, shape, ("fp32",), max_seq_len=200)
    scores = []
    for step in (32, 1024):
        monkeypatch.setattr(keys_values, "view_step", lambda _, step=step: step)
        with FusionRuntime.load(bundle, "fp32", "cpu", threads=1) as rt:
            scores.append(rt.score(text(4)[:200], chunk=9).logits)
            session = rt.session()
            session.append(text(4)[:150])
            session.step()
            session.step()  # behind 150 tokens; the first one began with the text
            assert session._decoder.readers.router.cache.memory._start == (128 if step == 32 else 0)  # type: ignore[attr-defined]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5 * np.abs(scores[0]).max())


@pytest.mark.parametrize(("family", "length"), [("gemma2", 16), pytest.param("llama3", 64, marks=pytest.mark.slow)])
def test_graphs_without_shorter_windows_stay_as_they_are(tmp_path: Path, family: str, length: int) -> None:
    bundle, _ = export_system(tmp_path, Shape(family, layers=1, experts=1), ("fp32",), max_seq_len=length)
    manifest = Manifest.read(bundle)
    assert not manifest.variants[0].windows and "windows" not in (bundle / "manifest.json").read_text()


@pytest.mark.parametrize(("cache", "head", "step"), [(2 << 20, 256, 256), (2 << 20, 64, 1024), (1310720, 256, 640), (0, 64, 128)])
def test_views_begin_with_blocks(cache: int, head: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_values, "second_level_cache", lambda: cache)
    assert view_step(head) == step
