"""What a change within a decoder block does to what the block passes on: the measure of what rounding there costs.

On SmolLM2 the mean KL divergence of the model's output is 1.2 to 2.5 times this number for nearly every product of every layer.
"""

from collections.abc import Sequence

import numpy as np

from fusionroute.calibration.blockwise_forward import States


def residual_stream(states: Sequence[States]) -> np.ndarray:
    """The residual stream float32 [tokens, H] of all texts: what a block passes on may be several tensors, whose sum it is."""
    return np.concatenate([np.sum(parts, axis=0)[0] for parts in states])


def residual_error(changed: Sequence[States], exact: np.ndarray) -> float:
    """Mean squared change of the residual stream, relative to its squared size at each token. `exact` float32 [tokens, H]."""
    return float((np.square(residual_stream(changed) - exact).sum(-1) / np.square(exact).sum(-1)).mean())


def sample(texts: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Texts from all over the set, of together about so many tokens."""
    step = max(1, sum(map(len, texts)) // tokens)
    return list(texts[::step])
