"""What the GPU is compared with: the same bundle in fp32 on the CPU backend, over fixed texts.

Computed once per bundle.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.gpu_check.outcome import Skipped
from fusionroute.calibration.prompts import HELD_OUT
from fusionroute.fr_export.verify.compare import LONGEST, TOKENS
from fusionroute.fr_export.verify.torch_reference import Reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.text import Text

PROMPTS, PROMPT_TOKENS = 4, 24
NEW_TOKENS = 48  # length of each generated text


class Greedy(NamedTuple):
    """A greedy text: its tokens and the expert of each."""

    ids: list[int]
    experts: list[str]


class Expected(NamedTuple):
    """The CPU's greedy text of a prompt: its tokens, and the lead in logits of each over the second-best token."""

    ids: list[int]
    leads: list[float]


def generate_greedily(runtime: FusionRuntime, prompt: Sequence[int]) -> Greedy:
    """NEW_TOKENS tokens; an end-of-text token does not end the text."""
    session = runtime.session()
    session.append(prompt)
    tokens = [session.step() for _ in range(NEW_TOKENS)]
    return Greedy([token.id for token in tokens], [token.expert for token in tokens])


def prompts(folder: Path) -> list[list[int]]:
    """PROMPTS prompts as token ids."""
    return passages(folder, min(PROMPT_TOKENS, Manifest.read(folder).max_seq_len - NEW_TOKENS))[:PROMPTS]


@cache
def passages(folder: Path, length: int) -> list[list[int]]:
    """The held-out texts, joined and cut into `length` tokens each; random ids if the bundle has no tokenizer."""
    manifest = Manifest.read(folder)
    if "tokenizer.json" in manifest.files:
        tokenizer = Text.load(folder / "tokenizer.json")
        ids = [id for text in HELD_OUT for id in tokenizer.encode(text)][:TOKENS]
    else:
        ids = [int(id) for id in np.random.default_rng(0).integers(0, manifest.vocab_size, TOKENS)]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


@cache
def references(folder: Path) -> tuple[list[list[int]], list[Reference]]:
    """Texts, and the CPU's logits, routing and experts at each of their positions."""
    texts = passages(folder, min(LONGEST, Manifest.read(folder).max_seq_len))
    with cpu_runtime(folder) as runtime:
        scores = [runtime.score(ids) for ids in texts]
    return texts, [Reference(score.logits, score.routing, score.experts) for score in scores]


@cache
def greedy_texts(folder: Path) -> list[Expected]:
    """The CPU's greedy text of each prompt."""
    texts = []
    with cpu_runtime(folder) as runtime:
        for prompt in prompts(folder):
            ids = generate_greedily(runtime, prompt).ids
            logits = runtime.score([*prompt, *ids], range(len(prompt) - 1, len(prompt) + len(ids) - 1), chunk=1).logits
            best_two = np.partition(logits, -2, axis=-1)[:, -2:]
            texts.append(Expected(ids, [float(lead) for lead in best_two[:, 1] - best_two[:, 0]]))
    return texts


def cpu_runtime(folder: Path) -> FusionRuntime:
    """The bundle in fp32 on the CPU. Raises Skipped where it has no such variant."""
    try:
        Bundle.open(folder).variant("ort:cpu", "fp32")
    except UnavailableError as error:
        raise Skipped(
            "the bundle has no fp32 for the CPU to be held against: export it with --target ort,tensorrt --precision fp32,…"
        ) from error
    return FusionRuntime.load(folder, "fp32", "cpu")
