"""The shapes that `plan` knows, against transformers' own models, made without weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.plan.shapes import Shape, shapes
from fusionroute.runtime.plan.weights import format_of, weights_of


def parameters(shape: Shape, layers: int) -> int:
    """Of the architecture with so many layers."""
    config = AutoConfig.for_model(
        FAMILIES[shape.family].model_type, hidden_size=shape.hidden, num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_size, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.name)
def test_a_known_shape_has_the_parameters_of_its_architecture(shape: Shape) -> None:
    one, two = parameters(shape, 1), parameters(shape, 2)
    counted = shape.body + shape.vectors + shape.head * (1 if shape.tied else 2)
    assert one + (shape.layers - 1) * (two - one) == shape.parameters == counted
    assert weights_of(shape, format_of("ort:cpu", "fp32")).resident == 4 * shape.parameters


def test_every_family_has_a_known_size() -> None:
    assert {shape.family for shape in shapes()} == FAMILIES.keys()
