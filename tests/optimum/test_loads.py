"""Optimum exports through its own command line and loads the result unmodified.

Slow, in an environment of its own: `make test-optimum`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.families import FAMILIES
from tests.support.systems import SHIPPED, Shape, make_system

pytestmark = pytest.mark.slow
optimum = pytest.importorskip("optimum.onnxruntime", reason="Optimum has an environment of its own: make test-optimum")
CLI = Path(sys.executable).parent / "optimum-cli"
FILES = {"fp32": None, "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}


def exported(out: Path, *arguments: str) -> Path:
    """The bundle that `optimum-cli export fusionroute` writes."""
    command: list[str | Path] = [
        CLI,
        "export",
        "fusionroute",
        *arguments,
        "--target",
        "portable",
        "--precision",
        ",".join(FILES),
        "--out",
        out,
        "--json",
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert {entry["target"] for entry in json.loads(process.stdout)["variants"]} == {"portable"}
    return out


def generated(model: Any, vocab: int, new: int) -> torch.Tensor:
    """Greedy tokens [2, 12 + new] of two prompts, one of them padded on the left."""
    ids = torch.randint(3, vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    tokens: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokens


def equal(folder: Path, checkpoint: Path, vocab: int, new: int) -> dict[str, float]:
    """Share of generated tokens that are equal in Optimum and transformers, by precision."""
    # the default attention of transformers 4.57 leaves out Gemma 2's softcap
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    expected = generated(exact, vocab, new)
    shares = {}
    for precision, file in FILES.items():
        model = optimum.ORTModelForCausalLM.from_pretrained(folder, **({"file_name": file} if file else {}))
        shares[precision] = float((generated(model, vocab, new) == expected)[:, 12:].float().mean())
    return shares


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_systems_generate_as_transformers_does(family: str, tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle", "--family", family)
    for name in ("router", "experts/math"):
        folder = Path(shutil.move(bundle / "portable" / Path(name).name, tmp_path / f"alone-{Path(name).name}"))
        checkpoint = Path(FAMILIES[family].preset("tiny").router or "").parent / name
        shares = equal(folder, checkpoint, 512, 80)  # beyond the window of 32
        print(family, name, shares)
        assert shares["fp32"] == 1 and shares["fp16"] > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_random_systems_generate_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Heads whose size is not hidden size / heads, which Optimum guesses wrong for Gemma 2."""
    shape = Shape(family, experts=1, head_dim=24)
    router, experts = make_system(tmp_path / "system", shape)
    bundle = exported(
        tmp_path / "bundle", "--family", family, "--router", router, "--expert", f"one={experts['expert0']}", "--calibration", "none"
    )  # fmt: skip
    shares = equal(bundle / "portable/router", Path(router), shape.vocab, 40)  # beyond the window of 16
    print(family, shares)
    assert shares["fp32"] == 1


def test_help_is_that_of_the_exporter() -> None:
    process = subprocess.run([CLI, "export", "fusionroute", "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "optimum-cli export fusionroute" in process.stdout and "--expert" in process.stdout


def test_wrong_usage_has_status_2() -> None:
    process = subprocess.run([CLI, "export", "fusionroute", "--family", "mamba"], capture_output=True, text=True)
    assert process.returncode == 2 and "mamba" in process.stderr
