"""A model cut into blocks and walked: the final hidden states and every matrix's input are those of plain torch."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fusionroute.calibration import blockwise_forward
from fusionroute.calibration.block import Block
from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import embedding, matrices, reader, split
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.stages import stages
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime.errors import FusionError, InputError
from tests.support.layer_inputs import layers_of, linear_inputs
from tests.support.sparing import sparing
from tests.support.systems import Shape, make_system

BIASED = {"attention_bias": True, "mlp_bias": True}
SHAPES = {
    "llama3": Shape("llama3", layers=3, config={"tie_word_embeddings": False}),
    "llama3 tied, with biases": Shape("llama3", layers=2, dtype=torch.bfloat16, config=BIASED | {"tie_word_embeddings": True}),
    "llama3 of one layer with padded heads": Shape("llama3", layers=1, head_dim=20, kv_heads=4),
    "gemma2": Shape("gemma2", layers=2, config={"sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "qwen2, a window in layers but the first": Shape("qwen2", layers=3),
    "qwen3 with biases": Shape("qwen3", layers=3, config={"attention_bias": True}),
    "olmo2": Shape("olmo2", layers=3, config={"tie_word_embeddings": True}),
    "smollm3": Shape("smollm3"),
    "gemma3": Shape("gemma3"),
    "phi3": Shape("phi3"),
    "gemma2 with padded heads and biases": Shape("gemma2", layers=1, head_dim=20, config={"attention_bias": True}),
}


@pytest.fixture(
    scope="module",
    params=sparing(
        SHAPES, ("smollm3", "gemma3", "phi3", "llama3 of one layer with padded heads", "qwen2, a window in layers but the first")
    ),
)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[System, Graph]:
    shape = SHAPES[request.param]
    system = System.open(FAMILIES[shape.family], *make_system(tmp_path_factory.mktemp("blocks"), shape), max_seq_len=64)
    return system, trace(system.family, system.router.config, system.vocab_size, system.max_seq_len)


@pytest.mark.parametrize("together", [1, 20, 2048])
@pytest.mark.parametrize("cut", [split, stages])
def test_parts_compute_what_torch_computes(
    traced: tuple[System, Graph], cut: Callable[[Graph], list[Block]], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of a stage are done for several texts at once, here for one, for some and for all."""
    system, graph = traced
    if cut is split and together > 1:
        pytest.skip("blocks have no such products")
    monkeypatch.setattr(blockwise_forward, "TOGETHER", together)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, system.vocab_size, length) for length in (40, 1, 7)]
    walk = BlockwiseForward(cut(graph), texts, *reader(graph, system.router.weights), threads=2)
    seen: dict[tuple[str, int], np.ndarray] = {}
    while not walk.done:
        walk.step(lambda matrix, text, x: seen.__setitem__((matrix, text), x.copy()))
    model = load(system.router)
    covered = set()
    packed = hasattr(model.model.layers[0].self_attn, "qkv_proj")
    for number, text in enumerate(texts):
        expected = linear_inputs(model, text)
        for matrix, channels in matrices(graph).items():
            for layer in layers_of(matrix, packed):
                covered.add(layer)
                assert expected[layer].shape == (len(text), channels)
                np.testing.assert_allclose(seen[matrix, number], expected[layer], rtol=1e-3, atol=2e-4)
        with torch.no_grad():
            hidden = model.model(input_ids=torch.from_numpy(text)[None], use_cache=False).last_hidden_state
        np.testing.assert_allclose(walk.states[number][0], hidden.numpy(), rtol=1e-3, atol=2e-4)
    assert covered == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(seen) == len(texts) * len(matrices(graph))


def test_how_blocks_are_cut(traced: tuple[System, Graph]) -> None:
    _, graph = traced
    before = ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True)
    blocks = split(graph)
    assert ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True) == before, "the traced graph stays as it was"
    assert [block.name for block in blocks] == [*(f"layers.{number}" for number in range(graph.layers)), "head"]
    assert {matrix: width for block in blocks for matrix, width in block.channels.items()} == matrices(graph)
    for block in blocks:
        assert block.observed.keys() == block.channels.keys()
        for name in block.weights.values():
            assert f"layers.{blocks.index(block)}." in name or block.name == "head" or not graph.sources[name].tensors
    read = [name for block in blocks for name in block.weights.values() if graph.sources[name].tensors]
    stored = {name for name, source in graph.sources.items() if source.tensors} - {embedding(graph).inputs[0].name}
    assert set(read) == stored - {name for name in matrices(graph) if "lm_head" in name}, "every weight but the embedding and the head"
    assert len(read) == len(set(read)), "and each in one block"
    outer = [block.graph for block in blocks[1:-1]]
    assert len(set(outer)) <= 2, "layers of one kind have equal graphs"


def test_how_stages_are_cut(traced: tuple[System, Graph]) -> None:
    _, graph = traced
    cut = stages(graph)
    assert {matrix: width for stage in cut for matrix, width in stage.channels.items()} == matrices(graph)
    for stage in cut:
        assert len(set(stage.observed.values())) <= 1 and set(stage.observed.values()) <= set(stage.states_in), "an input is a state"
    assert [stage.name for stage in cut] == [*(f"stage.{number}" for number in range(5 * graph.layers + 1)), "head"]
    assert sum(len(stage.channels) for stage in cut) == len(matrices(graph)), "each matrix in one stage"
    inner = [stage.graph for stage in cut[6:-7]]
    assert len(set(inner)) <= 10, "stages of one kind have equal graphs"


def test_what_reads_the_weights(traced: tuple[System, Graph]) -> None:
    system, graph = traced
    embed, read = reader(graph, system.router.weights)
    table = torch.nn.functional.embedding
    model = load(system.router)
    ids = np.array([3, 299, 3])
    np.testing.assert_array_equal(embed(ids)[0], table(torch.from_numpy(ids), model.model.embed_tokens.weight).detach().numpy())
    with pytest.raises(InputError, match="Token id 300 is outside the vocabulary: expected 0 to 299"):
        embed(np.array([300]))
    for matrix, channels in matrices(graph).items():
        layers = [model.get_submodule(name).weight for name in layers_of(matrix, hasattr(model.model.layers[0].self_attn, "qkv_proj"))]
        np.testing.assert_array_equal(read(matrix), torch.cat(layers).detach().numpy())
        assert read(matrix).shape[1] == channels


def test_values_that_jump_over_a_block_cannot_be_cut() -> None:
    shape = Shape("llama3", layers=3)
    graph = trace(FAMILIES["llama3"], shape.build(expert=False), shape.vocab, 64)
    products = [node for node in graph.model.graph if node.op_type == "FusedMatMul" and "down_proj" in node.inputs[1].name]
    early, late = products[0].outputs[0], products[2]
    add = ir.Node("", "Add", [late.outputs[0], early])
    graph.model.graph.insert_after(late, add)
    for user, index in [(user, index) for user, index in late.outputs[0].uses() if user is not add]:
        user.replace_input_with(index, add.outputs[0])
    with pytest.raises(FusionError, match=r"of layer 0 is used beyond layer 1; blocks cannot be cut here"):
        split(graph)
