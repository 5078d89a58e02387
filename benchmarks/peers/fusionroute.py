"""This project's runtime: the router alone, or the fused system."""

from pathlib import Path

import numpy as np

from benchmarks.peers.worker import Generation, main
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench.run import generate


class FusionRoute:
    """One precision of a bundle: the whole system if `fused`, else the router alone (no expert runs at λ = 1)."""

    def __init__(self, folder: str, precision: str, context: int, threads: int, fused: bool = False):
        self.runtime = FusionRuntime.load(folder, precision, "cpu", threads=threads, lam=None if fused else 1.0)
        self.session = self.runtime.session()

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        run = generate(self.session, prompt, count)
        return Generation(run.first, sum(run.seconds), self.session.token_ids[len(prompt) :], run.experts)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`."""
        return self.runtime.score(ids).logits


if __name__ == "__main__":
    main(lambda folder, form, **rest: FusionRoute(str(Path(folder)), form, **rest))
