"""Time and memory of exporting and running a system of real size: three models of Gemma-2-2B's shapes.

The weights are random bf16.

python -m benchmarks.real_size WORK_DIR [--precision int4 --prompts 8]
python -m benchmarks.real_size WORK_DIR --precision int4 --target rtx:sm86+sm89+sm120 --experts math

Needs about 26 GB of disk in WORK_DIR (16 GB of checkpoints, 8.5 GB of bundle). On two cores it takes about 20 minutes
rounded to nearest, and hours calibrated. Prints a Markdown table; docs/real-size.md has results.
"""

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16",
}  # fmt: skip


def shapes() -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: one for the embedding, one per layer."""
    hidden, inner, size = 2304, 9216, 256
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (256000, hidden), "model.norm.weight": (hidden,)}]
    for layer in range(26):
        prefix = f"model.layers.{layer}"
        shards.append(
            {f"{prefix}.self_attn.{name}_proj.weight": (heads * size, hidden) for name, heads in (("q", 8), ("k", 4), ("v", 4))}
            | {f"{prefix}.self_attn.o_proj.weight": (hidden, 8 * size), f"{prefix}.mlp.down_proj.weight": (hidden, inner)}
            | {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            | {
                f"{prefix}.{name}_layernorm.weight": (hidden,)
                for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
            }
        )
    return shards


def write_checkpoint(folder: Path, seed: int) -> None:
    """Write a sharded checkpoint of seeded random weights, with one shard in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for number, shard in enumerate(track(shapes(), f"writing {folder.name}", console=Console(stderr=True))):
        name = f"model-{number:05}.safetensors"
        tensors = {key: (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16) for key, shape in shard.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run(*command: str) -> tuple[str, float, float, float]:
    """Run a command.

    Returns its stdout, its seconds, and the peaks in GB of anonymous and of mapped-file memory over all its processes.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    peaks = [0, 0]

    def watch() -> None:
        while process.poll() is None:
            peaks[:] = map(max, peaks, memory(process.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return output, time.perf_counter() - start, peaks[0] / 1e9, peaks[1] / 1e9


def memory(pid: int) -> tuple[int, int]:
    """Anonymous and mapped-file memory in bytes of a process and its descendants."""
    anonymous = mapped = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                usage = process.memory_info()
                anonymous, mapped = anonymous + usage.rss - usage.shared, mapped + usage.shared
    return anonymous, mapped


def main(
    work: Path,
    precision: str = "int8",
    tokens: int = 16,
    max_seq_len: int = 2048,
    prompts: int = 0,
    target: str = "ort",
    experts: str = "math,code",
) -> None:
    """Write the checkpoints once, export them (calibrated if `prompts` > 0), and generate if the target is the CPU."""
    router, folders = work / "router", {name: work / name for name in experts.split(",")}
    for number, folder in enumerate((router, *folders.values())):
        if not (folder / "model.safetensors.index.json").is_file():
            write_checkpoint(folder, number)
    head = torch.randn(len(folders), 2304, generator=torch.Generator().manual_seed(0)) / 48
    save_file({"routing_head.weight": head}, router / "routing_head.safetensors")
    expert_flags = [argument for name, folder in folders.items() for argument in ("--expert", f"{name}={folder}")]
    bundle, prompt_file = work / "bundle", work / "prompts.txt"
    # without a tokenizer the text of a prompt does not matter
    prompt_file.write_text("".join(f"prompt {number}\n" for number in range(prompts)))
    output, seconds, anonymous, mapped = run(
        "export.py", "--family", "gemma2", "--router", str(router), *expert_flags, "--precision", precision, "--target", target, "--max-seq-len", str(max_seq_len),
        "--calibration", str(prompt_file) if prompts else "none", "--out", str(bundle), "--force", "--json",
    )  # fmt: skip
    report = json.loads(output)
    source = sum(file.stat().st_size for folder in (router, *folders.values()) for file in folder.glob("*.safetensors"))
    written = report["variants"][0]["bytes"]
    print("| step | seconds | peak anonymous memory | peak mapped files |\n|---|---|---|---|")
    print(
        f"| export {source / 1e9:.1f} GB bf16 → {written / 1e9:.1f} GB {precision} | {seconds:.0f} | {anonymous:.2f} GB | {mapped:.2f} GB |"
    )
    for stage in report["stages"]:
        print(f"| – {stage['name']} | {stage['seconds']:.0f} | {stage['peak_anonymous_mib'] * 2**20 / 1e9:.2f} GB | |")
    billions = sum(report["parameters"].values()) / 1e9
    print(f"| – per billion parameters ({billions:.1f}) | {seconds / billions:.0f} | | |")
    for built in report["variants"][0]["engines"]:
        sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in built["bytes"].items())
        print(f"\nEngines for {', '.join(f'SM{sm}' for sm in built['sms'])}, {built['flavour']} {built['version']}: {sizes}")
    if target != "ort":
        return
    output, seconds, anonymous, mapped = run(
        "-m", "runtime", "generate", str(bundle), "--prompt-ids", "2,651,6037,576,6081,603", "--max-new-tokens", str(tokens), "--json"
    )
    result = json.loads(output)
    print(f"| load and generate {len(result['token_ids'])} tokens | {seconds:.0f} | {anonymous:.2f} GB | {mapped:.2f} GB |")
    print(f"\nToken ids: {result['token_ids']}\n\nExperts: {result['experts']}")


if __name__ == "__main__":
    typer.run(main)
