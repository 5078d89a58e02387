"""`python -m runtime bench`: its figures against independent counts, its files, its errors."""

import json
import shutil
import time
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.bench.bench import BenchOptions, bench, take_turns
from fusionroute.runtime.bench.counters import catch_ups, switches
from fusionroute.runtime.bench.memory import INTERVAL, PeakMemory
from fusionroute.runtime.bench.run import Run, generate
from fusionroute.runtime.bench.summary import Weights, summarise
from fusionroute.runtime.bench.workload import Workload
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.process_memory import release_freed, resident
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner
from tests.runtime.bench.conftest import measured
from tests.runtime.commands.conftest import command
from tests.runtime.commands.test_commands import assert_one_sentence
from tests.support.commands import Command

__all__ = ["command"]


def test_figures_follow_from_the_runs(bundles: list[Path], command: Command) -> None:
    for bundle in bundles:
        result = measured(command, bundle, "--precision", "int8,fp32", "--rows", "fused,router,expert1,fused:expert0")
        variants = {variant.precision: variant for variant in Manifest.read(bundle).variants}
        assert (result["prompt_tokens"], result["new_tokens"], result["repeats"], result["interleaved"]) == (9, 12, 3, True)
        assert [(row["precision"], row["system"]) for row in result["rows"]] == [
            (precision, system) for precision in ("int8", "fp32") for system in ("fused", "router", "expert1", "fused:expert0")
        ]
        first = [np.mean(run["seconds"]) for run in result["rows"][0]["runs"]]
        for row in result["rows"]:
            runs = row["runs"]
            assert len(runs) == 3 and all(len(run["seconds"]) == 11 and len(run["experts"]) == 12 for run in runs)
            means = sorted(sum(run["seconds"]) / 11 for run in runs)
            assert row["seconds_per_token"] == pytest.approx(means[1])
            assert row["tokens_per_second"] == pytest.approx(1 / means[1])
            assert row["first_token"] == sorted(run["first"] for run in runs)[1]
            ratios = sorted(a / np.mean(run["seconds"]) for a, run in zip(first, runs, strict=True))
            assert row["times_first"] == pytest.approx(ratios[1])
            tokens = sorted(second for run in runs for second in run["seconds"])
            assert all(0 < own < second for run in runs for own, second in zip(run["own"], run["seconds"], strict=True))
            assert row["own"] == sorted(second for run in runs for second in run["own"])[16]
            assert row["p50"] == tokens[16] and row["p50"] <= row["p95"] <= row["p99"] <= tokens[-1]
            variant = variants[row["precision"]]
            read, base = variant.weight_bytes, variant.weight_bytes["router"] if variant.pair else 0
            experts = runs[0]["experts"][1:]
            expected = {
                "fused": read["router"] + sum(read[name] for name in experts) / 11, "router": read["router"],
                "expert1": base + read["expert1"], "fused:expert0": read["router"] + read["expert0"],
            }[row["system"]]  # fmt: skip
            assert row["weight_bytes_per_token"] == pytest.approx(expected)
            assert row["bytes_per_second"] == pytest.approx(expected / means[1])
            assert row["bandwidth_share"] == pytest.approx(expected / means[1] / 20e9)
        report = {entry["precision"]: entry for entry in json.loads((bundle / "report.json").read_text())["variants"]}
        for each in result["precisions"]:
            assert each["bytes"] == report[each["name"]]["bytes"] and each["bits_per_weight"] == report[each["name"]]["bits_per_weight"]
            assert each["memory"]["anonymous"] > sum(variants[each["name"]].weight_bytes.values()) and each["device_memory"] is None
        assert any("precisions on the CPU, not engines on a GPU" in note for note in result["notes"])


