"""The table of families, their presets, and configs that cannot be served."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fusionroute.fr_export.families import FAMILIES, Preset
from fusionroute.fr_export.families.family import TINY_SYSTEMS, positions
from fusionroute.runtime.errors import InputError
from tests.support.systems import CONFIGS, SHIPPED, Shape


def test_the_table_is_sorted_and_names_each_model_type_once() -> None:
    assert list(FAMILIES) == sorted(FAMILIES)
    types = [family.model_type for family in FAMILIES.values()]
    assert len(set(types)) == len(types)


def test_presets_are_the_shipped_systems_and_those_of_the_paper() -> None:
    shipped = sorted(folder.parent.name for folder in TINY_SYSTEMS.glob("*/router"))
    assert shipped == sorted([*SHIPPED, *(f"{name}-shared" for name in SHIPPED)])
    for name in SHIPPED:
        tiny, shared, paper = (FAMILIES[name].preset(preset) for preset in ("tiny", "tiny-shared", "paper"))
        assert tiny.router == str(TINY_SYSTEMS / name / "router")
        assert shared.router == str(TINY_SYSTEMS / f"{name}-shared" / "router") and shared.experts.keys() == tiny.experts.keys()
        assert list(tiny.experts) == list(paper.experts) == ["math", "code", "instruction"]


def test_a_family_without_a_preset_says_what_to_name() -> None:
    family = replace(FAMILIES["llama3"], name="llama9", paper=None)
    mend = r"of family llama9: name a router and experts with --router and --expert\.$"
    with pytest.raises(InputError, match=rf"^The package ships no trained system {mend}"):
        family.preset("tiny")
    with pytest.raises(InputError, match=rf"^The paper has no system {mend}"):
        family.preset("paper")
    assert replace(family, paper=Preset(None, {"math": "hub/math"})).preset("paper").experts == {"math": "hub/math"}
    with pytest.raises(InputError, match=r"^Unknown preset 'large' of family llama9: use 'tiny', 'tiny-shared' or 'paper'\.$"):
        family.preset("large")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_tests_and_defaults_export_is_served(name: str) -> None:
    kind, _ = CONFIGS[name]
    for config in (kind(), Shape(name).build(expert=False)):
        FAMILIES[name].check("It", config)


SLIDES = {"layer_types": ["full_attention", "sliding_attention"]}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window of no length": ("gemma2", SLIDES | {"sliding_window": 0}, "It has a 'sliding_window' of 0"),
    "layers that slide without a window": ("gemma2", SLIDES | {"sliding_window": None}, "It has a 'sliding_window' of None"),
    "layers in chunks": (
        "gemma2",
        {"layer_types": ["chunked_attention", "full_attention"]},
        "It has layers of type 'chunked_attention'; expected full_attention or sliding_attention",
    ),
    "types of layers that nobody reads": ("mistral", SLIDES, "It has 'layer_types' in its config.json, which Mistral's layers do not read"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "It attends in both directions"),
    "both directions in gemma3": ("gemma3", {"use_bidirectional_attention": True}, "It attends in both directions"),
    "frequencies that change in one kind of layer": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            }
        },
        "It scales its rotary embedding by 'dynamic'",
    ),
    "frequencies that change": (
        "llama3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "It scales its rotary embedding by 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_served_is_refused(case: str) -> None:
    name, fields, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refused:
        FAMILIES[name].check("It", Shape(name, config=fields).build(expert=False))
    assert str(refused.value).endswith(".")


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Shape("llama3").build(expert=False), 1024),
        (SimpleNamespace(max_position_embeddings=128, rope_scaling={"type": "linear", "factor": 2.0}), 128),
        (SimpleNamespace(max_position_embeddings=128, rope_scaling=None), 128),
        (
            SimpleNamespace(max_position_embeddings=128, original_max_position_embeddings=32, rope_scaling={"type": "longrope"} | FACTORS),
            32,
        ),
        (
            SimpleNamespace(
                max_position_embeddings=128,
                rope_parameters={
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
                    "sliding_attention": {"rope_type": "default"},
                },
            ),
            64,
        ),
    ],
    ids=[
        "unscaled",
        "scaled, as transformers 4 says it",
        "unscaled, as transformers 4 says it",
        "longrope so",
        "longrope in one kind of layer",
    ],
)
def test_a_table_holds_the_positions_that_have_one_set_of_frequencies(config: Any, expected: int) -> None:
    assert positions(config) == expected
