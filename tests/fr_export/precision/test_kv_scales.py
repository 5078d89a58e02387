"""The steps of keys and values, by hand."""

import numpy as np
import onnx_ir as ir
import pytest

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.precision.kv_scales import caches, kv_scales
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.kv_precisions import KV_PRECISIONS
from fusionroute.runtime.precisions import PRECISIONS

KV, SIZE = 2, 6


def attention(inside: bool, table: ir.Value) -> Graph:
    """One layer whose keys are turned in their first four channels, in the attention or in front of it."""

    def value(name: str, *shape: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    key, turned = value("key", 1, 1, KV * SIZE), value("turned", 1, 1, KV * SIZE)
    rotary = ir.Node("com.microsoft", "RotaryEmbedding", [key, None, table, table], outputs=[turned])
    view = ir.Node("", "Identity", [turned], outputs=[value("view", 1, 1, KV * SIZE)])
    outputs = [value(name, 1, KV, 8, SIZE) for name in ("out", "present.0.key", "present.0.value")]
    inputs = [None, key, None, None, None, None, None, table, table] if inside else [None, view.outputs[0], None, None, None, None, None]
    attributes = [ir.AttrInt64("do_rotary", 1)] if inside else []
    node = ir.Node("com.microsoft", "GroupQueryAttention", inputs, attributes, outputs=outputs)
    inner = ir.Graph([key, table], outputs, nodes=[node] if inside else [rotary, view, node], opset_imports={"": 20, "com.microsoft": 1})
    return Graph(ir.Model(inner, ir_version=10), {}, 1, (KV, SIZE))


@pytest.mark.parametrize("inside", [True, False])
def test_channels_that_turn_into_each_other_share_a_step(inside: bool) -> None:
    table = ir.Value(name="cos", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([8, 2]))
    graph = attention(inside, table)
    observed = {}
    for name in caches(graph):
        observed[name] = Observer(name, KV * SIZE)
        observed[name].see(np.array([[3, 5, -4, 12, 7, 0, 1, 1, 1, 1, 1, 1]], np.float32))
    eight, four = kv_scales(graph, observed, 8), kv_scales(graph, observed, 4)
    np.testing.assert_allclose(eight["present.0.key"][0], [5 / 127, 13 / 127, 5 / 127, 13 / 127, 7 / 127, 1], rtol=1e-6)
    np.testing.assert_allclose(four["present.0.key"][0], [3 / 7, 5 / 7, 4 / 7, 12 / 7, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(eight["present.0.value"][0, :5], 1.25 * np.array([3, 5, 4, 12, 7]) / 127, rtol=1e-6)
    np.testing.assert_allclose(four["present.0.value"][1], [0.7 / 7] * SIZE, rtol=1e-6)
    observed["present.0.key"] = Observer("present.0.key", KV * SIZE)
    with pytest.raises(InputError, match="no ranges of keys and values: calibrate again, or leave out --kv"):
        kv_scales(graph, observed, 8)


def test_a_variant_is_held_to_the_weaker_of_two_bounds() -> None:
    kv = KV_PRECISIONS["int8"].bounds
    assert PRECISIONS["fp32"].bounds_for("ort:cpu", kv) == {
        "greedy_agreement": 0.98, "routing_agreement": 0.99, "perplexity_ratio": 1.003, "kl_mean": 0.003,
    }  # fmt: skip
    assert PRECISIONS["int8"].bounds_for("ort:cpu", kv)["perplexity_ratio"] == 1.01
    assert PRECISIONS["int8"].bounds_for("ort:cpu") is PRECISIONS["int8"].bounds
