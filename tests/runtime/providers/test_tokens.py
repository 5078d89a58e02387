"""The GPU's backend on the CPU provider gives what the same graphs give step by step.

For both dialects and families.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import FusionInputs
from fusionroute.runtime.backends.device_buffers import Inputs, Place
from fusionroute.runtime.backends.gpu_fusion import BoundFusion, GpuFused
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.session import Session
from tests.runtime.providers.conftest import CHUNK, CPU, on_cpu, relabelled
from tests.runtime.providers.plain import Plain
from tests.support.systems import SHIPPED

CASES = [(family, *kind) for family in SHIPPED for kind in (("ort:cuda", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "fp32"))]
Pair = tuple[FusionRuntime, Plain]


@pytest.fixture(params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Iterator[Pair]:
    family, target, precision = request.param
    folder = bundles[family]
    with on_cpu(target), FusionRuntime.load(folder, precision, "bound") as rt:
        yield rt, Plain(folder, Bundle.open(folder).variant(target, precision), CHUNK, CPU.level)


def words(count: int, seed: int = 0) -> list[int]:
    return [int(word) for word in np.random.default_rng(seed).integers(3, 300, count)]


def check_step(session: Session, plain: Plain, rt: FusionRuntime, penalty: float = 1.0) -> bool:
    """The token and expert are the best, or next to it within rounding (attention may read more keys than needed);
    whether the best.
    """
    token = session.step(repetition_penalty=penalty)
    expert = rt.expert_names.index(token.expert)
    expected = plain.step(token.id, expert, penalty)
    rounding = (1e-3 if rt.precision == "fp16" else 1e-5) * np.abs(expected.fused).max()
    assert expected.fused[token.id] >= expected.fused.max() - rounding
    assert expected.routing[expert] >= expected.routing.max() - rounding
    assert np.abs(token.routing - expected.routing).max() <= rounding
    assert token.logprob == pytest.approx(expected.logprob, abs=2 * rounding)
    return token.id == int(expected.fused.argmax())


def test_steps_catch_up_rewinds_and_penalties(pair: Pair) -> None:
    rt, plain = pair
    session = rt.session()
    session.append(words(100))
    plain.tokens += words(100)
    best = []
    # attention comes to read 128, 256 and less again
    for count, length, new in ((40, 70, 5), (20, 3, 140), (12, 140, 0), (6, 1, 1)):
        best += [check_step(session, plain, rt, 1.0 if step % 3 else 1.3) for step in range(count)]
        session.rewind(length)
        plain.rewind(length)
        session.append(words(new, seed=new))
        plain.tokens += words(new, seed=new)
    assert np.mean(best) > 0.95
    assert session.token_ids == plain.tokens


def test_sessions_in_turn_do_not_touch_each_other(pair: Pair) -> None:
    rt, _ = pair
    prompts = [words(20, 1), words(33, 2)]
    alone = [rt.generate(prompt, 12) for prompt in prompts]
    sessions = [rt.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.append(prompt)
    tokens = [[session.step() for session in sessions] for _ in range(len(alone[0].token_ids))]
    for number, result in enumerate(alone):
        assert [step[number].id for step in tokens][: len(result.token_ids)] == result.token_ids
        assert [step[number].logprob for step in tokens][: len(result.token_ids)] == result.logprobs


def test_scores(pair: Pair) -> None:
    rt, plain = pair
    ids = words(70, 3)
    logits, experts = plain.score(ids)
    scores = rt.score(ids, chunk=CHUNK)
    assert np.array_equal(scores.experts, experts) and len(set(experts.tolist())) > 1
    assert np.abs(scores.logits - logits).max() <= 1e-5 * np.abs(logits).max()
    some = rt.score(ids, [69, 3, 40], chunk=CHUNK)
    assert np.abs(some.logits - logits[[69, 3, 40]]).max() <= 2e-3 * np.abs(logits).max(), "other rows of a chunk are asked for"
    one = rt.score(ids, chunk=1)
    assert np.abs(one.logits - logits).max() <= 5e-3 * np.abs(logits).max(), "half precision rounds one token otherwise"


def test_fusion_penalises_what_it_is_told_and_rows_read_stay_as_they_were(pair: Pair) -> None:
    rt, _ = pair
    router, expert = rt.backend.router.cache(), rt.backend.experts[0].cache()
    first, second = router.forward([5, 9], (1,)), expert.forward([5, 9], (1,))
    read = [np.array(output.logits) for output in (first, second)]
    copies = [row.copy() for row in read]
    for ids in ([7], [7, 250, 31], []):
        fused = rt.backend.fuser()(FusionInputs(first.logits, second.logits, (0.25, 0.75), 4, np.array(ids, np.int64), 1.7, 0.5))
        raw = (0.25 * read[0] + 0.75 * read[1])[0].astype(np.float64)
        expected = raw.copy()
        expected[ids] = np.where(raw[ids] > 0, raw[ids] / 1.7, raw[ids] * 1.7)
        assert np.allclose(fused.rows[0], expected, rtol=1e-5, atol=1e-5)
        best = np.argsort(-expected)[:4]
        assert np.array_equal(fused.ids[0], best) and np.allclose(fused.unpenalised[0], raw[best], rtol=1e-5, atol=1e-5)
        assert np.allclose(fused.sampling_normaliser, np.log(np.exp(expected / 0.5).sum()))
    router.forward([200], (0,))
    assert all(np.array_equal(row, before) for row, before in zip(read, copies, strict=True))


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.5, "top_p": 0.999, "seed": 5, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_k": 7, "min_p": 0.05, "seed": 6, "repetition_penalty": 1.1},
    {"temperature": 0.8, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {5: 2.0}, "top_logprobs": 3},
]


@pytest.mark.parametrize("family", SHIPPED)
def test_sampling_is_that_of_the_cpu_backend_on_the_same_graphs(family: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 kernels for CPUs: these graphs are copies in fp32 that round as bf16 does."""
    folder = bundles[family].with_name("emulated")
    with (
        on_cpu("ort:cuda"),
        FusionRuntime.load(folder, device="cpu", threads=1) as cpu,
        FusionRuntime.load(relabelled(folder, tmp_path / "bundle"), device="bound") as bound,
    ):
        for options in SAMPLINGS:
            first, second = (rt.generate(words(40), 30, **options) for rt in (cpu, bound))
            assert first.token_ids == second.token_ids and first.experts == second.experts
            assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


def test_a_decoded_token_allocates_and_binds_nothing_and_leaves_the_row_where_it_is(pair: Pair) -> None:
    rt, _ = pair
    calls: list[str] = []

    def noted(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            calls.append(f"{owner.__name__}.{name}")
            return real(*arguments, **named)

        return patch.object(owner, name, called)

    def row(fused: GpuFused) -> np.ndarray:
        calls.append("row")
        return np.asarray(fused._rows.numpy())

    with (
        noted(Place, "buffer"), noted(Inputs, "__init__"), noted(Inputs, "bind"), noted(BoundFusion, "__init__"),
        patch.object(GpuFused, "rows", property(row)),
    ):  # fmt: skip
        session = rt.session(expert=rt.expert_names[0])
        session.append(words(20))
        session.step()
        session.step()
        assert "Place.buffer" in calls
        calls.clear()
        for _ in range(30):
            session.step()
        assert not calls
        session.step(temperature=3.0, seed=0, top_p=0.99999)
        assert calls.count("row") == 1
