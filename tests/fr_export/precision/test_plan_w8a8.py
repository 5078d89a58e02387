"""The plan of W8A8: which products stay at 16-bit activations, and the noise that decides it."""

import numpy as np
import pytest

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.precision.plan_w8a8 import choose, logit_noise
from fusionroute.fr_export.precision.smoothquant import Columns
from fusionroute.runtime.errors import InputError
from tests.support.planned_router import PlannedRouter


def test_the_noisiest_products_stay_at_16_bit_activations(planned_router: PlannedRouter) -> None:
    weights, at_a16 = planned_router.system.router.weights, planned_router.plan.at_a16
    assert at_a16 and [p.noise / p.work for p in at_a16] == sorted((p.noise / p.work for p in at_a16), reverse=True)
    everything = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, share=1)
    assert not everything.at_a16 and everything.share == 1 and everything.scales.items() >= planned_router.plan.scales.items()
    nothing = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, share=0)
    assert not nothing.scales and nothing.share == 0
    assert {p.matrix: p.noise for p in nothing.at_a16 if "layers" in p.matrix}.items() <= planned_router.noise.items()
    # those that did not fit, or that come after the last that did
    spared = [p for p in nothing.at_a16 if p not in at_a16]
    assert all(p.work > (planned_router.plan.share - 0.6) * sum(q.work for q in nothing.at_a16) for p in spared)
    assert all(step == pytest.approx(planned_router.seen[name].absmax() / 127) for name, step in everything.scales.items())
    clipped = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, Observer.mse, share=1)
    assert all(step == pytest.approx(planned_router.seen[name].mse() / 127) for name, step in clipped.scales.items())
    assert clipped.scales != everything.scales


def test_what_calibration_never_saw_stays_at_16_bit_activations(planned_router: PlannedRouter) -> None:
    weights, name = planned_router.system.router.weights, "model.model.layers.0.mlp.down_proj.weight"
    unseen = planned_router.seen | {name: Observer(name, 128)}
    unseen_plan = choose(planned_router.graph, weights, unseen, planned_router.noise, share=1)
    assert [p.matrix for p in unseen_plan.at_a16] == [name] and unseen_plan.at_a16[0].noise == np.inf
    with pytest.raises(InputError, match=f"no statistics of '{name}'"):
        choose(
            planned_router.graph, weights, {key: value for key, value in planned_router.seen.items() if key != name}, planned_router.noise
        )


def test_what_calibration_saw_as_zeros_alone_is_rounded_in_steps_of_one(planned_router: PlannedRouter) -> None:
    """A step of zero would make NaN of them."""
    weights, name = planned_router.system.router.weights, "model.model.layers.0.mlp.down_proj.weight"
    zeros = Observer(name, len(planned_router.seen[name].channel_absmax))
    zeros.see(np.zeros((3, len(zeros.channel_absmax)), np.float32))
    plan = choose(planned_router.graph, weights, planned_router.seen | {name: zeros}, planned_router.noise, share=1)
    assert plan.scales[name] == 1.0


def test_the_noise_of_logits_is_that_of_rounded_inputs() -> None:
    random = np.random.default_rng(1)
    x = (random.standard_normal((4000, 48)) * np.exp(random.standard_normal(48))).astype(np.float32)
    w = random.standard_normal((30, 48)).astype(np.float32)
    seen = Observer("x", 48)
    seen.see(x)
    columns = Columns(np.abs(w).max(0), np.square(w, dtype=np.float64).sum(0))
    for limit in (seen.absmax(), seen.mse(), seen.percentile(99)):
        step = limit / 127
        off = (np.clip(np.rint(x / step), -127, 127) * step - x) @ w.T
        assert logit_noise(seen, limit, columns) == pytest.approx(np.square(off).sum(-1).mean(), rel=0.35)
    assert logit_noise(seen, 0.0, columns) == 0


def test_the_heads_noise_is_told_in_logits(planned_router: PlannedRouter) -> None:
    plans = choose(planned_router.graph, planned_router.system.router.weights, planned_router.seen, planned_router.noise, share=0)
    by_name = {product.matrix: product for product in plans.at_a16}
    head = next(name for name in by_name if "layers" not in name)
    seen, columns = planned_router.seen[head], Columns.read(planned_router.graph.sources[head], planned_router.system.router.weights)
    out = int(planned_router.graph.model.graph.initializers[head].shape[0])
    assert by_name[head].noise == pytest.approx(logit_noise(seen, seen.absmax(), columns) / out)
