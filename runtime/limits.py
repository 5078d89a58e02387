"""Constants and arithmetic that several rooms of the runtime share."""

EXPERT, DELTA = "expert.", "delta."  # in a pair's graph, in front of the expert's inputs and outputs, and of its factors
WINDOW = "window."  # in front of the lengths that layers with a sliding window read
CHUNK = 512  # most tokens in one prefill pass: bounds memory, and depends on the tokens alone
FUSED = 1 << 24  # logits fused in one call: 64 MB, of which the fusion graph makes several copies
PIECE = 64  # tokens in one background pass: a chosen expert waits for at most one, and then reads fewer than two more
MAX_ROUND_TOKENS = 8  # tokens that one round of speculation produces at most
SHORTEST_REACH = 128  # keys that attention reads at least; from here on powers of two, so that few graphs are captured


def numbered(number: int, name: str) -> str:
    """What an input or output of the expert's is called for one of several experts."""
    return f"{number}.{name}"


def boundary(start: int) -> int:
    """Where a background pass from `start` on ends: the next multiple of PIECE that leaves it two tokens or more."""
    return ((start + 1) // PIECE + 1) * PIECE


def even(length: int) -> int:
    """The largest even number up to `length`."""
    return length - length % 2


def reach(length: int, capacity: int) -> int:
    """How many keys attention reads for a text of `length` tokens.

    The next power of two from SHORTEST_REACH on, at most the capacity.
    """
    return min(max(SHORTEST_REACH, 1 << (length - 1).bit_length()), capacity)
