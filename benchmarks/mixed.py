"""A copy of a Llama-shaped system that computes the same, but whose weights lie on no quantisation grid.

python -m benchmarks.mixed SYSTEM OUT      folders with router/ and experts/NAME/

Weights that were quantised once lie on a grid, where a quantiser may look better or worse than it is. This rotates
pairs of residual channels by random angles, after folding the norms' weights into the matrices that read them. RMSNorm
commutes with a rotation (the computational invariance of SliceGPT, arXiv:2401.15024). The head then differs from the
embedding, so the two are untied.
"""

import json
import shutil
from pathlib import Path

import torch
import typer
from safetensors.torch import load_file, save_file

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")  # of the residual stream, as READERS are


def rotation(channels: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal matrix float64 [H, H] that rotates randomly paired channels by random angles."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(channels, generator=generator).view(2, -1)
    angle = 2 * torch.pi * torch.rand(channels // 2, generator=generator, dtype=torch.float64)
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    matrix[first, first] = matrix[second, second] = angle.cos()
    matrix[first, second], matrix[second, first] = -angle.sin(), angle.sin()
    return matrix


def mix(folder: Path, out: Path) -> None:
    """Write the mixed copy of one checkpoint."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    rotate = rotation(weights["model.norm.weight"].shape[0])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    mixed = {"lm_head.weight": (head * weights["model.norm.weight"]) @ rotate}
    for name, tensor in weights.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        layer = module.rpartition(".")[0]
        if part in READERS:
            norm = "input_layernorm" if part in READERS[:3] else "post_attention_layernorm"
            mixed[name] = (tensor * weights[f"{layer}.{norm}.weight"]) @ rotate
        elif part in WRITERS:
            mixed[name] = rotate.T @ tensor
        elif part == "embed_tokens":
            mixed[name] = tensor @ rotate
        elif tensor.ndim == 1:
            mixed[name] = torch.ones_like(tensor)
    save_file({name: tensor.float().contiguous() for name, tensor in mixed.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=1))
    if (folder / "routing_head.safetensors").exists():
        routing = load_file(folder / "routing_head.safetensors")
        routing["routing_head.weight"] = (
            ((routing["routing_head.weight"].double() * weights["model.norm.weight"]) @ rotate).float().contiguous()
        )
        save_file(routing, out / "routing_head.safetensors")


def main(system: Path, out: Path) -> None:
    """Mix router and experts."""
    for folder in (system / "router", *sorted((system / "experts").iterdir())):
        mix(folder, out / folder.relative_to(system))


if __name__ == "__main__":
    typer.run(main)
