"""Experts come and go while a runtime generates: running texts keep theirs, new ones have the new set."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.adapters.expert_files import add_expert, remove_expert
from fusionroute.runtime.errors import ClosedError, InputError, UnavailableError
from tests.support.numpy_adapters import write_adapter

IDS = [5, 17, 40, 90, 120, 33, 8, 61, *range(100, 140)]
Texts = list[tuple[list[int], list[str], list[float]]]


def texts(rt: FusionRuntime, **options: Any) -> Texts:
    """Tokens, experts and log-probabilities of some texts."""
    results = [rt.generate([*IDS, start], 12, **options) for start in range(70, 76)]
    return [(result.token_ids, result.experts, result.logprobs) for result in results]


@pytest.fixture
def adapters(shared: Path, tmp_path: Path) -> dict[str, Path]:
    return {name: write_adapter(shared, tmp_path / name, seed, rank=2 + seed) for seed, name in enumerate(("expert0", "expert2"))}


@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", {}), ("int8", {"catch_up": "background"}), ("int8", {"exact": True, "speculation": "auto"})],
    ids=["fp32", "background", "exact"],
)
def test_texts_are_those_of_a_bundle_with_the_same_experts(
    precision: str, options: dict[str, Any], shared: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """After every change, bit for bit; the loaded bundle stays as it was."""
    copy = Path(shutil.copytree(shared, tmp_path / "copy"))
    with FusionRuntime.load(shared, precision, "cpu", **options) as rt:
        held = []  # sessions of every set, which lend what they have read

        def check(names: list[str]) -> Texts:
            for name in names:
                held.append(rt.session(expert=name))
                held[-1].append(IDS)
                held[-1].step()
            with FusionRuntime.load(copy, precision, "cpu", **options) as expected:
                assert rt.expert_names == expected.expert_names == names
                ours = texts(rt)
                assert ours == texts(expected)
                scores = [runtime.score(IDS) for runtime in (rt, expected)]
                assert np.array_equal(scores[0].routing, scores[1].routing) and scores[0].routing.shape == (len(IDS), len(names))
                assert np.array_equal(scores[0].experts, scores[1].experts)
                return ours

        first = check(["expert0", "expert1", "expert2"])
        rt.remove_expert("expert0")
        remove_expert(copy, "expert0")
        assert check(["expert1", "expert2"]) != first
        rt.add_expert(adapters["expert0"])
        add_expert(copy, "expert0", adapters["expert0"])
        second = check(["expert0", "expert1", "expert2"])
        rt.add_expert(adapters["expert2"], "expert2")
        add_expert(copy, "expert2", adapters["expert2"], replace=True)
        assert check(["expert0", "expert1", "expert2"]) != second
        assert any("expert0" in experts for _, experts, _ in second)
    with FusionRuntime.load(shared, precision, "cpu", **options) as again:
        assert texts(again) == first


def test_a_running_text_keeps_its_experts(shared: Path, adapters: dict[str, Path]) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        expected = rt.generate(IDS, 24)
        pinned = rt.generate(IDS, 8, expert="expert0")
        session, stream = rt.session(), rt.stream(IDS, 24)
        session.append(IDS)
        tokens = [session.step() for _ in range(4)]
        streamed = [next(stream) for _ in range(3)]
        rt.remove_expert("expert0")
        rt.add_expert(adapters["expert2"])
        tokens += [session.step() for _ in range(20)]
        streamed += list(stream)
        assert [token.id for token in tokens] == [token.id for token in streamed] == expected.token_ids
        assert [token.expert for token in tokens] == [token.expert for token in streamed] == expected.experts
        assert session.lags.keys() == {"expert0", "expert1", "expert2"} and len(tokens[-1].routing) == 3
        session.rewind(len(IDS))
        session._pinned = 0
        assert [session.step().id for _ in range(8)] == pinned.token_ids
        other = rt.session()
        other.append(session.token_ids)
        assert other.step().expert in ("expert1", "expert2") and other.lags.keys() == {"expert1", "expert2"}


def test_factors_of_a_removed_expert_are_released_with_its_last_text(shared: Path, adapters: dict[str, Path]) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        rt.add_expert(adapters["expert2"])
        factors: Any = rt.backend.factors["expert2"]  # type: ignore[attr-defined]
        watched = weakref.ref(next(iter(factors.values())))
        del factors
        session = rt.session(expert="expert2")
        session.append(IDS)
        session.step()
        rt.generate(IDS, 4)
        rt.remove_expert("expert2")
        gc.collect()
        assert watched() is not None
        del session
        gc.collect()
        assert watched() is None


def test_threads_generate_while_experts_change(shared: Path, adapters: dict[str, Path]) -> None:
    """Every text is the one of a set that was there when it began."""
    with FusionRuntime.load(shared, "int8", "cpu", threads=1) as rt:

        def text() -> tuple[Any, ...]:
            result = rt.generate(IDS, 10)
            return tuple(result.token_ids), tuple(result.experts), tuple(result.logprobs)

        expected = {text()}
        rt.remove_expert("expert0")
        expected.add(text())
        rt.add_expert(adapters["expert0"])
        expected.add(text())
        assert len(expected) == 3
        results: list[Any] = []
        ended = threading.Event()

        def generate() -> None:
            try:
                while not ended.is_set():
                    results.append(text())
            except Exception as error:
                results.append(error)

        threads = [threading.Thread(target=generate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            rt.remove_expert("expert0")
            rt.add_expert(adapters["expert0"])
        ended.set()
        for thread in threads:
            thread.join()
        assert set(results) <= expected and len(results) >= 3


def test_close_ends_the_texts_of_all_sets(shared: Path, adapters: dict[str, Path]) -> None:
    rt = FusionRuntime.load(shared, "fp32", "cpu")
    old = rt.session()
    old.append(IDS)
    old.step()
    rt.remove_expert("expert0")
    new = rt.session()
    new.append(IDS)
    rt.close()
    for session in (old, new):
        with pytest.raises(ClosedError):
            session.step()
    changes: list[Callable[[], object]] = [lambda: rt.remove_expert("expert1"), lambda: rt.add_expert(adapters["expert0"])]
    for change in changes:
        with pytest.raises(ClosedError):
            change()


def test_refusals_leave_the_experts_as_they_were(bundles: list[Path], shared: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu") as rt:
        refusals: list[tuple[Callable[[], object], str]] = [
            (lambda: rt.add_expert(adapters["expert0"], "poetry"), "no row for 'poetry'"),
            (lambda: rt.add_expert(tmp_path / "expert1"), "There is no adapter folder"),
            (lambda: rt.remove_expert("poetry"), "There is no expert 'poetry' to remove"),
        ]
        for change, words in refusals:
            with pytest.raises(InputError, match=words):
                change()
        assert rt.expert_names == ["expert0", "expert1", "expert2"]
        rt.remove_expert("expert1")
        with pytest.raises(InputError, match="Unknown expert 'expert1': use one of expert0, expert2"):
            rt.generate(IDS, 4, expert="expert1")
        rt.remove_expert("expert2")
        with pytest.raises(InputError, match="'expert0' is the only expert"):
            rt.remove_expert("expert0")
    with FusionRuntime.load(bundles[0], "fp32", "cpu") as whole:
        changes: list[Callable[[], object]] = [lambda: whole.add_expert(adapters["expert0"]), lambda: whole.remove_expert("expert0")]
        for change in changes:
            with pytest.raises(UnavailableError, match="export the system with --shared-base"):
                change()
