"""Engines of a system of adapters: one for all models, beside one for each. Sizes, and what building takes.

python -m benchmarks.pair_engines BASE --family llama3 --precision int4 [--rank 16] [--experts 3]

Makes random adapters of the base, exports the system with one base and with whole models, and builds both in turn for
SM86, SM89 and SM120 with TensorRT-RTX, which needs no GPU. Times are CPU seconds of this process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.engines import rebuild

SMS = (86, 89, 120)


def write_system(base: Path, folder: Path, rank: int, experts: int) -> tuple[str, dict[str, str]]:
    """Random adapters of all projections of the layers: the router's with a routing head, and name → folder of experts."""
    with safe_open(base / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if name.endswith("_proj.weight")}  # noqa: SIM118
        hidden = file.get_slice("model.norm.weight").get_shape()[0]
    generator = torch.Generator().manual_seed(0)
    folders = [folder / name for name in ("router", *(f"expert{number}" for number in range(experts)))]
    for each in folders:
        each.mkdir()
        tensors = {}
        for name, (rows, columns) in shapes.items():
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.empty(shape).normal_(std=0.02, generator=generator)
                tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] = values
        save_file(tensors, each / "adapter_model.safetensors", {"format": "pt"})
        targets = sorted({name.split(".")[-2] for name in shapes})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
        (each / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base.resolve())}))
    save_file({"routing_head.weight": torch.randn(experts, hidden, generator=generator)}, folders[0] / "routing_head.safetensors")
    return str(folders[0]), {each.name: str(each) for each in folders[1:]}


def main() -> None:
    """Print one line of JSON for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        router, experts = write_system(arguments.base, folder, arguments.rank, arguments.experts)
        for shared in (True, False):
            request = Request(
                FAMILIES[arguments.family], router, experts, (arguments.precision,), ("tensorrt",), folder / f"shared-{shared}",
                calibration="none", compare=0, shared_base=shared, max_seq_len=1024,
            )  # fmt: skip
            export(request, Stages(Console(quiet=True)))
            print(json.dumps({"one base": shared} | built(request.out)), flush=True)


def built(bundle: Path) -> dict[str, object]:
    """Sizes in bytes and CPU seconds of a bundle's engines."""
    start, manifest = time.process_time(), Manifest.read(bundle)
    manifest = rebuild(bundle, manifest.variants, manifest, "rtx", SMS, None, lambda _: lambda _: None)
    seconds = time.process_time() - start
    (variant,) = manifest.variants
    sizes = {name: manifest.files[path].bytes for name, path in variant.engines[0].engines.items()}
    factors = {} if variant.pair is None else {name: manifest.files[path].bytes for name, path in variant.pair.factors.items()}
    return {"engines": sizes, "factors": factors, "bytes": sum((*sizes.values(), *factors.values())), "cpu_seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
