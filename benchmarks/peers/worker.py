"""A peer as a process: each line of JSON on stdin is a request, answered by one line on stdout.

| request | answer |
|---|---|
| `{"do": "load", …}` with the arguments of the module's `load` | `{}` |
| `{"do": "generate", "prompt": [ids], "count": n}` | the fields of `Generation` |
| `{"do": "loss", "texts": [[ids], …]}` | sum of the loss in `nats`, and the `count` of tokens |
| `{"do": "memory"}` | `peak`: peak resident memory so far, bytes |

`python -m benchmarks.peers.NAME build CHECKPOINT FORMAT OUT` builds a model instead.
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
class Generation:
    """A greedy text: seconds to the `first` token and for the `rest`, the tokens, and their experts if it is fused."""

    first: float
    rest: float
    tokens: list[int]
    experts: list[str] = field(default_factory=list)


class Model(Protocol):
    """What a peer loads."""

    def generate(self, prompt: list[int], count: int) -> Generation:
        """Choose `count` tokens greedily; an end-of-text token does not end the text."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [S, V]."""


def stepwise(prompt: list[int], count: int, step: Callable[[list[int]], int]) -> Generation:
    """Generate and time a text token by token.

    `step` appends ids to what the model has read and returns the likeliest next token.
    """
    start = time.perf_counter()
    tokens = [step(prompt)]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(step(tokens[-1:]))
    return Generation(first - start, time.perf_counter() - first, tokens)


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
    """Peak resident memory of this process, bytes."""
    # read by hand: the environments of other runtimes have neither this package nor psutil
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(load: Callable[..., Model], build: Callable[[Path, str, Path], None] | None = None) -> None:
    """Build a model if the command line asks for it; otherwise serve requests until stdin ends."""
    if sys.argv[1:2] == ["build"] and build is not None:
        checkpoint, form, out = sys.argv[2:]
        build(Path(checkpoint), form, Path(out))
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
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
        except Exception as error:  # the comparison reports the peer that failed and goes on with the others
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
