"""The prefix cache and background catch-up on a device: caches are copied there, pieces are queued behind steps."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.tensorrt.device import Stream
from fusionroute.runtime.tensorrt.model import Cache
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine
from tests.support.simulated.memory import Fault

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def texts(folder: Path, seed: int, order: str, **options: Any) -> tuple[list[Any], list[int]]:
    """Three texts that begin alike, and what each pass read; the first is forgotten while the second begins."""
    lengths: list[int] = []
    forward = Cache.forward

    def noted(cache: Cache, ids: Any, positions: Any) -> Any:
        lengths.append(len(ids))
        return forward(cache, ids, positions)

    with (
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
        patch("fusionroute.runtime.limits.PIECE", CHUNK // 2),
        patch("fusionroute.runtime.prefix.MIN_SHARED_TOKENS", 2),
        patch.object(Cache, "forward", noted),
        simulated(Machine(seed, order)),
        FusionRuntime.load(folder, device="rtx", **options) as rt,
    ):
        first, second = rt.session(), rt.session()
        first.append(PROMPT)
        tokens = [first.step()]
        second.append([*PROMPT, 20, 21])
        tokens.append(second.step())
        del first
        tokens += [second.step() for _ in range(8)]
        tokens += list(rt.stream([*PROMPT, 22], 4))
        return [(token.id, token.expert, round(token.logprob, 3)) for token in tokens], lengths


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_prompt_changes_no_token(folder: Path, seed: int) -> None:
    order = ("late", "random")[seed % 2]
    expected, whole = texts(folder, seed, order, prefix_cache=0)
    results, shared = texts(folder, seed, order)
    assert results == expected
    assert sum(shared) < sum(whole)


def lend_and_forget(folder: Path, seed: int) -> list[float]:
    """Logits behind a prefix whose lender is gone before anything was waited for."""
    with simulated(Machine(seed, "late")), FusionRuntime.load(folder, device="rtx") as rt:
        lender, borrower = rt.backend.router.cache(), rt.backend.router.cache()
        _ = lender.forward(PROMPT[:CHUNK], [CHUNK - 1]).routing
        borrower.copy_prefix(lender, CHUNK)
        del lender
        return [round(float(value), 4) for value in borrower.forward([9], [0]).logits[0]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the fault shows where memory is freed
def test_a_lender_may_be_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(Machine(0)), FusionRuntime.load(folder, device="rtx") as rt:
        cache = rt.backend.router.cache()
        _ = cache.forward(PROMPT[:CHUNK], [CHUNK - 1]).routing
        expected = [round(float(value), 4) for value in cache.forward([9], [0]).logits[0]]
    assert all(lend_and_forget(folder, seed) == expected for seed in range(4))
    copy_prefix = Cache.copy_prefix

    def careless(cache: Cache, other: Cache, length: int) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Stream, "record", lambda stream, event: None)
            copy_prefix(cache, other, length)

    monkeypatch.setattr(Cache, "copy_prefix", careless)
    with pytest.raises(Fault):
        for seed in range(8):
            lend_and_forget(folder, seed)


@pytest.mark.parametrize("seed", range(2))
def test_background_catch_up_changes_no_token(folder: Path, seed: int) -> None:
    lazy = texts(folder, seed, "late")[0]
    assert texts(folder, seed, "late", catch_up="background")[0] == lazy


def test_it_is_refused_where_weights_would_move_for_it(folder: Path) -> None:
    with simulated(Machine(0)), pytest.raises(InputError, match="expert_memory limits"):
        FusionRuntime.load(folder, device="rtx", catch_up="background", expert_memory=1 << 20)
