"""One graph for router and experts through the GPU's backend, on the CPU provider, in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fusionroute.fr_export.verify.half_on_cpu import compute_half_on_cpu
from fusionroute.runtime import BundleError, FusionRuntime
from fusionroute.runtime.adapters.expert_files import remove_expert
from fusionroute.runtime.adapters.factor_file import write_factors
from fusionroute.runtime.backend import Backend, BackendOptions, Segment
from fusionroute.runtime.backends import DEVICES
from fusionroute.runtime.backends.device_buffers import Inputs, Place
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.backends.ort_gpu_pair import GpuPairBinding, OrtGpuPair
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest, Variant
from fusionroute.runtime.plain_step import PlainStep
from tests.runtime.providers.conftest import CHUNK, CPU, relabelled
from tests.support.adapters import peft_model
from tests.support.bundles import rehash
from tests.support.pairs import SharedSystem, export_shared
from tests.support.systems import Shape

SHAPE = Shape("llama3", heads=2, kv_heads=1, head_dim=16, hidden=32, layers=2, tokenizer=True)
OPTIONS: list[dict[str, Any]] = [{}, {"r": 3}, {"r": 2, "modules_to_save": ["input_layernorm", "norm"]}]
IDS = np.random.default_rng(5).integers(3, 300, 60).tolist()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedSystem:
    return export_shared(tmp_path_factory.mktemp("pairs"), SHAPE, OPTIONS, ("fp16",), ("ort:cuda",), 320)


@contextmanager
def bound(folder: Path, precision: str) -> Iterator[FusionRuntime]:
    """A runtime whose GPU's backend runs on the CPU provider."""

    def opened(bundle: Bundle, variant: Variant, options: BackendOptions) -> Backend:
        assert variant.pair is not None
        return OrtGpuPair(bundle, variant, variant.pair, CPU)

    with (
        patch.dict(DEVICES, {"bound": (("ort:cuda",), opened)}),
        patch("fusionroute.runtime.backends.KNOWN", (*DEVICES, "bound")),
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
        FusionRuntime.load(folder, precision, "bound") as rt,
    ):
        yield rt


def test_joint_and_lone_passes_give_torchs_logits(shared: SharedSystem) -> None:
    """Of each model with its adapter, in chunks and steps, the expert behind; to the precision of fp16."""
    for number, adapter in enumerate(shared.experts.values()):
        models = [peft_model(shared.base, Path(folder)) for folder in (shared.router, adapter)]
        with torch.no_grad():
            expected = [model(torch.tensor([IDS])).logits[0].numpy() for model in models]
        bounds = [4e-3 * float(np.abs(rows).max()) for rows in expected]
        with bound(shared.bundle, "fp16") as rt:
            backend = rt.backend
            caches = backend.router.cache(), backend.experts[number].cache()
            assert backend.forward_both is not None
            for own, other in ((9, 5), (1, 1), (1, 1), (4, 9), (1, 3), (16, 1), (1, 1)):
                starts = [cache.length for cache in caches]
                segments = [
                    Segment(IDS[start : start + count], sorted({0, count - 1})) for start, count in zip(starts, (own, other), strict=True)
                ]
                outputs = backend.forward_both(caches[0], segments[0], caches[1], segments[1])
                for output, segment, start, rows, limit in zip(outputs, segments, starts, expected, bounds, strict=True):
                    logits = np.asarray(output.logits)
                    assert np.abs(logits - rows[[start + place for place in segment.positions]]).max() <= limit
            for cache, rows, limit in zip(caches, expected, bounds, strict=True):
                for count in (1, 7, 1):
                    begin = cache.length
                    logits = np.asarray(cache.forward(IDS[begin : begin + count], (count - 1,)).logits)
                    assert np.abs(logits - rows[begin + count - 1]).max() <= limit


