"""The recipe of the tiny systems that the repository ships: one base, three experts, one router per family.

python -m fr_export.training.tiny --family gemma2 [--out DIR] [--steps-scale X] [--seed 0]
"""

import copy
import shutil
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from fr_export.training.architectures import FAMILIES, Family, new_model
from fr_export.training.domains import COMPOSITE, DOMAINS, draw_many
from fr_export.training.loop import train
from fr_export.training.losses import informative_positions, label_log_probs, language_model_loss, sft_loss
from fr_export.training.rows import Batch, Encoder, batches, collate
from fr_export.training.system import HEAD_FILE, HEAD_KEY, Measurement, System, mean_accuracy, measure
from fr_export.training.tiny_tokenizer import build_tokenizer

SHIPPED = Path(__file__).parent.parent / "tiny"
TEST_SAMPLES = 240  # per domain

_TOKENS = 1024  # per batch
_BASE_STEPS, _BASE_LR = 400, 4e-3
_EXPERT_STEPS, _EXPERT_LR = {"math": 1200, "code": 500, "instruction": 900}, 4e-3
# The head learns slowly: at 1e-2 its softmax saturates on one expert before the domains are told apart, and stays.
_ROUTER_STEPS, _ROUTER_LR, _HEAD_LR = 600, 2e-3, 1e-3

# Composites let the models see one domain's answer in the midst of another's; an expert learns its own part of them.
_EVEN = {**dict.fromkeys(DOMAINS, 1.0), COMPOSITE: 0.25}


def _expert_mix(domain: str) -> dict[str, float]:
    return {domain: 1.0, COMPOSITE: 0.1}


def train_base(family: Family, encoder: Encoder, scale: float, seed: int) -> Any:
    """The common ancestor: all domains, too short to master any."""
    model = new_model(family)
    _train_model("base", model, batches(encoder, _EVEN, seed, _TOKENS), _BASE_LR, round(_BASE_STEPS * scale))
    return model


def train_expert(base: Any, domain: str, encoder: Encoder, scale: float, seed: int) -> Any:
    """A copy of the base, fine-tuned on the answers of one domain."""
    model = copy.deepcopy(base)
    data = batches(encoder, _expert_mix(domain), seed, _TOKENS, only=DOMAINS.index(domain))
    _train_model(f"{domain} expert", model, data, _EXPERT_LR, round(_EXPERT_STEPS[domain] * scale))
    return model


def train_router(experts: list[Any], encoder: Encoder, scale: float, seed: int) -> System:
    """The paper's supervised stage: from the instruction expert, with the experts frozen."""
    router = copy.deepcopy(experts[DOMAINS.index("instruction")]).requires_grad_(True)
    head = torch.zeros(len(experts), router.config.hidden_size, requires_grad=True)
    system = System(router, experts, head)

    def loss_of(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits = torch.stack([expert(batch.ids, use_cache=False).logits for expert in experts])
            log_probs = torch.stack([label_log_probs(own, batch.labels) for own in logits])
            informative = informative_positions(logits.argmax(-1), batch.labels)
        router_logits, routing = system.route(batch.ids)
        return sft_loss(router_logits, routing, batch.labels, log_probs, informative)

    data = batches(encoder, _EVEN, seed, _TOKENS)
    extra = [{"params": [head], "lr": _HEAD_LR}]
    train("router", router, _ROUTER_LR, loss_of, data, round(_ROUTER_STEPS * scale), extra)
    return system


def _train_model(title: str, model: Any, data: Any, lr: float, steps: int) -> None:
    def loss_of(batch: Batch) -> Tensor:
        return language_model_loss(model(batch.ids, use_cache=False).logits, batch.labels)

    train(title, model, lr, loss_of, data, steps)


def write(system: System, tokenizer: Any, family: Family, folder: Path) -> None:
    """Save the four Hugging Face folders and the routing head, weights rounded to bfloat16."""
    ends = tokenizer.convert_tokens_to_ids([family.end_of_turn, family.eos])
    paths = {folder / "router": system.router}
    paths |= {folder / "experts" / name: expert for name, expert in zip(DOMAINS, system.experts, strict=True)}
    for path, model in paths.items():
        model.generation_config.eos_token_id = ends
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
        tokenizer.save_pretrained(path)
    save_file({HEAD_KEY: system.head.detach().contiguous()}, folder / "router" / HEAD_FILE)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only


def evaluate(folder: Path, family: Family) -> dict[str, Measurement]:
    """Measure the system that lies in the folder on test samples, alternating plain text and chat."""
    system = System.load(folder)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder / "router"), family)
    found = {}
    for domain in (*DOMAINS, COMPOSITE):
        samples = draw_many(domain, "test", TEST_SAMPLES, seed=0)
        rows = [encoder.row([sample], chat=i % 2 == 1) for i, sample in enumerate(samples)]
        found[domain] = measure(system, collate(rows))
    return found


def table(family: Family, found: dict[str, Measurement]) -> Table:
    """The accuracies and routing shares for the terminal."""
    columns = (*DOMAINS, "router", "fused")
    out = Table("tested on", *columns, *(f"→ {name}" for name in DOMAINS), title=f"{family.name}: exact match, routing")
    for domain, m in found.items():
        out.add_row(domain, *(f"{m.accuracy[c]:.1%}" for c in columns), *(f"{share:.0%}" for share in m.routing))
    mean = mean_accuracy([found[domain] for domain in DOMAINS])
    out.add_row("average of the three", *(f"{mean[c]:.1%}" for c in columns), *[""] * len(DOMAINS))
    return out


def build(family: Family, out: Path, scale: float, seed: int) -> None:
    """Train and write a family's system; an older one in its place is replaced only when the new one is complete."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(family)
    encoder = Encoder(tokenizer, family)
    base = train_base(family, encoder, scale, seed)
    experts = [train_expert(base, domain, encoder, scale, seed + 1 + i) for i, domain in enumerate(DOMAINS)]
    # The router learns from the experts as they will be stored.
    for model in experts:
        model.to(torch.bfloat16).to(torch.float32).requires_grad_(False)
    system = train_router(experts, encoder, scale, seed + 9)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(system, tokenizer, family, beside)
        if out.exists():
            shutil.rmtree(out)
        beside.chmod(0o755)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


FamilyName = Enum("FamilyName", {name: name for name in FAMILIES}, type=str)  # type: ignore[misc]


def main(
    family: Annotated[FamilyName, typer.Option(help="The model family.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the one that the package ships.")] = None,
    steps_scale: Annotated[float, typer.Option(help="Multiplies every number of training steps.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the weights and the data.")] = 0,
) -> None:
    """Train a family's tiny system from nothing, write it and print how good it is."""
    started = time.monotonic()
    chosen = FAMILIES[family.value]
    folder = out or SHIPPED / chosen.name
    build(chosen, folder, steps_scale, seed)
    console = Console(width=140)
    console.print(table(chosen, evaluate(folder, chosen)))
    console.print(f"{folder}: {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
