"""Run a model one decoder block at a time over many texts, and observe the input of each weight matrix."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration import checksummed_file
from fusionroute.runtime.errors import FusionError, InputError, one_line
from fusionroute.runtime.machine import cores

KIND = "file of states"
States = tuple[np.ndarray, ...]
See = Callable[[str, int, np.ndarray], None]


@dataclass(frozen=True)
class Block:
    """A part of a model that runs by itself: a decoder block, a piece of one, or the final norm (`head`, without the
    product of the LM head).

    graph: serialised ONNX without weights; every weight is a graph input. Equal blocks have equal bytes.
    states_in: the graph inputs that take the previous block's `states_out`, in order. The first block takes embedding
    rows, float32 [1, S, H]. A state that is in both passes through and is no output of the graph.
    observed: weight matrix of the model's graph → the state or the output of this graph that is the matrix's input
    [1, S, K].
    channels: weight matrix → K.
    weights: graph input → the name of a weight in the model's graph.

    Other graph inputs have the names of the `ort` dialect. The cache is `past.key` and `past.value`
    [1, KV, capacity, D].
    """

    name: str
    graph: bytes
    states_in: tuple[str, ...]
    states_out: tuple[str, ...]
    observed: Mapping[str, str]
    channels: Mapping[str, int]
    weights: Mapping[str, str]


class BlockwiseForward:
    """Runs a model block by block over calibration texts.

    Each text runs alone on one thread from an empty cache, so nothing is padded. Peak memory: the fp32 weights of one
    block, the states of all texts (float32 [S, H], up to two per text), and the activations of one text per thread.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        texts: Sequence[np.ndarray],
        embed: Callable[[np.ndarray], np.ndarray],
        read: Callable[[str], np.ndarray],
        threads: int | None = None,
        identity: str = "",
    ):
        """Start before the first block.

        `texts` are token ids, integers [S]. `embed` returns their embedding rows, float32 [1, S, H]. `read` returns a
        weight of the model's graph, float32. `identity` stands for the weights: `restore` refuses states of another
        one. `threads` are the texts that run at a time (None: one per core). Raises InputError where there is no text, or where
        one is empty or not a vector of integers.
        """
        if not texts:
            raise InputError("There is no calibration text: expected at least one.")
        for number, text in enumerate(texts):
            if text.ndim != 1 or not len(text) or not np.issubdtype(text.dtype, np.integer):
                raise InputError(
                    f"Calibration text {number} is {text.dtype} {list(text.shape)}: expected a vector of at least one integer token id."
                )
        self.blocks = tuple(blocks)
        self.position = 0
        self.states: list[States] = [(embed(text),) for text in texts]
        self._texts = [text.astype(np.int64) for text in texts]
        self._read, self._threads, self._weights = read, threads or cores(), identity
        self._sessions: dict[bytes, Any] = {}
        self._torn = False  # some states are inputs of the current block, others already its outputs

    @property
    def done(self) -> bool:
        """Whether all blocks have run. `states` then holds one tensor per text, the final hidden states [1, S, H]."""
        return self.position == len(self.blocks)

    @property
    def block(self) -> Block:
        """The block that the next call runs. Raises InputError where all have run."""
        if self.done:
            raise InputError(f"The walk has passed all {len(self.blocks)} blocks: start a new one.")
        return self.blocks[self.position]

    def observe(self, see: See, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Run the current block over all texts without moving on.

        `see(matrix, text, x)` gets each matrix's input, float32 [S, K]. `weights` replaces weights by their names in
        the model's graph; all others come from `read`. Raises InputError for a name that the block does not read,
        FusionError where ONNX Runtime cannot run the block.
        """
        self._run(see, weights, moves=False)

    def advance(self, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Run the current block over all texts and move on: its outputs become the states. Raises as `observe`."""
        self._run(None, weights, moves=True)

    def peek(self, weights: Mapping[str, np.ndarray] = {}) -> list[States]:
        """The states after the current block with these weights, one tuple per text, without moving on.

        Raises as `observe`.
        """
        outputs: list[States] = []
        self._run(None, weights, moves=False, peeked=outputs)
        return outputs

    def move(self, states: Sequence[States]) -> None:
        """Move on to the next block with the states that `peek` returned."""
        self._check_whole()
        self.states, self.position = list(states), self.position + 1

    def step(self, see: See, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Observe and advance in one pass. Raises as `observe`; after an error in the middle only `restore` helps."""
        self._run(see, weights, moves=True)

    def save(self, path: Path, beside: Mapping[str, np.ndarray] = {}) -> None:
        """Write the position, the states and the arrays `beside` them to one file, in one step.

        Names in `beside` must not begin with "states/". Raises InputError where the file cannot be written.
        """
        self._check_whole()
        tensors = {f"states/{text}/{part}": state for text, states in enumerate(self.states) for part, state in enumerate(states)}
        checksummed_file.write(path, KIND, tensors | dict(beside), {"walk": self._identity(), "position": str(self.position)})

    def restore(self, path: Path) -> dict[str, np.ndarray]:
        """Go on from the position and states that `save` wrote; returns the arrays that were written beside them.

        Raises InputError where the file is unreadable or belongs to other blocks, texts or weights; nothing has changed
        then.
        """
        tensors, about = checksummed_file.read(path, KIND)
        if about["walk"] != self._identity():
            raise InputError(f"{path} holds the states of other blocks, texts or weights: remove it and begin again.")
        position = int(about["position"])
        parts = len(self.blocks[position - 1].states_out) if position else 1
        states = [tuple(tensors.pop(f"states/{text}/{part}") for part in range(parts)) for text in range(len(self._texts))]
        self.position, self.states, self._torn = position, states, False
        return tensors

    def _run(self, see: See | None, weights: Mapping[str, np.ndarray], moves: bool, peeked: list[States] | None = None) -> None:
        self._check_whole()
        block = self.block
        if unknown := sorted(set(weights) - set(block.weights.values())):
            raise InputError(f"Block {block.name} does not read '{unknown[0]}': expected some of {', '.join(block.weights.values())}.")
        import onnxruntime  # imported late: it starts threads, and not every import of this module runs a block

        values = {place: weights[name] if name in weights else self._read(name) for place, name in block.weights.items()}
        # an OrtValue on the CPU shares the array's memory and keeps it alive
        weight_feeds = {place: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x, np.float32)) for place, x in values.items()}
        del values
        observed = block.observed.values() if see is not None else ()
        states_out = block.states_out if moves or peeked is not None else ()
        names = [name for name in dict.fromkeys((*observed, *states_out)) if name not in block.states_in]
        session = self._session(block) if names else None

        def run(number: int) -> dict[str, np.ndarray]:
            text, states = self._texts[number], dict(zip(block.states_in, self.states[number], strict=True))
            if session is None:
                return states
            try:
                results = session.run(names, context_feeds(session, text) | weight_feeds | states)
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime cannot run block {block.name} on text {number} of {len(text)} tokens ({one_line(error)}); expected weights of "
                    "the shapes that the model has, and no text longer than the context it was traced for."
                ) from error
            return states | dict(zip(names, results, strict=True))

        self._torn = moves
        for number, outputs in enumerate(in_order(run, len(self._texts), self._threads)):
            if see is not None:
                for matrix, output in block.observed.items():
                    see(matrix, number, outputs[output][0])
            if peeked is not None:
                peeked.append(tuple(outputs[output] for output in block.states_out))
            if moves:
                self.states[number] = tuple(outputs[output] for output in block.states_out)
        self._torn = False
        self.position += moves

    def _session(self, block: Block) -> Any:
        """The ONNX Runtime session of a block's graph; equal blocks share one."""
        import onnxruntime

        if block.graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # failures are raised; nothing is printed
            options.intra_op_num_threads = 1
            options.enable_cpu_mem_arena = False  # an arena keeps memory for the longest text in every session
            try:
                self._sessions[block.graph] = onnxruntime.InferenceSession(block.graph, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load block {block.name} ({one_line(error)}); install a newer onnxruntime."
                ) from error
        return self._sessions[block.graph]

    def _check_whole(self) -> None:
        """Raise InputError where only some states have passed the current block."""
        if self._torn:
            raise InputError(f"The walk was cut off within block {self.block.name}: restore saved states or begin again.")

    def _identity(self) -> str:
        """A digest of blocks, texts and the identity of the weights: saved states fit no others."""
        digest = hashlib.sha256(self._weights.encode())
        for part in (*(block.graph for block in self.blocks), *(text.tobytes() for text in self._texts)):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


def in_order(run: Callable[[int], dict[str, np.ndarray]], count: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """The results of `run` for 0 … count − 1, in this order, computed by several threads that are little ahead."""
    if threads == 1:
        yield from map(run, range(count))
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[dict[str, np.ndarray]]] = deque()
        try:
            for number in range(count):
                ahead.append(pool.submit(run, number))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def context_feeds(session: Any, text: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a block's graph besides states and weights, for a whole text int64 [S] and an empty cache."""
    length = len(text)
    available = {
        "input_ids": text[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logit_positions": np.arange(length),
    }
    feeds: dict[str, np.ndarray] = {}
    for graph_input in session.get_inputs():
        if graph_input.name in available:
            feeds[graph_input.name] = available[graph_input.name]
        elif graph_input.name in ("past.key", "past.value"):
            _, heads, _, size = graph_input.shape
            feeds[graph_input.name] = np.zeros((1, heads, length, size), np.float32)
    return feeds
