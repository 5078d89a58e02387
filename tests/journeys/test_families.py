"""Systems of any family, and of two at once, through all of the exporter: calibrated, fitted, compared, for every
target.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Manifest
from tests.support.systems import Shape, make_system

PROMPTS = ("12+30= and then 7*8=", "def add(a, b):", "Say it in three words.", "What is a rotary table?")
CAPACITY = 64


def exported(
    folder: Path, shape: Shape, targets: tuple[str, ...], precisions: tuple[str, ...], gpus: tuple[int, ...] = ()
) -> tuple[Path, System, dict[str, Any]]:
    """The bundle of a random system, the system, and its report; calibrated on a few prompts."""
    router, experts = make_system(folder / "system", shape)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    request = Request(
        None, router, experts, precisions, targets, folder / "bundle", max_seq_len=CAPACITY, calibration=str(folder / "prompts.txt"), gpus=gpus
    )  # fmt: skip
    report = export(request, Stages(Console(quiet=True)))
    return request.out, System.open(None, router, experts, max_seq_len=CAPACITY), report


def test_a_router_with_experts_of_another_family_that_share_its_tokenizer(tmp_path: Path) -> None:
    shape = Shape("llama3", layers=1, experts=2, hidden=128, tokenizer=True, expert_family="qwen3")
    bundle, system, report = exported(tmp_path, shape, ("ort:cpu", "tensorrt"), ("fp32", "int8", "int4"))
    assert [model.family.name for model in system.models] == ["llama3", "qwen3", "qwen3"]
    assert Manifest.read(bundle).family == "llama3"
    figures = {(entry["target"], entry["precision"]): entry for entry in report["variants"]}
    assert all(entry["not_compared"] is None for entry in figures.values())
    # random weights lose more than trained ones: such a system of Llama alone 0.04 in int8 and 0.23 in int4
    for precision, bound in (("fp32", 1e-6), ("int8", 0.05), ("int4", 0.3)):
        for target in ("ort:cpu", "tensorrt"):
            for how in ("chunks", "decode"):
                assert figures[target, precision]["compared"][how]["kl_mean"] <= bound, (target, precision, how)
    for model in ("router", "expert0", "expert1"):
        assert figures["tensorrt", "int8"]["fitted"][model]["w8a8_share"] >= 0.6, "most multiply-adds have 8-bit activations"
    ids = [int(i) for i in np.random.default_rng(2).integers(3, shape.vocab, 40)]
    for expert in system.experts:
        logits = EngineGraphOnCpu(bundle / f"graphs/{expert.name}.tensorrt.fp32.onnx").read(ids, 7)[0]
        with torch.no_grad():
            expected = load(expert)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    with FusionRuntime.load(bundle, precision="int8") as runtime:
        result = runtime.generate(PROMPTS[0], 24, repetition_penalty=1.3)
        assert set(result.experts) == {"expert0", "expert1"}
        assert result.text == runtime.decode(result.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_and_precision_of_a_family(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is fitted to the system's own texts and compared with torch; engines are built for three GPUs.

    Without fp32, which TensorRT-RTX has no kernel of attention for, and which the tests of each dialect hold to torch.
    """
    targets = tuple(target for target in SCHEMES if target != "ort:cuda")  # which runs on GPUs only
    precisions = (FAMILIES[family].half, "int8", "int8-wo", "int4", "w8a8")
    shape = Shape(family, layers=2, experts=1, hidden=128, tokenizer=True)
    _, _, report = exported(tmp_path, shape, targets, precisions, gpus=(86, 89, 120))
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    for entry in report["variants"]:
        compared, engines = entry["compared"], entry.get("engines") or []
        assert entry["not_compared"] is None or entry["target"] == "portable"
        took = seconds.get(f"building {entry['precision']} engines", 0) if engines else 0
        size = sum(size for built in engines for size in built["bytes"].values())
        with capsys.disabled():
            kl = compared and f"KL {compared['chunks']['kl_mean']:.4f} in chunks, {compared['decode']['kl_mean']:.4f} by token"
            print(family, entry["target"], entry["precision"], kl, f"engines {size / 1e6:.1f} MB in {took:.1f} s")
        if compared is not None:
            limit = 0.01 if entry["precision"] in ("fp16", "bf16") else 0.5 if entry["precision"] == "int4" else 0.1
            assert compared["decode"]["kl_mean"] <= limit