def test_switches_and_catch_ups_are_those_of_a_session(bundles: list[Path], command: Command) -> None:
    """A session says before each step how far each expert lags behind."""
    for bundle in bundles:
        row = measured(command, bundle, "--precision", "fp32", "--prompt", "7*8=", "--new-tokens", 40)["rows"][0]
        with FusionRuntime.load(bundle, "fp32") as rt:
            session, lengths, experts = rt.session(), [], []
            ids = rt.encode("7*8=")
            session.append((ids + rt.encode("7*8=")[1:] * 3)[:9])
            for _ in range(40):
                lags = session.lags
                experts.append(session.step().expert)
                lengths.append(lags[experts[-1]])
        assert row["runs"][0]["experts"] == experts
        assert row["catch_ups"] == [length for length in lengths[1:] if length > 1]
        assert row["switches"] == sum(experts[n] != experts[n - 1] for n in range(1, 40))
        assert row["experts"] == {name: experts.count(name) for name in set(experts)}


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 50))
def test_catch_ups_recounted(experts: list[str], prompt: int) -> None:
    """Token by token: an expert reads all since it was last chosen, or all there is."""
    expected = []
    for place in range(1, len(experts)):
        before = [other for other in range(place) if experts[other] == experts[place]]
        expected.append(place - before[-1] if before else prompt + place)
    assert catch_ups(experts, prompt) == [length for length in expected if length > 1]
    assert switches(experts) == len("".join(experts)) - 1 - sum(a == b for a, b in pairwise(experts))


def test_a_run_by_the_clock(bundles: list[Path]) -> None:
    """One look at the clock before the prompt, one after each token; a session that is used again gives the same."""
    ticks = count(0)
    with FusionRuntime.load(bundles[0], "fp32") as rt:
        session = rt.session()
        first = generate(session, [5, 6, 7], 4, clock=lambda: float(next(ticks) ** 2))
        assert first.first == 1 and first.seconds == [3, 5, 7] and len(first.experts) == 4
        assert len(session) == 7
        again = generate(session, [5, 6, 7], 4)
        assert again.experts == first.experts and again.own is None, "nobody told what models take"
        ticks, busy = count(), count()
        timed = generate(session, [5, 6, 7], 4, clock=lambda: float(next(ticks) ** 2), models=lambda: next(busy) * 0.5)
        assert timed.seconds == [3, 5, 7] and timed.own == [2.5, 4.5, 6.5]
        assert generate(session, [5, 6, 7], 4, drafts=True, models=lambda: 0.0).own is None


def test_units_take_turns() -> None:
    order: list[str] = []

    def unit(name: str) -> Any:
        def run() -> Run:
            order.append(name)
            return Run(0.0, [float(len(order))], [name, name])

        return run

    runs_by_unit = take_turns({name: unit(name) for name in "AB"}, 3)
    assert "".join(order) == "ABABAB"
    assert {name: [run.seconds[0] for run in runs] for name, runs in runs_by_unit.items()} == {"A": [1, 3, 5], "B": [2, 4, 6]}


@pytest.mark.parametrize("sequential", [False, True])
def test_loading_and_turns(bundles: list[Path], command: Command, sequential: bool) -> None:
    """Each precision is loaded once; in turns both are open at the same time, else never."""
    events: list[str] = []
    load, close = FusionRuntime.load, FusionRuntime.close

    def loading(bundle: Path, precision: str, *rest: Any, **options: Any) -> FusionRuntime:
        events.append(f"load {precision}")
        return load(bundle, precision, *rest, **options)

    def closing(runtime: FusionRuntime) -> None:
        events.append(f"close {runtime.precision}")
        close(runtime)

    with patch.object(FusionRuntime, "load", loading), patch.object(FusionRuntime, "close", closing):
        result = measured(command, bundles[0], "--precision", "fp32,int8", *(["--sequential"] if sequential else []))
    turns = ["load fp32", "load int8", "close int8", "close fp32"]
    assert events == (["load fp32", "close fp32", "load int8", "close int8"] if sequential else turns)
    assert result["interleaved"] is not sequential and any("one after the other" in note for note in result["notes"]) is sequential


