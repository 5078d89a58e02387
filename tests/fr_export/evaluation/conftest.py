"""Two bundles for the tests of evaluations: a system of random weights, and the shipped Gemma-2 system."""

from pathlib import Path

import pytest

from fusionroute.fr_export.families import FAMILIES
from tests.support.exporting import export_checkpoints, export_system
from tests.support.systems import Shape


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, fp32 and int8, a context of 64 tokens. Their answers differ, and do not end by themselves."""
    shape = Shape("llama3", layers=1, experts=3, tokenizer=True)
    return export_system(tmp_path_factory.mktemp("random"), shape, ("fp32", "int8"), max_seq_len=64)[0]


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Gemma-2 system in fp32: experts math, code and instruction."""
    preset = FAMILIES["gemma2"].preset("tiny")
    assert preset.router is not None
    return export_checkpoints(
        tmp_path_factory.mktemp("shipped") / "gemma2", Shape("gemma2"), preset.router, dict(preset.experts), ("fp32",)
    )
