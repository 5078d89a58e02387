"""A peer as a process: requests come as lines of JSON on stdin, and each gets one line on stdout.

| request | answer |
|---|---|
| `{"do": "load", …}` with the arguments of the module's `load` | `{}` |
| `{"do": "generate", "prompt": [ids], "count": n}` | seconds to the `first` token and of the `rest`, the `tokens`, and what the model adds |
| `{"do": "loss", "texts": [[ids], …]}` | `nats` in all and the `count` of tokens that they are spread over |
| `{"do": "memory"}` | `peak`: the most resident memory so far, bytes |

`python -m peers.NAME build CHECKPOINT FORMAT OUT` makes a model instead.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass
class Text:
    """A greedy text: seconds to the first token, seconds of all later ones, the tokens; of a fused one the expert of each token."""

    first: float
    rest: float
    tokens: list[int]
    experts: list[str] = field(default_factory=list)


class Model(Protocol):
    """What a peer loads."""

    def generate(self, prompt: list[int], count: int) -> Text:
        """Choose `count` tokens greedily, whether or not the text would end before."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [S, V]."""


def stepwise(prompt: list[int], count: int, step: Callable[[list[int]], int]) -> Text:
    """Time a model that is driven token by token: `step` reads ids behind what it has read, and returns the likeliest next one."""
    start = time.perf_counter()
    tokens = [step(prompt)]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(step(tokens[-1:]))
    return Text(first - start, time.perf_counter() - first, tokens)


def loss(model: Model, texts: list[list[int]]) -> dict[str, float]:
    """Negative log-likelihood of every token but the first of each text, nats."""
    nats, count = 0.0, 0
    for ids in texts:
        logits = model.logits(ids)[:-1].astype(np.float64)
        top = logits.max(-1)
        chosen = logits[np.arange(len(logits)), ids[1:]]
        nats += float((top + np.log(np.exp(logits - top[:, None]).sum(-1)) - chosen).sum())
        count += len(logits)
    return {"nats": nats, "count": count}


def peak() -> int:
    """The most resident memory that this process has had, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(load: Callable[..., Model], build: Callable[[Path, str, Path], None] | None = None) -> None:
    """Build a model where the command line says so; else serve until stdin ends."""
    if sys.argv[1:2] == ["build"] and build is not None:
        checkpoint, form, out = sys.argv[2:]
        build(Path(checkpoint), form, Path(out))
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do, answer = request.pop("do"), dict[str, Any]()
        try:
            if do == "load":
                model = load(**request)
            elif do == "memory":
                answer = {"peak": peak()}
            elif model is None:
                raise RuntimeError("no model is loaded")
            else:
                answer = asdict(model.generate(**request)) if do == "generate" else loss(model, **request)
        except Exception as error:  # the driver says which peer failed, and goes on with the others
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
