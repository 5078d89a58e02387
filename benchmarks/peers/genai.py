"""onnxruntime-genai: models from its own builder, one alone, or a fused system with one generator per model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.peers.workaround import Experts, Routing
from benchmarks.peers.worker import Generation, main, stepwise

FORMS = {  # name → precision and options of the builder
    "fp32": ("fp32",),
    "int8": ("int8", "block_size=32"),
    "block 32": ("int4", "block_size=32"),
    "k_quant": ("int4", "block_size=32", "algo_config=k_quant"),
    "k_quant_mixed": ("int4", "block_size=32", "algo_config=k_quant_mixed"),
}
LAST = "prune_lm_head=true"  # logits of the last token only; perplexity needs those of the whole prompt
ROUTED = "include_hidden_states=true"  # for the routing head


def build(checkpoint: Path, form: str, out: Path) -> None:
    """Build `out`; for a router also `out/all` with logits of every token and `out/routed` with hidden states."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    precision, *options = FORMS[form]
    kinds = {out: [LAST]}
    if (checkpoint / "routing_head.safetensors").is_file():
        kinds |= {out / "all": [], out / "routed": [LAST, ROUTED]}
    for folder, more in kinds.items():
        place = (None, str(checkpoint), str(folder), precision, "cpu", str(folder / "cache"))
        create_model(*place, **parse_extra_options(*place, [*options, *more]))


def opened(folder: Path, threads: int | None, entries: dict[str, str]) -> og.Model:
    """A model whose texts never end: its end-of-text token is one that does not occur.

    `threads` None: the library chooses.
    """
    options = dict[str, int | str](entries) if threads is None else {"intra_op_num_threads": threads, **entries}
    endless = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"] - 1
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"eos_token_id": endless, "decoder": {"session_options": options}}}))
    return og.Model(config)


def generator(model: og.Model, context: int) -> og.Generator:
    """An empty text."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=context, do_sample=False)
    return og.Generator(model, settings)


class Genai:
    """One model alone, with the library's own settings except threads."""

    def __init__(self, folder: str, form: str, context: int, threads: int):
        self.folder, self.context, self.threads = Path(folder), context, threads
        self.model = opened(self.folder, threads, {})

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        text, started = generator(self.model, self.context), False

        def step(ids: list[int]) -> int:
            nonlocal started
            if not started:  # later the generator reads its own tokens
                text.append_tokens(np.array(ids, np.int32))
                started = True
            text.generate_next_token()
            return int(text.get_next_tokens()[0])

        return stepwise(prompt, count, step)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`."""
        text = generator(opened(self.folder / "all", self.threads, {}), self.context)
        text.append_tokens(np.array(ids, np.int32))
        return np.array(text.get_output("logits")[0], np.float32)


class Fused:
    """The workaround: one generator per model.

    The chosen expert first reads what it has missed; the router's logits are replaced by the fused ones.
    """

    def __init__(self, folders: dict[str, str], head: str, lam: float, context: int, threads: int | None, entries: dict[str, str]):
        self.routing, self.lam, self.context = Routing.load(Path(head)), lam, context
        router, *experts = (Path(folder) for folder in folders.values())
        self.router = opened(router / "routed", threads, entries)
        self.names = list(folders)[1:]
        self.models = [opened(folder, threads, entries) for folder in experts]

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        router, experts = generator(self.router, self.context), [generator(model, self.context) for model in self.models]
        lags = Experts([text.append_tokens for text in experts])
        tokens, chosen = list[int](), list[str]()

        def step(ids: list[int]) -> int:
            if not tokens:  # later the generator reads its own tokens
                router.append_tokens(np.array(ids, np.int32))
            tokens.extend(ids)
            logits = router.get_logits()
            expert = self.routing.choose(router.get_output("hidden_states")[0, -1])
            lags.catch_up(expert, tokens)
            router.set_logits(self.lam * logits + (1 - self.lam) * experts[expert].get_logits())
            router.generate_next_token()
            chosen.append(self.names[expert])
            return int(router.get_next_tokens()[0])

        return replace(stepwise(prompt, count, step), experts=chosen)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Not measured."""
        raise NotImplementedError


def load(folder: str | dict[str, str], form: str, **settings: Any) -> Genai | Fused:
    """Load one model, or a fused system if there are several folders, the router's first."""
    return Fused(folder, **settings) if isinstance(folder, dict) else Genai(folder, form, **settings)


if __name__ == "__main__":
    main(load, build)
