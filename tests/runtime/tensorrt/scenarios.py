"""Scenarios on a simulated machine: each uses a bundle and returns all results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import FusionInputs
from fusionroute.runtime.tensorrt.answers import Answer
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11]  # three chunks
Scenario = Callable[[FusionRuntime, Machine], list[Any]]


def greedy(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Two texts, the second in the first one's buffers, both with right and wrong guesses."""
    results = [rt.generate(prompt, 14) for prompt in (PROMPT, [30, 2])]
    return [(result.token_ids, result.experts, [round(p, 3) for p in result.logprobs]) for result in results]


def sampled(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Sampling with all options, full rows, pinned experts and models without a say."""
    texts: list[Any] = [list(rt.stream(PROMPT, 6, temperature=2.0, top_p=0.999, repetition_penalty=1.4, seed=1))]
    texts.append(list(rt.stream(PROMPT, 5, temperature=30.0, top_k=3, seed=2)))
    texts.append(list(rt.stream(PROMPT, 4, temperature=30.0, seed=4)))
    with patch("fusionroute.runtime.sampling.DEFAULT_CANDIDATES", 2):  # so few that rows must be fetched
        texts.append(list(rt.stream(PROMPT, 6, temperature=5.0, seed=3)))
    texts.append(list(rt.stream(PROMPT, 5, temperature=3.0, presence_penalty=1.0, logit_bias={3: 2.0}, top_logprobs=2, seed=5)))
    texts += [list(rt.stream(PROMPT, 4, lam=lam, expert="expert1")) for lam in (0.0, 0.5)]
    texts.append(list(rt.stream(PROMPT, 4, lam=1.0)))
    return [[(token.id, token.expert, round(token.logprob, 3)) for token in text] for text in texts]


def stepped(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """One session that is rewound."""
    session = rt.session()
    session.append(PROMPT)
    tokens = [session.step() for _ in range(5)]
    session.rewind(6)
    tokens += [session.step() for _ in range(5)]
    session.rewind(0)
    session.append(PROMPT[:2])
    tokens += [session.step() for _ in range(5)]
    return [(token.id, token.expert) for token in tokens]


def scored(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Teacher forcing, many rows at a time."""
    scores = rt.score([*PROMPT, *PROMPT[::-1]], chunk=CHUNK)
    few = rt.score(PROMPT, positions=[8, 2], chunk=3)
    return [scores.experts.tolist(), np.round(scores.logits, 3).tolist(), np.round(few.logits, 3).tolist()]


def interleaved(rt: FusionRuntime, machine: Machine, count: int = 3) -> list[Any]:
    """Several texts, whose models are all launched before any is waited for, as threads might do."""
    backend = rt.backend
    texts = [list(PROMPT), [30, 2, 5], [17, 4]][:count]
    routers = [backend.router.cache() for _ in texts]
    experts = [[model.cache() for model in backend.experts] for _ in texts]
    fusers = [backend.fuser() for _ in texts]

    def read(cache: Any, text: list[int]) -> Any:
        while True:
            piece = text[cache.length : cache.length + CHUNK]
            output = cache.forward(piece, (len(piece) - 1,))
            if cache.length == len(text):
                return output

    settings, seen = (0.5, 0.5), []
    for step in range(5):
        choices = [(step * 2 + number) % len(backend.experts) for number in range(len(texts))]
        routed = [read(cache, text) for cache, text in zip(routers, texts, strict=True)]
        peeked = [float(output.logits[0, 3]) for output in routed] if step == 2 else []
        answered = [read(caches[choice], text) for caches, choice, text in zip(experts, choices, texts, strict=True)]
        fused = [fuse(FusionInputs(a.logits, b.logits, settings)) for fuse, a, b in zip(fusers, routed, answered, strict=True)]
        for text, result in zip(texts, fused, strict=True):
            text.append(int(result.ids[0, 0]))
        seen += peeked + nested([(o, "logits") for o in (*routed, *answered)] + [(f, "rows") for f in fused], machine)
        seen += nested([(o, "routing") for o in routed], machine)
    return [texts, np.round(seen, 3).tolist()]


def nested(rows: list[tuple[Any, str]], machine: Machine) -> list[float]:
    """Read rows to the host, each while the one before is waited for, as threads might do; values in reverse order."""
    values: list[float] = []

    def read(number: int) -> None:
        if number < len(rows):
            machine.meanwhile = lambda: read(number + 1)
            values.append(float(getattr(*rows[number])[0][0]))

    read(0)
    machine.meanwhile = None
    return values


def given_up(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Interrupt steps while the host waits; then take them again in another way, or drop their session."""
    ids = []
    for number in range(18):
        session = rt.session()
        session.append(PROMPT)
        session.step()
        machine.interrupt = number % 6 + 1
        try:
            for option in range(3):
                session.step(lam=0.3 + 0.1 * option, temperature=1.0 + option, seed=option)
        except KeyboardInterrupt:
            pass
        machine.interrupt = 0
        if number < 6:
            session.rewind(8)
            ids += [session.step(lam=0.9, repetition_penalty=1.5).id for _ in range(3)]
        if number >= 12:
            # they go first, while the caches stay
            session._decoder.step.fuser = session._decoder.step.newest = None  # type: ignore[assignment]
        del session
    return ids


def abandoned(rt: FusionRuntime, machine: Machine) -> list[Any]:
    """Steps that end before the routing is asked for, with all their work queued, and are then taken in another way."""
    session, ids = rt.session(), []
    session.append(PROMPT)
    for number in range(8):
        with patch.object(Answer, "routing", property(lambda answer: stop(answer))), suppress(KeyboardInterrupt):
            session.step(lam=0.1 * number)
        ids.append(session.step(lam=0.1 * number + 0.2, temperature=0.5 + number / 10, top_k=1).id)
    return ids


def stop(answer: Answer) -> None:
    """What Ctrl-C does."""
    if answer._routing is not None:
        raise KeyboardInterrupt


SCENARIOS: dict[str, Scenario] = {
    "greedy": greedy, "sampled": sampled, "stepped": stepped, "scored": scored, "interleaved": interleaved, "given up": given_up, "abandoned": abandoned,
}  # fmt: skip


def play(scenario: Scenario, folder: Path, machine: Machine, expert_memory: int | None = None) -> list[Any]:
    """A scenario's results on a machine."""
    with (
        patch("fusionroute.runtime.limits.CHUNK", CHUNK),
        simulated(machine),
        FusionRuntime.load(folder, device="rtx", expert_memory=expert_memory) as rt,
    ):
        results = scenario(rt, machine)
    del rt  # and with it all memory: nothing refers to it in a circle
    machine.run_out()
    return results
