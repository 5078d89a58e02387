"""Checks of an exported fp32 bundle against plain torch (full prefix, all models, no cache)."""

from pathlib import Path

import numpy as np

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.verify.torch_reference import Reference, reference
from fusionroute.runtime import FusionRuntime

TOLERANCE = 2e-5  # of the largest |logit|


def check_parity(bundle: Path, system: System, ids: list[int], prompt: int) -> None:
    """Scores in chunks and token by token, 64 greedy tokens after the first `prompt` ids, and rewinds."""
    (expected,) = reference(system, [ids], (0.5, 0.5))
    bound = float(TOLERANCE * np.abs(expected.logits).max())
    with FusionRuntime.load(bundle, precision="fp32") as runtime:
        error = 0.0
        for chunk in (512, 37, 1):
            scores = runtime.score(ids, chunk=chunk)
            error = max(error, float(np.abs(scores.logits - expected.logits).max()))
            assert error <= bound
            assert np.abs(scores.routing - expected.routing).max() <= TOLERANCE * np.abs(expected.routing).max()
            assert (scores.experts == expected.experts)[margins(expected.routing) > 10 * bound].all()
        print(f"largest difference {error:.2g}, {error / bound * TOLERANCE:.1e} of the largest |logit|")
        check_greedy(runtime, system, ids[:prompt], error)
        check_rewind(runtime, ids, expected, error)


def check_greedy(runtime: FusionRuntime, system: System, prompt: list[int], error: float) -> None:
    """64 greedy tokens and experts are the reference's argmax wherever its margin is over 10 times the error."""
    session = runtime.session()
    session.append(prompt)
    tokens = [session.step() for _ in range(64)]
    (expected,) = reference(system, [[*prompt, *(token.id for token in tokens)]], (0.5, 0.5))
    logits, routing = (rows[len(prompt) - 1 : len(prompt) + 63] for rows in (expected.logits, expected.routing))
    chosen = np.array([token.id for token in tokens])
    experts = np.array([runtime.expert_names.index(token.expert) for token in tokens])
    clear, decided = margins(logits) > 10 * error, margins(routing) > 10 * error
    assert clear.mean() > 0.9, "too few clear margins: the comparison would prove nothing"
    assert (chosen == logits.argmax(-1))[clear].all()
    assert (experts == routing.argmax(-1))[decided].all()
    print(f"too close to call: {64 - int(clear.sum())} of 64 tokens, {64 - int(decided.sum())} of 64 routings")
    exact = logits.astype(np.float64)
    logprobs = exact[np.arange(64), chosen] - np.log(np.exp(exact - exact.max()).sum(-1)) - exact.max()
    assert np.allclose([token.logprob for token in tokens], logprobs, atol=1e-3)


def check_rewind(runtime: FusionRuntime, ids: list[int], expected: Reference, error: float) -> None:
    """Steps after rewinds, over experts that lag, are those of a fresh session."""
    session = runtime.session()
    right = 4 * len(ids) // 5  # so many tokens at the start of the session are those of `ids`
    session.append(ids[:right])
    for length in (right - 20, right // 4, right - 21, len(ids) - 10, len(ids) - 11):
        session.step()
        session.append(ids[:9])  # tokens that the rewind drops: no cache may keep them
        session.step()
        session.rewind(min(length, right))
        session.append(ids[len(session) : length])
        right = length
        row = expected.logits[length - 1]
        chosen = session.step().id
        assert chosen == row.argmax() or margins(row[None])[0] <= 10 * error
        assert len(session) == length + 1


def margins(rows: np.ndarray) -> np.ndarray:
    """Gap between the largest and the second largest value of each row; infinite for rows of one value."""
    if rows.shape[-1] == 1:
        return np.full(len(rows), np.inf)
    top = np.partition(rows, -2, axis=-1)
    return np.asarray(top[:, -1] - top[:, -2])
