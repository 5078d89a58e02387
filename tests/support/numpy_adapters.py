"""LoRA adapters written with numpy alone, for the runtime's tests, which run where torch is not installed too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime.adapters.unadapted import read_layout
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensor_file import write_tensors


def layer_sizes(bundle: Path) -> dict[str, tuple[int, int]]:
    """[N, K] of the matrices that a bundle's experts may change, by the names of a checkpoint's modules."""
    pair = Manifest.read(bundle).variants[0].pair
    assert pair is not None and pair.adapting is not None
    groups = read_layout(bundle / pair.adapting.layout).plan.groups
    return {
        tensor.removesuffix(".weight"): (rows, group.width)
        for group in groups
        for matrix in group.matrices
        for tensor, rows in matrix.tensors
    }


def write_adapter(
    bundle: Path,
    folder: Path,
    seed: int = 0,
    rank: int = 3,
    change: Callable[[dict[str, np.ndarray]], object] = lambda _: None,
    **config: Any,
) -> Path:
    """A random adapter of all matrices that the bundle has inputs for. `change` edits its tensors, by their names."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in layer_sizes(bundle).items():
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = random.standard_normal((rank, columns), np.float32) * np.float32(0.2)
        tensors[f"{name}_B.weight"] = random.standard_normal((rows, rank), np.float32) * np.float32(0.2)
    change(tensors)
    write_tensors(folder, "a", {name: ("F32", array.shape) for name, array in tensors.items()}, tensors.values(), {}).path.rename(
        folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
