"""A copy of a Llama-shaped system whose weights lie on no grid: the same functions, with the residual stream's channels mixed.

python benchmarks/mixed.py SYSTEM OUT      folders as tools write them: router/ and experts/NAME/

Weights that were quantised once lie on a grid, on which a quantiser may look better (or worse) than it is. Here pairs of residual channels
are turned by random angles, after the norms' weights have gone into the matrices that read them: RMSNorm is the same before and after a
rotation (the computational invariance of SliceGPT, arXiv:2401.15024). The head then differs from the embedding, so they are untied.
"""

import json
import shutil
from pathlib import Path

import torch
import typer
from safetensors.torch import load_file, save_file

READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITTEN = ("o_proj", "down_proj")


def rotation(channels: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal matrix [H, H] that turns channels pair by pair, in a random pairing."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(channels, generator=generator).view(2, -1)
    angle = 2 * torch.pi * torch.rand(channels // 2, generator=generator, dtype=torch.float64)
    found = torch.zeros(channels, channels, dtype=torch.float64)
    found[first, first] = found[second, second] = angle.cos()
    found[first, second], found[second, first] = -angle.sin(), angle.sin()
    return found


def mix(folder: Path, out: Path) -> None:
    """Write the mixed copy of one checkpoint."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    turn = rotation(weights["model.norm.weight"].shape[0])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    mixed = {"lm_head.weight": (head * weights["model.norm.weight"]) @ turn}
    for name, tensor in weights.items():
        at, _, part = name.removesuffix(".weight").rpartition(".")
        layer = at.rpartition(".")[0]
        if part in READ:
            norm = "input_layernorm" if part in READ[:3] else "post_attention_layernorm"
            mixed[name] = (tensor * weights[f"{layer}.{norm}.weight"]) @ turn
        elif part in WRITTEN:
            mixed[name] = turn.T @ tensor
        elif part == "embed_tokens":
            mixed[name] = tensor @ turn
        elif tensor.ndim == 1:
            mixed[name] = torch.ones_like(tensor)
    save_file({name: tensor.float().contiguous() for name, tensor in mixed.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=1))
    if (folder / "routing_head.safetensors").exists():
        routing = load_file(folder / "routing_head.safetensors")
        routing["routing_head.weight"] = (
            ((routing["routing_head.weight"].double() * weights["model.norm.weight"]) @ turn).float().contiguous()
        )
        save_file(routing, out / "routing_head.safetensors")


def main(system: Path, out: Path) -> None:
    """Mix router and experts."""
    for folder in (system / "router", *sorted((system / "experts").iterdir())):
        mix(folder, out / folder.relative_to(system))


if __name__ == "__main__":
    typer.run(main)