def test_guesses_change_nothing_but_rounding(shared: SharedSystem) -> None:
    """Every step's routing and log-probability with guesses, and of the same tokens without any."""
    with bound(shared.bundle, "fp16") as rt:
        session = rt.session()
        session.append(IDS[:20])
        guesses, tokens = [], []
        for _ in range(40):
            guesses.append(session._decoder.step.guess_expert())
            tokens.append(session.step())
        hits = [guess is not None and rt.expert_names[guess] == token.expert for guess, token in zip(guesses, tokens, strict=True)]
        assert 3 < sum(hits) < 37, "right guesses and wrong ones"
        with patch.object(PlainStep, "guess_expert", lambda step: None):
            other = rt.session()
            other.append(IDS[:20])
            for token in tokens:
                again = other.step()
                assert np.abs(again.routing - token.routing).max() < 2e-2 * np.abs(token.routing).max()
                if again.id != token.id:  # next to each other within rounding
                    assert again.logprob == pytest.approx(token.logprob, abs=5e-2)
                    other.rewind(len(other) - 1)
                    other.append([token.id])


def test_tokens_are_those_of_the_cpu_backend_on_the_same_graph(tmp_path: Path) -> None:
    """Greedy, sampled and penalised; the graph is a copy in fp32 that rounds as bf16 does."""
    system = export_shared(tmp_path, SHAPE, OPTIONS, ("bf16",), ("ort:cuda",), 320)
    compute_half_on_cpu(system.bundle)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 1.5, "top_p": 0.999, "seed": 5, "repetition_penalty": 1.2},
    ]
    with FusionRuntime.load(system.bundle, device="cpu", threads=1) as cpu, bound(relabelled(system.bundle, tmp_path / "b"), "bf16") as rt:
        for options in samplings:
            first, second = (each.generate(IDS[:20], 20, **options) for each in (cpu, rt))
            assert (first.token_ids, first.experts) == (second.token_ids, second.experts)
            assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


def test_a_decoded_token_allocates_and_binds_nothing(shared: SharedSystem) -> None:
    with bound(shared.bundle, "fp16") as rt:
        session = rt.session(expert="expert0")
        session.append(IDS[:20])
        for _ in range(2):
            session.step()
        calls: list[str] = []
        with (
            patch.object(Place, "buffer", lambda *_: calls.append("buffer")),
            patch.object(Inputs, "__init__", lambda *_: calls.append("inputs")),
            patch.object(GpuPairBinding, "_binding", lambda *_: calls.append("binding")),
        ):
            for _ in range(20):
                session.step()
        assert not calls


def test_experts_come_and_go_in_the_folder_and_at_run_time(shared: SharedSystem, tmp_path: Path) -> None:
    """Rows of the routing head without an expert are not scored; running texts keep their experts."""
    folder = relabelled(shared.bundle, tmp_path / "bundle")
    with bound(folder, "fp16") as rt:
        expected, scores = rt.generate(IDS[:20], 12), rt.score(IDS)
        session = rt.session()
        session.append(IDS[:20])
        factors = rt.backend.experts[1].factors  # type: ignore[attr-defined]
        rt.remove_expert("expert0")
        assert rt.backend.experts[0].factors is factors, "it stays where it is on the device"  # type: ignore[attr-defined]
        assert np.array_equal(rt.score(IDS).routing, scores.routing[:, 1:]) and rt.generate(IDS[:20], 4).experts == ["expert1"] * 4
        assert [session.step().id for _ in range(12)] == expected.token_ids, "it began with both"
        rt.add_expert(shared.experts["expert0"], "expert0")
        again = rt.generate(IDS[:20], 12)
        assert (again.token_ids, again.experts) == (expected.token_ids, expected.experts)
        assert again.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    remove_expert(folder, "expert1")
    with bound(folder, "fp16") as rt:
        assert rt.expert_names == ["expert0"]
        assert np.array_equal(rt.score(IDS).routing, scores.routing[:, :1])


def test_factors_of_another_graph_are_refused(shared: SharedSystem, tmp_path: Path) -> None:
    folder = relabelled(shared.bundle, tmp_path / "swapped")
    (variant,) = Manifest.read(folder).variants
    assert variant.pair is not None
    path = folder / variant.pair.factors["expert0"]
    arrays = {name: array.astype(np.float32) for name, array in map_factors(path).items()}  # the graph reads fp16
    entries = {name: ("F32", array.shape) for name, array in arrays.items()}
    other, _ = write_factors(path.parent, "other", entries, arrays.values())
    other.replace(path)
    rehash(folder, variant.pair.factors["expert0"])
    with pytest.raises(BundleError, match=r"does not fit graphs/base.*its input delta"):
        OrtGpuPair(Bundle.open(folder), variant, variant.pair, CPU)