def test_default_precisions_are_all_of_the_device(bundles: list[Path], command: Command) -> None:
    assert [each["name"] for each in measured(command, bundles[0])["precisions"]] == ["fp32", "int8"]


def test_the_prompt_has_the_length_asked_for(bundles: list[Path]) -> None:
    from fusionroute.runtime.bench.prompt import prompt_ids

    opened = Bundle.open(bundles[0])
    with FusionRuntime.load(bundles[0], "fp32") as rt:
        assert prompt_ids(opened, "abc", None) == rt.encode("abc")
        assert prompt_ids(opened, "abc", 2) == rt.encode("abc")[:2]
        assert prompt_ids(opened, "abc", 9) == rt.encode("abcabcabc")[:9]
        assert len(prompt_ids(opened, None, None)) == 64 and len(prompt_ids(opened, None, 700)) == 700


def without(bundle: Path, tmp_path: Path, *, tokenizer: bool = True, weight_bytes: bool = True) -> Path:
    """A copy as it would be without a tokenizer, or as older exports wrote it."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    content = json.loads((copy / "manifest.json").read_text())
    if not tokenizer:
        del content["files"]["tokenizer.json"]
        (copy / "tokenizer.json").unlink()
    if not weight_bytes:
        for variant in content["variants"]:
            del variant["weight_bytes"]
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


def test_older_bundles_say_nothing_of_bytes(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    result = measured(command, without(bundles[0], tmp_path, weight_bytes=False))
    for row in result["rows"]:
        assert (row["weight_bytes_per_token"], row["bytes_per_second"], row["bandwidth_share"]) == (None, None, None)
    assert any("export it again" in note for note in result["notes"])


def test_a_bundle_without_a_tokenizer(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    bundle = without(bundles[0], tmp_path, tokenizer=False)
    assert measured(command, bundle)["prompt_tokens"] == 9
    ended = command("bench", bundle, "--prompt", "a")
    assert ended.status == 1 and ended.out == ""
    assert_one_sentence(ended.err.splitlines(keepends=True)[-1], "no tokenizer.json", "--prompt-tokens")


FAILURES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "precision": (("--precision", "int8,int3"), ("'int3'", "only int8, fp32")),
    "row": (("--rows", "fused,history"), ("'history'", "expert0, expert1")),
    "context": (
        ("--prompt-tokens", 1000, "--new-tokens", 30),
        ("1000 tokens of prompt and 30 new ones", "context of 1024", "--max-seq-len"),
    ),
    "device": (("--device", "rtx"), ("cuda-bindings", "CUDA", "no graphs for rtx")),
    "folder": (("--plot", "nowhere/a.png"), ("nowhere", "make it first")),
}
USAGE: dict[str, tuple[object, ...]] = {
    "flag": ("--speed",), "device": ("--device", "tpu"), "one token": ("--new-tokens", 1), "no prompt": ("--prompt-tokens", 0),
    "no repeats": ("--repeats", 0), "word for a number": ("--repeats", "few"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_failures_end_in_one_sentence(bundles: list[Path], command: Command, name: str) -> None:
    options, words = FAILURES[name]
    ended = command("bench", bundles[0], *options)
    assert ended.status == 1 and ended.out == ""
    sentence = ended.err.splitlines(keepends=True)[-1]
    assert_one_sentence(sentence, *(() if name == "device" else words))
    assert any(word in sentence for word in words)


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_has_status_2(bundles: list[Path], command: Command, name: str) -> None:
    assert command("bench", bundles[0], *USAGE[name]).status == 2


def test_the_ceiling_reads_all_of_a_large_buffer() -> None:
    lengths: list[int] = []

    def kernel(part: np.ndarray) -> None:
        lengths.append(part.nbytes)

    with patch.object(bandwidth, "KERNELS", (kernel,)), patch.object(bandwidth, "seconds", lambda work: (work(), 0.5)[1]):
        measured = WHOLE()
    assert sum(lengths) == measured.buffer and measured.bytes_per_second == 2 * measured.buffer
    assert measured.buffer >= min(bandwidth.SMALLEST, 1 << 20)
    ticks = iter([0.0, 9.0, 20.0, 25.0, 30.0, 38.0, 40.0, 47.0, 50.0, 56.0])
    with patch("time.perf_counter", lambda: next(ticks)):
        assert bandwidth.seconds(lambda: None) == 5.0


WHOLE = bandwidth.of_host  # not the one that tests put in its place


def test_growth_tells_own_memory_from_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(24 << 20))
    release_freed()
    before = resident()
    with PeakMemory() as memory:
        own = np.ones(48 << 20, np.uint8)
        time.sleep(10 * INTERVAL)
        del own
        mapped = np.memmap(tmp_path / "file", np.uint8, "r")
        assert mapped.sum() == 0
    assert 48 << 20 <= memory.growth.anonymous < 72 << 20
    assert 24 << 20 <= memory.growth.mapped < 40 << 20
    assert 48 << 20 <= memory.peak.anonymous - before.anonymous < 72 << 20


def test_models_of_different_sizes() -> None:
    """The first token is not among those that are timed: neither is what it reads."""
    sizes = {"router": 10, "a": 100, "b": 1000}
    runs = [Run(9.0, [1.0, 3.0], ["a", "b", "b"]), Run(7.0, [2.0, 4.0], ["a", "b", "b"])]
    base = [Run(1.0, [4.0, 4.0], []), Run(1.0, [6.0, 6.0], [])]
    whole, one_base = Weights(sizes), Weights(sizes | {"router": 0}, 10)
    for workload, weights, read, counts in (
        (Workload("fused", True, True, None, "weighted", 0.5), whole, 1010, (1, [6])),
        (Workload("b", False, True, "b", "weighted", 0.0), whole, 1000, (1, [6])),
        (Workload("router", True, False, None, "weighted", 1.0), whole, 10, (0, [])),
        (Workload("fused", True, True, None, "weighted", 0.5), one_base, 1010, (1, [6])),
        (Workload("b", False, True, "b", "weighted", 0.0), one_base, 1010, (1, [6])),
        (Workload("router", True, False, None, "weighted", 1.0), one_base, 10, (0, [])),
    ):
        row = summarise("fp32", workload, runs, base, 5, weights, 4000.0)
        assert (row.weight_bytes_per_token, row.seconds_per_token, row.first_token, row.times_first) == (read, 2.5, 8.0, 2.0)
        assert (row.bytes_per_second, row.bandwidth_share) == (read / 2.5, read / 2.5 / 4000)
        assert (row.switches, row.catch_ups) == counts


def test_drafts_are_a_row_of_their_own(bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(DraftPlanner, "plan", lambda self, most, *_: DraftPlan("router", min(most, 4)))
    monkeypatch.setattr("fusionroute.runtime.speculation.draft_planner.MIN_STEP_SECONDS", 0.0)
    result = bench(bundles[0], BenchOptions(("fp32",), "cpu", prompt_tokens=9, new_tokens=20, repeats=2, rows="fused,fused+drafts"))
    plain, drafting = result["rows"]
    assert plain["acceptance_rate"] is None and plain["runs"][0]["drafted"] == 0
    assert drafting["experts"] == plain["experts"] and drafting["switches"] == plain["switches"]
    for run in drafting["runs"]:
        assert run["drafted"] > 0 and len(run["seconds"]) == 19 and run["seconds"].count(0.0) == run["accepted"]
    drafted, accepted = (sum(run[name] for run in drafting["runs"]) for name in ("drafted", "accepted"))
    assert drafting["acceptance_rate"] == accepted / drafted
    assert drafting["weight_bytes_per_token"] is None and not drafting["catch_ups"]
