"""One stage of a router's training, on transformers' Trainer.

The Trainer brings accumulation, clipping, ranks and checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fusionroute.fr_export.training.batches import Batch, Samples, optimizer_steps
from fusionroute.fr_export.training.losses import (
    cdpo_logits,
    cdpo_loss,
    label_log_probs,
    language_model_loss,
    preference_gaps,
    routing_loss,
    selected_log_probs,
)
from fusionroute.fr_export.training.muon import Muon
from fusionroute.fr_export.training.recipe import Recipe, Stage
from fusionroute.fr_export.training.router import Router
from fusionroute.runtime.errors import InputError

_TABLES = ("embed_tokens", "lm_head")  # matrices whose rows are tokens, not directions: AdamW suits them
_ADAMW: dict[str, Any] = {"betas": (0.9, 0.98), "weight_decay": 0.01, "fused": True}
_POINTS = 200  # of a loss curve, at most


class RouterTrainer(Trainer):
    """Trains a router on the steps of one stage.

    Every loss is a mean over all tokens (or pairs) of an optimizer step, however many batches and ranks share the step:
    each batch counts by its share. The routing head has a learning rate of its own; preferences do not train it.
    """

    def __init__(self, router: Router, stage: Stage, recipe: Recipe, sets: Sequence[Samples], folder: Path, save_every: int | None) -> None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.steps = optimizer_steps(
            sets, recipe.batch_size, recipe.batch_tokens, recipe.accumulation * world, stage.epochs, stage.max_steps, recipe.seed
        )
        self._stage, self._recipe = stage, recipe
        self._sums: dict[str, tuple[Tensor, float]] = {}  # name → weighted sum, sum of the weights
        router.requires_grad_head(stage.supervised)
        super().__init__(router, training_arguments(stage, recipe, len(self.steps), folder, save_every))
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # by the shares

    def run(self, checkpoint: str | None, advance: Callable[[float], None]) -> None:
        """Train, from a checkpoint's step on where one is named; `advance` is called with 1 after every step."""
        self.add_callback(_Progress(advance))
        self.train(resume_from_checkpoint=checkpoint)

    def points(self) -> list[dict[str, float]]:
        """The loss curve: each point holds the means over the steps since the previous one."""
        return [{name: value for name, value in point.items() if name != "epoch"} for point in self.state.log_history if "loss" in point]

    def get_train_dataloader(self) -> Any:
        """This rank's batches, in order.

        All epochs of a stage are one epoch of the Trainer, so that resuming skips finished steps.
        """
        own_batches = [batch for step in self.steps for batch in step[self.args.process_index :: self.args.world_size]]
        return DataLoader(_Collated(own_batches), batch_size=1, collate_fn=itemgetter(0), pin_memory=self.args.dataloader_pin_memory)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, or Muon for matrices and AdamW for the rest."""
        rate = self._stage.learning_rate
        rates = {"head": rate if self._stage.head_learning_rate is None else self._stage.head_learning_rate, "rest": rate, "matrices": rate}
        parameters: dict[str, list[Tensor]] = {kind: [] for kind in rates}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                matrix = self._recipe.optimizer == "muon" and p.ndim == 2 and not any(table in name for table in _TABLES)
                parameters["head" if name.startswith("head.") else "matrices" if matrix else "rest"].append(p)
        groups = [{"params": own, "lr": rates[kind], "muon": kind == "matrices"} for kind, own in parameters.items() if own]
        self.optimizer = (Muon if self._recipe.optimizer == "muon" else torch.optim.AdamW)(groups, lr=rate, **_ADAMW)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A linear warm-up whose first step is not zero, and a cosine to zero."""
        warm = max(1, round(num_training_steps * self._recipe.warmup))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_training_steps - warm)))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one step on this rank, and the counts over all ranks.

        The counts are (tokens or pairs, informative tokens).
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        total = torch.tensor([counts(batch) for batch in batches]).sum(0)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(device), "sum")
        return batches, tuple(total.tolist())

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The batch's share of the step's loss, times the number of ranks (which gradients are averaged over)."""
        shares = [self.args.world_size * own / max(1, total) for own, total in zip(counts(inputs), num_items_in_batch, strict=True)]
        preferences = "reference" in inputs
        logits, routing = model(inputs["ids"], inputs["positions"], learns_routing=not preferences)
        if preferences:
            return shares[0] * self._preference_loss(logits, routing, inputs, shares[0])
        lm = language_model_loss(logits, inputs["labels"])
        self._note("lm_loss", lm, shares[0])
        if routing is None:
            return shares[0] * lm
        expert = routing_loss(routing, inputs["expert_log_probs"], inputs["informative"])
        self._note("routing_loss", expert, shares[1])
        return shares[0] * lm + self._recipe.routing_weight * shares[1] * expert

    def _preference_loss(self, logits: Tensor, routing: Tensor | None, batch: dict[str, Tensor], share: float) -> Tensor:
        def gaps(log_probs: Tensor) -> Tensor:
            return preference_gaps(log_probs, batch["owners"], len(batch["ids"]) // 2)

        policy, reference = gaps(label_log_probs(logits, batch["labels"])), gaps(batch["reference"])
        expert = torch.zeros_like(policy) if routing is None else gaps(selected_log_probs(routing, batch["expert_log_probs"]))
        margins = cdpo_logits(policy, reference, expert, self._recipe.beta)
        loss = cdpo_loss(margins)
        self._note("dpo_loss", loss, share)
        self._note("reward_margin", margins.mean(), share)
        self._note("reward_accuracy", (margins > 0).float().mean(), share)
        return loss

    def _note(self, name: str, value: Tensor, weight: float) -> None:
        total, weights = self._sums.get(name, (torch.zeros((), device=value.device), 0.0))
        self._sums[name] = total + weight * value.detach(), weights + weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last point of the curve. Raises InputError where the loss is no longer finite."""
        for name, (total, weight) in self._sums.items():
            pair = torch.stack([total, torch.tensor(weight, device=total.device)])
            pair = self.accelerator.reduce(pair, "sum") if self.args.world_size > 1 else pair
            logs[name] = float(pair[0] / pair[1]) if pair[1] else 0.0
        self._sums = {}
        if not all(math.isfinite(value) for value in logs.values()):
            raise InputError(f"The training diverged before step {self.state.global_step}: lower --lr, or --head-lr.")
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(self.model.trained(), Path(output_dir) / "model.safetensors")


def counts(batch: dict[str, Tensor]) -> tuple[int, int]:
    """What a batch's losses are means over: (pairs, 0) for preferences, else (learnt tokens, informative tokens)."""
    if "reference" in batch:
        return len(batch["ids"]) // 2, 0
    return len(batch["labels"]), int(batch["informative"].sum()) if "informative" in batch else 0


def training_arguments(stage: Stage, recipe: Recipe, steps: int, folder: Path, save_every: int | None) -> Any:
    """The Trainer's own settings."""
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # the loader yields whole batches
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=steps,
        max_grad_norm=recipe.clip,
        logging_steps=max(1, steps // _POINTS),
        logging_nan_inf_filter=False,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 500,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=recipe.precision == "bf16",
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=stage.name == "mixed",  # preferences do not use the head
        seed=recipe.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs: one process each (accelerate launch), never DataParallel
    return arguments


class _Collated(Dataset):
    """The batches, collated into tensors when they are read."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        batch = self._batches[number]
        return batch.samples.collate(batch.numbers)


class _Progress(TrainerCallback):
    """Advances the progress bar by one per step, and makes the last step a point of the curve."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every optimizer step."""
        self._advance(1)
        control.should_log = control.should_log or state.global_step == state.max_steps
