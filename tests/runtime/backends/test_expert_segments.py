"""Passes over segments of any of the models: each reads as if it were alone, whoever else does."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import REUSED, Segment
from fusionroute.runtime.backends.bound_rows import BoundRows
from fusionroute.runtime.backends.expert_segments import SegmentPasses, read_together
from fusionroute.runtime.backends.keys_values import KeysValues
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import FusionError
from tests.support.bundles import edit, refusal
from tests.support.pair_backend import pair_of
from tests.support.read_along import ALWAYS, priced

IDS: list[int] = np.random.default_rng(0).integers(3, 290, 120).tolist()


@pytest.fixture(scope="module", params=("fp32", "int8", "int4"))
def rt(request: pytest.FixtureRequest, segments: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(segments, request.param, "cpu") as runtime:
        yield runtime


def models(rt: FusionRuntime) -> list[Any]:
    backend = pair_of(rt)
    return [backend.router, *backend.experts]


def segment(start: int, count: int) -> Segment:
    """So many tokens of IDS, answered at each."""
    return Segment(IDS[start : start + count], range(count))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_bits_do_not_depend_on_who_reads_beside_a_model(rt: FusionRuntime, data: st.DataObject) -> None:
    """The same tokens in the same passes, alone and with any of the others; idle caches stay as they are."""
    beside, alone = ([model.cache() for model in models(rt)] for _ in range(2))
    for _ in range(data.draw(st.integers(1, 4), label="passes")):
        readers = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1), label="readers"))
        counts = [data.draw(st.sampled_from([1, 1, 2, 3, 8, 17]), label="tokens") for _ in readers]
        idle = {place: cache.memory.buffers.copy() for place, cache in enumerate(beside) if place not in readers}
        own = [segment(beside[place].length, count) for place, count in zip(readers, counts, strict=True)]
        outputs = read_together([(beside[place], part) for place, part in zip(readers, own, strict=True)])
        for place, part, output in zip(readers, own, outputs, strict=True):
            expected = alone[place].forward(*part)
            assert np.array_equal(output.logits.states, expected.logits.states)
            assert (output.routing is None) == bool(place)
            if not place:
                assert output.routing is not None and np.array_equal(output.routing, expected.routing)
            assert beside[place].length == alone[place].length
        for place, buffers in idle.items():
            assert np.array_equal(beside[place].memory.buffers, buffers)


def test_models_differ(rt: FusionRuntime) -> None:
    """What the comparison above would not see: factors that are left out, or another expert's."""
    outputs = read_together([(model.cache(), segment(0, 16)) for model in models(rt)])
    rows = [output.logits.states for output in outputs]
    assert all(np.abs(a - b).max() > 0.05 for place, a in enumerate(rows) for b in rows[:place])


def test_whole_texts_in_one_pass_are_those_of_many(segments: Path) -> None:
    with FusionRuntime.load(segments, "fp32", "cpu") as rt:
        caches = [model.cache() for model in models(rt)]
        whole = read_together([(cache, segment(0, 40)) for cache in caches])
        expected = [output.logits.states.copy() for output in whole]
        for cache in caches:
            cache.length = 0
        for start in range(40):
            outputs = read_together([(cache, segment(start, 1)) for cache in caches])
            for output, rows in zip(outputs, expected, strict=True):
                assert np.abs(output.logits.states[0] - rows[start]).max() <= 2e-5 * np.abs(rows).max()


def test_rows_up_to_a_number_are_used_again_and_more_are_the_callers(segments: Path) -> None:
    with FusionRuntime.load(segments, "fp32", "cpu") as rt:
        caches = [model.cache() for model in models(rt)]
        callers = read_together([(cache, segment(0, REUSED + 1)) for cache in caches])
        copies = [output.logits.states.copy() for output in callers]
        for count in (REUSED, REUSED + 1, REUSED):
            for cache in caches:
                cache.length = 0
            outputs = read_together([(cache, segment(0, count)) for cache in caches])
            assert not any(np.shares_memory(output.logits.states, old.logits.states) for output in outputs for old in callers)
        assert all(np.array_equal(output.logits.states, copy) for output, copy in zip(callers, copies, strict=True))


