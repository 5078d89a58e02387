"""One engine for router and experts on the simulated device: tokens, orders, waits, buffers and factors that move."""

import gc
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fusionroute.runtime import BundleError, FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.adapters.expert_files import without_factors
from fusionroute.runtime.backend import Output, Segment
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.session import Session
from fusionroute.runtime.tensorrt.device import Stream
from fusionroute.runtime.tensorrt.factors import FactorSlots
from tests.runtime.tensorrt.scenarios import PROMPT, SCENARIOS, Scenario, greedy, interleaved, nested, play
from tests.runtime.tensorrt.test_events import KINDS, ORDERS
from tests.support.simulated.bundles import CHUNK, write_pair_bundle
from tests.support.simulated.cuda import Cuda
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import POLICIES, Machine
from tests.support.simulated.memory import Fault
from tests.support.simulated.plain import in_turn

OWN = ("PairPass", "PairCache", "FactorSlots", "TensorRtPair")  # whose waits and buffers are tested here


def joint(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Two texts read by the router and by other experts in turn, all queued before any result is waited for."""
    backend = rt.backend
    assert backend.forward_both is not None
    texts = [list(PROMPT), [30, 2, 5, 7, 9, 11, 13, 15, 17]]
    routers = [backend.router.cache() for _ in texts]
    experts = [[model.cache() for model in backend.experts] for _ in texts]
    seen: list[float] = []
    for step in range(4):
        outputs: list[Output] = []
        for number, text in enumerate(texts):
            router, expert = routers[number], experts[number][(step // 2 + number) % len(backend.experts)]
            own, other = (Segment(text[cache.length :][: 1 + number], (0,)) for cache in (router, expert))
            outputs += backend.forward_both(router, own, expert, other)
        seen += [float(value) for output in outputs for value in output.logits[0][:3]]
        routers_only = [(output, "routing") for output in outputs if output.routing is not None]
        seen += nested([*((output, "logits") for output in outputs), *routers_only], machine)
    return [round(value, 3) for value in seen]


def together(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """A prompt of several chunks that router and a named expert read in passes that nobody waits for."""
    session = rt.session(expert=rt.expert_names[1])
    session.append((list(PROMPT) * CHUNK)[: 3 * CHUNK + 1])
    return [(token.id, round(token.logprob, 3)) for token in (session.step() for _ in range(3))]


ALL: dict[str, Scenario] = SCENARIOS | {"joint": joint, "together": together}


@pytest.fixture(scope="module", params=[False, True], ids=["in place", "rows"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of hand-written graphs with one base: a router and three experts, for both kinds of engines."""
    return write_pair_bundle(tmp_path_factory.mktemp("pair") / "bundle", rows=request.param)


@pytest.fixture(scope="module")
def size(pair: Path) -> int:
    """Bytes of one expert's factors on the device."""
    with simulated(Machine()), FusionRuntime.load(pair, device="rtx") as rt:
        factors: FactorSlots = rt.backend._pair.factors  # type: ignore[attr-defined]
        return factors.size


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("integrated", [False, True])
def test_tokens_are_those_of_the_graph_run_for_each_model_alone(pair: Path, policy: str, integrated: bool) -> None:
    for seed in range(2):
        texts = play(greedy, pair, Machine(seed, policy, integrated))
        for prompt, (tokens, experts, _) in zip((PROMPT, [30, 2]), texts, strict=True):
            assert (tokens, experts) == in_turn(pair, prompt, 14, CHUNK)
            assert len(set(experts)) > 1, "guesses are wrong at times"


@pytest.mark.parametrize("name", ALL)
def test_no_schedule_and_no_budget_changes_a_result(pair: Path, size: int, name: str) -> None:
    expected = play(ALL[name], pair, Machine())
    for (policy, integrated), seed in product((("late", False), ("random", True), ("starved", False)), range(2)):
        assert play(ALL[name], pair, Machine(seed, policy, integrated)) == expected, (policy, integrated, seed)
    if name != "given up":  # interrupts come at other waits
        for policy, count in (("late", 1), ("random", 2)):
            assert play(ALL[name], pair, Machine(1, policy), count * size + 100) == expected, (policy, count)


@pytest.fixture
def running(pair: Path) -> Iterator[tuple[FusionRuntime, Machine, Cuda]]:
    machine = Machine(0, "late")
    with patch("fusionroute.runtime.limits.CHUNK", CHUNK), simulated(machine) as cuda, FusionRuntime.load(pair, device="rtx") as rt:
        yield rt, machine, cuda


def started(rt: FusionRuntime) -> Session:
    """A session that no model lags behind."""
    session = rt.session()
    session.append(PROMPT)
    for expert in range(len(rt.expert_names)):
        session._decoder.readers.read_expert(expert, [len(session) - 1])
    return session


def test_one_pass_and_one_wait_for_a_token_whose_expert_was_guessed(running: tuple[FusionRuntime, Machine, Cuda]) -> None:
    rt, machine, _ = running
    session, seen = started(rt), {True: set[tuple[int, int]](), False: set[tuple[int, int]]()}

    def counts() -> tuple[int, int]:
        waits = sum(count for site, count in machine.sites.items() if site.startswith("host waits"))
        return waits, sum(span.name == "run of base" for span in machine.timeline)

    for _ in range(60):
        guess, before = session._decoder.step.guess_expert(), counts()
        lagging = max(session.lags.values())
        token = session.step()
        if guess is not None and lagging <= CHUNK:
            right = rt.expert_names[guess] == token.expert
            seen[right].add((counts()[0] - before[0], counts()[1] - before[1]))
    assert seen[True] == {(1, 1)}
    assert min(seen[False]) == (2, 2), "routing, then the right expert's logits"


def test_nothing_is_allocated_for_a_token_after_warm_up(running: tuple[FusionRuntime, Machine, Cuda]) -> None:
    rt, machine, cuda = running
    session, seen = started(rt), []
    for _ in range(115):
        session.step()
        seen.append((machine.heap.count, len(cuda.events), len(cuda.streams), len(cuda.graphs)))
    assert set(seen[95:]) == {seen[95]}


def test_the_least_recently_used_expert_leaves_its_slot(pair: Path, size: int) -> None:
    machine = Machine()
    with simulated(machine), FusionRuntime.load(pair, device="rtx", expert_memory=2 * size) as rt:
        session = rt.session()
        session.append([3, 4])
        fetched = []

        def fetches() -> int:
            return sum(span.name.startswith("upload") and "pinned" in span.name for span in machine.timeline)

        for expert in (0, 1, 0, 2, 0, 1):
            before = fetches()
            session._decoder.readers.read_expert(expert, [len(session) - 1])
            fetched.append(fetches() - before)
    assert fetched == [0, 0, 0, 1, 0, 1], "expert 1 left for 2, and 2 for 1"


def test_budgets_that_hold_no_expert_are_refused(pair: Path, size: int) -> None:
    with simulated(Machine()), pytest.raises(InputError, match=rf"expert_memory=100 does not hold the {size} bytes of one expert"):
        FusionRuntime.load(pair, device="rtx", expert_memory=100)
    with simulated(Machine(integrated=True)), pytest.raises(InputError, match="shares the host's memory"):
        FusionRuntime.load(pair, device="rtx", expert_memory=10**6)


def test_rows_without_an_expert_are_not_scored_and_engines_keep_their_experts(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = shutil.copytree(pair, tmp_path / "bundle"), [*PROMPT, 5]
    monkeypatch.setattr("fusionroute.runtime.limits.CHUNK", CHUNK)
    with simulated(Machine()), FusionRuntime.load(pair, device="rtx") as rt:
        scores, expert = rt.score(prompt, chunk=CHUNK), rt.generate(prompt, 8, expert="expert2")
        with pytest.raises(UnavailableError, match=r"^A loaded engine keeps its experts: .* `fusionroute add-expert` .* load it again\.$"):
            rt.remove_expert("expert1")
    manifest = Manifest.read(folder)
    variants = [without_factors(variant, "expert1") for variant in manifest.variants]
    models = [model for model in manifest.models if model.name != "expert1"]
    manifest.model_copy(update={"models": models, "variants": variants, "routing_rows": manifest.experts}).write(folder)
    with simulated(Machine()), FusionRuntime.load(folder, device="rtx") as rt:
        assert rt.expert_names == ["expert0", "expert2"]
        assert np.array_equal(rt.score(prompt, chunk=CHUNK).routing, scores.routing[:, [0, 2]])
        assert rt.generate(prompt, 8, expert="expert2").token_ids == expert.token_ids
        session = rt.session()
        session.append(prompt)
        token = session.step()
        assert token.routing.shape == (2,) and token.expert == rt.expert_names[int(token.routing.argmax())]


def test_factors_that_do_not_fit_are_refused(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    deeper = write_pair_bundle(tmp_path_factory.mktemp("deeper") / "bundle", layers=3)
    with (
        simulated(Machine()),
        patch("fusionroute.runtime.backends.factors_of", lambda bundle, paths: {expert: {} for expert in paths}),
        pytest.raises(BundleError, match=r"does not fit its engine \(the input delta\.0\.out"),
    ):
        FusionRuntime.load(deeper, device="rtx")


def dropped(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Caches that are forgotten unused, and one that lent what it had read."""
    rt.backend.router.cache()
    lender, borrower = rt.backend.router.cache(), rt.backend.router.cache()
    _ = lender.forward(PROMPT[:CHUNK], [CHUNK - 1]).routing
    unread = rt.backend.router.cache()
    unread.copy_prefix(lender, CHUNK)
    del unread
    borrower.copy_prefix(lender, CHUNK)
    del lender
    return [round(float(value), 4) for value in borrower.forward([9], [0]).logits[0]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the fault shows where memory is freed
def test_caches_may_be_forgotten_at_any_time(pair: Path) -> None:
    expected = play(dropped, pair, Machine())
    assert all(play(dropped, pair, Machine(seed, "late")) == expected for seed in range(3))
    with patch("fusionroute.runtime.tensorrt.pair.PairCache.__del__", lambda cache: None), pytest.raises(Fault):
        for seed in range(4):
            play(dropped, pair, Machine(seed, "late"))
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("mutation", ["skipped", "one short"])
def test_a_wrong_copy_of_new_rows_is_caught(pair: Path, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, copies = play(greedy, pair, Machine(0, "late")), []
    copy: Any = Stream.copy_rows

    def changed(stream: Stream, target: int, target_pitch: int, source: int, source_pitch: int, width: int, count: int) -> None:
        copies.append(target)
        if mutation == "one short":
            copy(stream, target, target_pitch, source, source_pitch, width, count - 1)

    monkeypatch.setattr(Stream, "copy_rows", changed)
    try:
        assert (play(greedy, pair, Machine(1, "late")) != expected) == bool(copies)
    except Fault:
        assert copies


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_wait_and_every_recording_is_needed(pair: Path, size: int) -> None:
    """Without one, some schedule faults or gives other tokens."""
    names = {**ALL, "dropped": dropped}
    cases = {(kind, name): Machine(0, "late", **options) for kind, options in KINDS.items() for name in names}

    def run(case: tuple[str, str], machine: Machine) -> Any:
        return play(names[case[1]], pair, machine, size + 100 if case[0] == "evicted" else None)

    results = {case: run(case, machine) for case, machine in cases.items()}
    sites = sorted({site for machine in cases.values() for site in machine.sites if any(name in site for name in OWN)})
    assert len(sites) > 20

    def shown(site: str) -> bool:
        for policy, seed in ORDERS:
            for case in (case for case, machine in cases.items() if site in machine.sites):
                try:
                    if run(case, Machine(seed, policy, skipped=site, **KINDS[case[0]])) != results[case]:
                        return True
                except Exception:  # a Fault, or what the runtime makes of garbage
                    return True
        return False

    assert [site for site in sites if not shown(site)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_buffer_is_needed(pair: Path) -> None:
    """For each buffer of the pair's passes, the memory of some other one that is in use is too early to take."""

    def texts(rt: FusionRuntime, machine: Machine) -> list[Any]:
        return [interleaved(rt, machine, 2), joint(rt, machine)]

    machine = Machine(0, "late")
    expected, buffers = play(texts, pair, machine), list(machine.allocations)
    mine = [number for number, buffer in enumerate(buffers) if any(name in buffer.name for name in OWN)]

    def wrong(shared: tuple[int, int]) -> bool:
        try:
            return bool(play(texts, pair, Machine(1, "late", shared=shared)) != expected)
        except Exception:
            return True

    for number in mine:
        others = [other for other, buffer in enumerate(buffers) if other != number and buffer.on_host == buffers[number].on_host]
        others.sort(key=lambda other: abs(other - number))
        assert any(wrong((max(number, other), min(number, other))) for other in others), buffers[number].name
