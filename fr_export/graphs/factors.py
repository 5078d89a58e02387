"""The inputs of a pair's graph with what an expert adds to its matrices."""

from dataclasses import dataclass

LOOKUP = ".lookup"  # behind an embedding's name: its head, which may be tied to it, has factors of its own


@dataclass(frozen=True)
class Factors:
    """The inputs with what an expert adds to the matrices that read one value x, by their names.

    a: float32 [K, m·r] for m matrices, of which each takes r columns, in their order. b: matrix [N, K] → its input
    float32 [r, N]. The matrix's product gains x·a·b. An embedding [K, N] stands under its name and LOOKUP: its tokens
    are looked up in a.
    """

    a: str
    b: dict[str, str]
