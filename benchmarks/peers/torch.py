"""transformers on torch: one model alone, and the fused system with all models in one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.workaround import Experts, Routing
from benchmarks.peers.worker import Generation, main, stepwise


class Torch:
    """A checkpoint in fp32.

    It is called directly, since `generate` adds more work per token than the calls themselves cost.
    """

    def __init__(self, folder: str, form: str, context: int, threads: int):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        cache = DynamicCache(config=self.model.config)

        def step(ids: list[int]) -> int:
            return int(self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

        return stepwise(prompt, count, step)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`."""
        return np.asarray(self.model(torch.tensor([ids]), use_cache=False).logits[0])


class Fused:
    """Router and chosen expert; an expert reads the tokens it has missed as one chunk."""

    def __init__(self, folders: dict[str, str], lam: float, context: int, threads: int):
        torch.set_num_threads(threads)
        router, *experts = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders.values())
        self.router, self.experts, self.names = router, experts, list(folders)[1:]
        self.routing, self.lam = Routing.load(Path(folders[next(iter(folders))])), lam

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        cache = DynamicCache(config=self.router.config)
        experts = Experts([reader(model) for model in self.experts])
        tokens, chosen = list[int](), list[str]()

        def step(ids: list[int]) -> int:
            tokens.extend(ids)
            hidden = self.router.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            expert = self.routing.choose(hidden[0, 0].numpy())
            chosen.append(self.names[expert])
            return int((self.lam * self.router.lm_head(hidden) + (1 - self.lam) * experts.catch_up(expert, tokens))[0, -1].argmax())

        return replace(stepwise(prompt, count, step), experts=chosen)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Not measured."""
        raise NotImplementedError


def reader(model: torch.nn.Module) -> Callable[[np.ndarray], torch.Tensor]:
    """A function that appends ids int32 [S] to a text and returns logits float32 [1, 1, V] of the last one."""
    cache = DynamicCache(config=model.config)
    return lambda ids: model(torch.from_numpy(ids)[None].long(), past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def load(folder: str | dict[str, str], form: str, **settings: Any) -> Torch | Fused:
    """Load one model, or a fused system if there are several folders, the router's first."""
    return Fused(folder, **settings) if isinstance(folder, dict) else Torch(folder, form, **settings)


if __name__ == "__main__":
    main(load)
