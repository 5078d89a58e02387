"""One graph for all models: each segment reads as if it were alone, wherever the other one is; files that do not fit."""

import json
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
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.backends.ort_pair import OrtPair, PairCache
from fusionroute.runtime.backends.pair_binding import PairBinding
from fusionroute.runtime.cancellation import Interrupted
from fusionroute.runtime.errors import BundleError, FusionError
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import edit, refusal, rehash
from tests.support.pair_backend import pair_of

IDS: list[int] = np.random.default_rng(0).integers(3, 290, 120).tolist()
PRECISIONS = ("fp32", "int8", "int4")


@pytest.fixture(scope="module", params=PRECISIONS)
def rt(request: pytest.FixtureRequest, shared: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(shared, request.param, "cpu") as runtime:
        yield runtime


def whole(backend: OrtPair, number: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Hidden states [S, H] and routing [S, n] of one pass over IDS of a model alone."""
    model = backend.router if number is None else backend.experts[number]
    output = model.cache().forward(IDS, range(len(IDS)))
    return output.logits.states, output.routing


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_segments_of_several_tokens_are_bit_for_bit_those_of_passes_alone(rt: FusionRuntime, data: st.DataObject) -> None:
    """Of any lengths, from any positions on, after rewinds, with passes alone in between."""
    backend = pair_of(rt)
    number = data.draw(st.integers(0, 2), label="expert")
    expected = whole(backend, None)[0], whole(backend, number)[0]
    caches = backend.router.cache(), backend.experts[number].cache()
    for _ in range(data.draw(st.integers(1, 5), label="passes")):
        segments = []
        for cache in caches:
            cache.length = data.draw(st.integers(0, cache.length), label="start")
            count = min(data.draw(st.integers(2, 40), label="tokens"), len(IDS) - cache.length)
            segments.append(IDS[cache.length : cache.length + count])
        if min(map(len, segments)) < 2:
            break
        starts = [cache.length for cache in caches]
        alone = data.draw(st.sampled_from([None, 0, 1]), label="alone")
        if alone is None:
            both = backend.forward_both(caches[0], answered(segments[0]), caches[1], answered(segments[1]))
        for place, (cache, ids) in enumerate(zip(caches, segments, strict=True)):
            if alone is None or alone == place:
                output = both[place] if alone is None else cache.forward(ids, range(len(ids)))
                assert np.array_equal(output.logits.states, expected[place][starts[place] : starts[place] + len(ids)])
                assert cache.length == starts[place] + len(ids)


def answered(ids: list[int]) -> Segment:
    """A segment that is answered at each token."""
    return Segment(ids, range(len(ids)))


def test_a_single_token_of_an_expert_does_not_depend_on_the_router(rt: FusionRuntime) -> None:
    """A guess that was wrong costs time and changes no bit: neither beside one router token nor beside many."""
    backend = pair_of(rt)
    for number in range(3):
        rows = []
        for beside in (0, 1, 2, 7):
            router, expert = backend.router.cache(), backend.experts[number].cache()
            expert.forward(IDS[:20], (19,))
            last = Segment(IDS[20:21], (0,))
            if beside:
                rows.append(backend.forward_both(router, answered(IDS[:beside]), expert, last)[1].logits.states.copy())
            else:
                rows.append(expert.forward(*last).logits.states.copy())
        assert all(np.array_equal(rows[0], row) for row in rows[1:])


def test_models_differ_and_the_router_is_not_changed_by_factors(rt: FusionRuntime) -> None:
    """What the comparisons above would not see: factors that are left out, or that reach the router."""
    backend = pair_of(rt)
    rows = [whole(backend, number)[0] for number in (None, 0, 1, 2)]
    assert all(np.abs(a - b).max() > 0.05 for place, a in enumerate(rows) for b in rows[:place])
    router, routing = backend.router.cache(), whole(backend, None)[1]
    assert routing is not None
    for number in range(3):
        router.length = 0
        output, _ = backend.forward_both(router, answered(IDS[:16]), backend.experts[number].cache(), answered(IDS[:16]))
        assert np.array_equal(output.logits.states, rows[0][:16])
        assert output.routing is not None and np.array_equal(output.routing, routing[:16])


def test_rows_up_to_a_number_are_used_again_and_more_are_the_callers(shared: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        backend = pair_of(rt)
        router, expert = backend.router.cache(), backend.experts[0].cache()
        few, many = IDS[:REUSED], IDS[: REUSED + 1]
        callers = backend.forward_both(router, answered(many), expert, answered(few))
        copies = [output.logits.states.copy() for output in callers]
        for ids in (few, many, few):
            router.length = expert.length = 0
            outputs = backend.forward_both(router, answered(ids), expert, answered(few))
            assert not any(np.shares_memory(output.logits.states, old.logits.states) for output in outputs for old in callers)
        assert all(np.array_equal(output.logits.states, copy) for output, copy in zip(callers, copies, strict=True))


def test_a_decoded_token_binds_nothing_and_an_expert_only_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    bound: list[tuple[int, int]] = []
    init, bind = PairBinding.__init__, BoundRows._bind

    def noted(binding: PairBinding, *arguments: Any) -> None:
        made.append(arguments[-1])
        init(binding, *arguments)

    def noted_shape(binding: BoundRows, count: int, row_count: int, fresh: bool) -> None:
        bound.append((count, row_count))
        bind(binding, count, row_count, fresh)

    monkeypatch.setattr(PairBinding, "__init__", noted)
    monkeypatch.setattr(BoundRows, "_bind", noted_shape)
    with FusionRuntime.load(shared, "int8", "cpu") as rt:
        session = rt.session()
        session.append(IDS[:10])
        for _ in range(60):
            session._pinned = len(session) // 4 % 3
            session.step()
        assert sorted(made) == sorted({*made}) and len(made) <= 3
        session._pinned = 0
        for _ in range(2):  # the first one catches up
            session.step()
        made.clear()
        bound.clear()
        for _ in range(20):
            session.step()
        assert not made and not bound


def test_factors_are_mapped_and_bound_where_they_lie(shared: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        for expert in pair_of(rt).experts:
            for array in expert.factors.values():
                base = array
                while not isinstance(base, np.memmap):
                    assert isinstance(base.base, np.ndarray)
                    base = base.base
                assert not array.flags.writeable
                assert array.ctypes.data % 4 == 0


def test_an_interrupted_pass_leaves_both_caches_as_they_were(shared: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        backend = pair_of(rt)
        router, expert = backend.router.cache(), backend.experts[1].cache()
        ids = (IDS * 5)[:500]
        backend.forward_both(router, Segment(ids[:20], (19,)), expert, Segment(ids[:10], (9,)))
        stopped = threading.Event()

        def interrupt() -> None:
            while not stopped.is_set():
                router.interrupt()

        interrupted = 0
        for _ in range(50):  # on a busy machine a pass may be over before the other thread runs
            router.length, expert.length = 20, 10
            stopped.clear()
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                backend.forward_both(router, Segment(ids[20:], (479,)), expert, Segment(ids[10:], (489,)))
            except Interrupted:
                interrupted += 1
                assert (router.length, expert.length) == (20, 10)
            finally:
                stopped.set()
                thread.join()
            if interrupted == 3:
                break
        assert interrupted == 3
        router.length, expert.length = 20, 10
        outputs = backend.forward_both(router, Segment(ids[20:], (479,)), expert, Segment(ids[10:], (489,)))
        for output, model in zip(outputs, (backend.router, backend.experts[1]), strict=True):
            assert np.array_equal(output.logits.states, model.cache().forward(ids, (499,)).logits.states)


def test_errors_name_the_models(shared: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        backend = pair_of(rt)
        with pytest.raises(FusionError, match=r"failed on 4 tokens of router and expert1: "):
            backend.forward_both(backend.router.cache(), Segment([1, 2], (5,)), backend.experts[1].cache(), Segment([1, 2], (1,)))
        with pytest.raises(FusionError, match=r"failed on 2 tokens of expert0: "):
            backend.experts[0].cache().forward([100000], (0,))


def factor_file(bundle: Path, expert: str) -> Path:
    (variant,) = (each for each in Manifest.read(bundle).variants if each.precision == "fp32")
    assert variant.pair is not None
    return bundle / variant.pair.factors[expert]


def rewrite(path: Path, header: dict[str, Any], data: bytes) -> None:
    """A safetensors file of the same size, whose tensors begin where they did."""
    text = json.dumps(header, separators=(",", ":")).encode()
    size = path.stat().st_size - len(data) - 8
    assert len(text) <= size
    path.write_bytes(size.to_bytes(8, "little") + text.ljust(size) + data)


def test_factor_files_that_do_not_fit(shared: Path, tmp_path: Path) -> None:
    source = factor_file(shared, "expert1").read_bytes()
    size = int.from_bytes(source[:8], "little")
    header, data = json.loads(source[8 : 8 + size]), source[8 + size :]
    path = tmp_path / "factors.safetensors"
    path.write_bytes(source)
    name = next(iter(header))
    entry = header[name]
    damaged = [
        header | {name: entry | {"dtype": "F16"}},
        header | {name: entry | {"data_offsets": [entry["data_offsets"][0], len(data) + 4]}},
        header | {name: entry | {"data_offsets": [-8, -8 + entry["data_offsets"][1] - entry["data_offsets"][0]]}},
        header | {name: {"dtype": "F32"}},
        header | {name: 1},
    ]
    assert set(map_factors(path)) == set(header)
    for each in damaged:
        rewrite(path, each, data)
        with pytest.raises(BundleError, match=r"does not hold an expert's factors .*export the bundle again\.$"):
            map_factors(path)
    for text in (b"", b"\x01", b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"\xff\xff"):
        path.write_bytes(text)
        with pytest.raises(BundleError, match="does not hold"):
            map_factors(path)


def test_bundles_whose_factors_or_graph_do_not_fit_are_refused(shared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shared, tmp_path / "copy"))

    path = factor_file(copy, "expert0")  # a factor gets another name
    source = path.read_bytes()
    size = int.from_bytes(source[:8], "little")
    header = json.loads(source[8 : 8 + size])
    header["x"] = header.pop(next(key for key in header if key.endswith(".b")))
    rewrite(path, header, source[8 + size :])
    rehash(copy, path.relative_to(copy).as_posix())
    assert "(its input delta." in refusal(copy)
    for number, words in enumerate(("the inputs and outputs that the manifest describes", "one graph for models of several sizes")):
        shutil.rmtree(copy)
        shutil.copytree(shared, copy)
        edit(copy, lambda content, number=number: content["models"][number].update(kv_heads=7))  # type: ignore[misc]
        assert words in refusal(copy)


def test_caches_copy_what_others_have_read(shared: Path) -> None:
    with FusionRuntime.load(shared, "int8", "cpu") as rt:
        for model in (pair_of(rt).router, pair_of(rt).experts[2]):
            lender, borrower = model.cache(), model.cache()
            lender.forward(IDS[:40], (39,))
            borrower.copy_prefix(lender, 30)
            assert borrower.length == 30
            assert np.array_equal(borrower.forward(IDS[30:60], (29,)).logits.states, model.cache().forward(IDS[:60], (59,)).logits.states)
            assert isinstance(borrower, PairCache)