def test_a_decoded_token_binds_nothing(segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the experts take turns nor where all read; a cache is bound where it reads for the first time."""
    noted: list[str] = []

    def note(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def noting(self: Any, *arguments: Any) -> Any:
            noted.append(f"{kind.__name__}.{name}")
            return method(self, *arguments)

        monkeypatch.setattr(kind, name, noting)

    priced(monkeypatch, ALWAYS)
    with FusionRuntime.load(segments, "int8", "cpu") as rt:
        session = rt.session()
        session.append(IDS[:10])
        tokens = [session.step() for _ in range(40)]
        assert len({token.expert for token in tokens}) == 3
        for kind, name in ((KeysValues, "bind"), (BoundRows, "_bind"), (SegmentPasses, "__init__")):
            note(kind, name)
        assert len({session.step().expert for _ in range(20)}) > 1
        assert not noted


def test_idle_models_have_no_buffers_of_their_own(segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []
    init = KeysValues.__init__

    def noted(self: KeysValues, spec: Any, capacity: int, storage: Any) -> None:
        capacities.append(capacity)
        init(self, spec, capacity, storage)

    with FusionRuntime.load(segments, "fp32", "cpu") as rt:
        monkeypatch.setattr(KeysValues, "__init__", noted)
        models(rt)[2].cache().forward(*segment(0, 5))
        assert capacities == [rt.max_seq_len, 1]


def test_an_interrupted_pass_leaves_all_caches_as_they_were(segments: Path) -> None:
    with FusionRuntime.load(segments, "fp32", "cpu") as rt:
        caches = [model.cache() for model in models(rt)]
        ids = (IDS * 5)[:500]
        read_together([(cache, segment(0, 10)) for cache in caches])
        stopped, interrupted = threading.Event(), 0

        def interrupt() -> None:
            while not stopped.is_set():
                caches[0].interrupt()

        for _ in range(50):  # on a busy machine a pass may be over before the other thread runs
            for cache in caches:
                cache.length = 10
            stopped.clear()
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                read_together([(cache, Segment(ids[10:], (489,))) for cache in caches])
            except Interrupted:
                interrupted += 1
                assert [cache.length for cache in caches] == [10] * 4
            finally:
                stopped.set()
                thread.join()
            if interrupted == 2:
                break
        assert interrupted == 2
        for cache in caches:
            cache.length = 10
        outputs = read_together([(cache, Segment(ids[10:], (489,))) for cache in caches])
        for output, model in zip(outputs, models(rt), strict=True):
            expected = model.cache().forward(ids, (499,)).logits.states
            assert np.abs(output.logits.states - expected).max() <= 2e-5 * np.abs(expected).max()


def test_errors_name_the_models(segments: Path) -> None:
    with FusionRuntime.load(segments, "fp32", "cpu") as rt:
        router, *experts = (model.cache() for model in models(rt))
        with pytest.raises(FusionError, match=r"failed on 4 tokens of router, expert0 and expert2: "):
            read_together([(router, Segment([1, 2], (9,))), (experts[0], Segment([1], (0,))), (experts[2], Segment([1], (0,)))])
        with pytest.raises(FusionError, match=r"failed on 2 tokens of expert1: "):
            experts[1].forward([100000], (0,))
        with pytest.raises(FusionError, match=r"failed on 2 tokens of expert1: "):  # the error before has unbound nothing
            experts[1].forward([100000], (0,))
        assert experts[1].length == 0 and len(experts[1].forward([5], (0,)).logits) == 1


def test_a_graph_with_other_segments_than_the_manifest_says_is_refused(bundles: list[Path], segments: Path, tmp_path: Path) -> None:
    for source, every in ((segments, False), (bundles[2], True)):
        copy = Path(shutil.copytree(source, tmp_path / str(every)))
        edit(copy, lambda content, every=every: [each["pair"].update(every_expert=every) for each in content["variants"]])  # type: ignore[misc]
        assert "the inputs and outputs that the manifest describes" in refusal(copy)
