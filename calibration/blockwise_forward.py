"""Run a model one part at a time over many texts, and observe the input of each weight matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration import checksummed_file
from fusionroute.calibration.block import Block
from fusionroute.calibration.context_feeds import context_feeds
from fusionroute.calibration.in_order import in_order
from fusionroute.calibration.text_runs import gathered
from fusionroute.runtime.errors import FusionError, InputError, one_line
from fusionroute.runtime.machine import cores

KIND = "file of states"
TOGETHER = 2048  # tokens of several texts that a product reads at a time: it is twice as fast on 500 as on 50
States = tuple[np.ndarray, ...]
See = Callable[[str, int, np.ndarray], None]
Multiply = Callable[[np.ndarray, np.ndarray], np.ndarray]


def multiply(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x [S, K] · matrixᵀ [K, out], float32."""
    product: np.ndarray = x @ matrix.T
    return product


class BlockwiseForward:
    """Runs a model block by block over calibration texts.

    Each text runs alone on one thread from an empty cache, so nothing is padded. Peak memory: the fp32 weights of one
    block, the states of all texts (float32 [S, H], up to two per text), the products of TOGETHER tokens, and the
    activations of one text per thread.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        texts: Sequence[np.ndarray],
        embed: Callable[[np.ndarray], np.ndarray],
        read: Callable[[str], np.ndarray],
        threads: int | None = None,
        identity: str = "",
        multiply: Multiply = multiply,
    ):
        """Start before the first block.

        `texts` are token ids, integers [S]. `embed` returns their embedding rows, float32 [1, S, H]. `read` returns a
        weight of the model's graph, float32. `identity` stands for the weights: `restore` refuses states of another
        one. `threads` are the texts that run at a time (None: one per core). `multiply` computes the blocks' `products`.
        Raises InputError where there is no text, or where one is empty or not a vector of integers.
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
        rows = embed(np.concatenate(texts))  # together: most ids come in several texts
        self.states: list[States] = [(part,) for part in np.split(rows, np.cumsum([len(text) for text in texts[:-1]]), axis=1)]
        self._texts = [text.astype(np.int64) for text in texts]
        self._read, self._threads, self._weights, self._multiply = read, threads or cores(), identity, multiply
        self._sessions: dict[bytes, tuple[Any, list[Any]]] = {}
        self._own: tuple[int, dict[str, np.ndarray]] = (0, {})  # weights that were read, and for the block at which position
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

    def peek(self, weights: Mapping[str, np.ndarray] = {}, states: Sequence[States] | None = None) -> list[States]:
        """The states after the current block with these weights, one tuple per text, without moving on.

        `states` stand for the walk's own in front of the block. Raises as `observe`.
        """
        outputs: list[States] = []
        own = self.states
        self.states = own if states is None else list(states)
        try:
            self._run(None, weights, moves=False, peeked=outputs)
        finally:
            self.states = own
        return outputs

    def move(self, states: Sequence[States]) -> None:
        """Move on to the next block with the states that `peek` returned."""
        self._check_whole()
        self.states, self.position = list(states), self.position + 1

    def step(self, see: See, weights: Mapping[str, np.ndarray] = {}, see_cache: See | None = None) -> None:
        """Observe and advance in one pass. `see_cache(cache, text, x)` gets the keys or values of each cache, float32
        [S, KV·D]. Raises as `observe`; after an error in the middle only `restore` helps.
        """
        self._run(see, weights, moves=True, see_cache=see_cache)

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

    def _run(
        self, see: See | None, weights: Mapping[str, np.ndarray], moves: bool, peeked: list[States] | None = None,
        see_cache: See | None = None,
    ) -> None:  # fmt: skip
        self._check_whole()
        block = self.block
        if unknown := sorted(set(weights) - set(block.reads)):
            raise InputError(f"Block {block.name} does not read '{unknown[0]}': expected some of {', '.join(block.reads)}.")
        observed = block.observed.values() if see is not None else ()
        states_out = block.states_out if moves or peeked is not None else ()
        caches = block.caches if see_cache is not None else {}
        names = [name for name in dict.fromkeys((*observed, *states_out, *caches.values())) if name not in block.states_in]
        results = self._results(names, weights) if names else (self._states(number) for number in range(len(self._texts)))
        self._torn = moves
        for number, outputs in enumerate(results):
            if see is not None:
                for matrix, output in block.observed.items():
                    see(matrix, number, outputs[output][0])
            if see_cache is not None:
                for cache, output in caches.items():
                    rows = outputs[output][0].swapaxes(0, 1)  # [S, KV, D]
                    see_cache(cache, number, rows.reshape(len(rows), -1))
            if peeked is not None:
                peeked.append(tuple(outputs[output] for output in block.states_out))
            if moves:
                self.states[number] = tuple(outputs[output] for output in block.states_out)
        self._torn = False
        self.position += moves

    def _results(self, names: list[str], weights: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The named outputs of the block beside its states, for one text after the other."""
        import onnxruntime  # imported late: it starts threads, and not every import of this module runs a block

        block = self.block
        inner = [name for name in names if name not in block.products]
        session, inputs = self._session(block) if inner else (None, [])  # a block may be products alone
        # an OrtValue on the CPU shares the array's memory and keeps it alive
        fed = {place: onnxruntime.OrtValue.ortvalue_from_numpy(self._weight(name, weights)) for place, name in block.weights.items()}

        def run(number: int, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            text = self._texts[number]
            try:
                results = session.run(inner, context_feeds(inputs, text) | fed | given) if session else []
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime cannot run block {block.name} on text {number} of {len(text)} tokens ({one_line(error)}); expected weights of "
                    "the shapes that the model has, and no text longer than the context it was traced for."
                ) from error
            return given | dict(zip(inner, results, strict=True))

        every = range(len(self._texts))
        for numbers in gathered([len(text) for text in self._texts], TOGETHER) if block.products else [every]:
            given = self._multiplied(numbers, weights)
            yield from in_order([partial(run, number, own) for number, own in zip(numbers, given, strict=True)], self._threads)

    def _multiplied(self, numbers: Sequence[int], weights: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """The states of some texts with the block's products of them."""
        given = [self._states(number) for number in numbers]
        cuts = np.cumsum([len(self._texts[number]) for number in numbers])[:-1]
        joined = {
            state: np.concatenate([own[state][0] for own in given])
            for state in {self.block.observed[m] for m in self.block.products.values()}
        }
        for place, matrix in self.block.products.items():
            product = self._multiply(joined[self.block.observed[matrix]], self._weight(matrix, weights))
            for own, part in zip(given, np.split(product, cuts), strict=True):
                own[place] = part[None]
        return given

    def _states(self, number: int) -> dict[str, np.ndarray]:
        return dict(zip(self.block.states_in, self.states[number], strict=True))

    def _weight(self, name: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """A weight of the current block. It is read once for the block, and not at all where `weights` replaces it."""
        if name in weights:
            return np.ascontiguousarray(weights[name], np.float32)
        if self._own[0] != self.position:
            self._own = (self.position, {})
        own = self._own[1]
        if name not in own:
            own[name] = np.ascontiguousarray(self._read(name), np.float32)
        return own[name]

    def _session(self, block: Block) -> tuple[Any, list[Any]]:
        """The ONNX Runtime session of a block's graph, and its inputs; equal blocks share one."""
        import onnxruntime

        if block.graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # failures are raised; nothing is printed
            options.intra_op_num_threads = 1
            options.enable_cpu_mem_arena = False  # an arena keeps memory for the longest text in every session
            try:
                session = onnxruntime.InferenceSession(block.graph, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load block {block.name} ({one_line(error)}); install a newer onnxruntime."
                ) from error
            self._sessions[block.graph] = session, session.get_inputs()
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
