"""Memory of exporting adapters of a base of real size: Llama-3.1-8B's shapes, bf16, under three LoRA adapters.

The router is one of them, and two are experts; with --shared-base three are, and the bundle generates a few tokens. All
weights are random.

python -m benchmarks.adapters WORK_DIR [--precision int4 --rank 16 --shared-base]

Needs about 31 GB of disk in WORK_DIR (16 GB of base, up to 15 GB of bundle). Prints a Markdown table; docs/real-size.md has
results.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from benchmarks.real_size import run

LAYERS, HIDDEN, INNER, VOCAB = 32, 4096, 14336, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128009,
    "attention_bias": False, "mlp_bias": False, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
EXPERTS = ("math", "code", "instruct")
PROMPT = "2,651,6037,576,6081,603"
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN), "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def shards(generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each shard: embedding, head, then one shard for each layer."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield {name: random(generator, VOCAB, HIDDEN)}
    yield {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        norms = {f"{prefix}.{name}_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in ("input", "post_attention")}
        yield norms | {f"{prefix}.{name}.weight": random(generator, *shape) for name, shape in MATRICES.items()}


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Seeded values of the size that trained weights have, bf16."""
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def write_base(folder: Path) -> None:
    """Write the base, one shard in memory at a time. The index comes last: it marks the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, shard in enumerate(track(shards(generator), "writing the base", LAYERS + 3, console=Console(stderr=True))):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_adapter(folder: Path, base: Path, rank: int, seed: int) -> None:
    """Write a LoRA adapter of all matrices of all layers, bf16, as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in MATRICES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random(generator, rank, columns)
            tensors[f"{prefix}.lora_B.weight"] = random(generator, rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [name.rpartition(".")[2] for name in MATRICES]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def main(work: Path, precision: str = "int4", rank: int = 16, max_seq_len: int = 2048, shared_base: bool = False, tokens: int = 16) -> None:
    """Write base and adapters once, export them without calibration, and with one base generate `tokens`."""
    work = work.resolve()
    base, adapters = work / "base", {name: work / name for name in ("router", *EXPERTS[: 3 if shared_base else 2])}
    if not (base / "model.safetensors.index.json").is_file():
        write_base(base)
    for seed, folder in enumerate(adapters.values(), 1):
        write_adapter(folder, base, rank, seed)
    head = torch.randn(len(adapters) - 1, HIDDEN, generator=torch.Generator().manual_seed(0)) / 64
    save_file({"routing_head.weight": head}, adapters["router"] / "routing_head.safetensors")
    experts = [argument for name in list(adapters)[1:] for argument in ("--expert", f"{name}={adapters[name]}")]
    output, seconds, anonymous, mapped = run(
        "export.py", "--family", "llama3", "--router", str(adapters["router"]), *experts, "--precision", precision, "--max-seq-len", str(max_seq_len),
        "--calibration", "none", "--out", str(work / "bundle"), "--force", "--json", *["--shared-base"] * shared_base,
    )  # fmt: skip
    report = json.loads(output)
    sources = [
        sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")) for folders in ((base,), adapters.values())
    ]
    what = f"{sources[0] / 1e9:.1f} GB bf16 + {sources[1] / 1e6:.0f} MB of adapters → {report['variants'][0]['bytes'] / 1e9:.1f} GB {precision}"
    print("| step | seconds | peak anonymous memory | peak mapped files |\n|---|---|---|---|")
    print(f"| export {what} | {seconds:.0f} | {anonymous:.2f} GB | {mapped:.2f} GB |")
    for stage in report["stages"]:
        print(f"| – {stage['name']} | {stage['seconds']:.0f} | {stage['peak_anonymous_mib'] * 2**20 / 1e9:.2f} GB | |")
    if shared_base:
        size = sum(file.stat().st_size for file in (work / "bundle").rglob("*") if file.is_file())
        print(f"| the whole bundle, {len(adapters)} models: {size / 1e9:.2f} GB | | | |")
        output, seconds, anonymous, mapped = run(
            "-m", "runtime", "generate", str(work / "bundle"), "--prompt-ids", PROMPT, "--max-new-tokens", str(tokens), "--json"
        )
        print(f"| load and generate {len(json.loads(output)['token_ids'])} tokens | {seconds:.0f} | {anonymous:.2f} GB | {mapped:.2f} GB |")


if __name__ == "__main__":
    typer.run(main)
