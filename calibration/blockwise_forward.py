"""Run a model one decoder block at a time over many texts, to see what enters each of its weight matrices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration import checksummed_file
from fusionroute.runtime.errors import FusionError, InputError, one_line

KIND = "file of states"
States = tuple[np.ndarray, ...]
See = Callable[[str, int, np.ndarray], None]


@dataclass(frozen=True)
class Block:
    """One decoder block, or the final norm (`head`; the product of the LM head is not run).

    `graph` is serialised ONNX without weights: every weight is a graph input. Equal blocks have equal bytes.
    `states_in` are the graph inputs taken from the previous block's `states_out`, in order; the first block takes embedding rows [1, S, H].
    `observed` maps a weight matrix of the model's graph to the graph output that is its product's input [1, S, K], `channels` to K.
    `weights` maps a graph input to the weight of the model's graph that it takes.
    Other graph inputs are named as the `ort` dialect names them, with `past.key` and `past.value` [1, KV, capacity, D] for the cache.
    """

    name: str
    graph: bytes
    states_in: tuple[str, ...]
    states_out: tuple[str, ...]
    observed: Mapping[str, str]
    channels: Mapping[str, int]
    weights: Mapping[str, str]


class Walk:
    """A model on its way through calibration texts. Each text runs alone from an empty cache, so nothing is padded.

    Peak memory is one block's fp32 weights, the states of all texts (float32 [S, H], up to two a text) and one text's activations.
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
        """`texts` are token ids, integers [S]. `embed` gives their rows, float32 [1, S, H]; `read` a weight of the model's graph, float32.

        `identity` stands for the weights: states that were saved under another one are not taken up.
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
        self.states: list[States] = [(embed(text),) for text in texts]
        self._texts = [text.astype(np.int64) for text in texts]
        self._read, self._threads, self._weights = read, threads, identity
        self._sessions: dict[bytes, Any] = {}
        self._torn = False  # some texts' states are the current block's inputs, others' its outputs

    @property
    def done(self) -> bool:
        """Whether every block was passed: `states` then holds one tensor a text, the final hidden states [1, S, H]."""
        return self.position == len(self.blocks)

    @property
    def block(self) -> Block:
        """The block that the next call runs. Raises InputError where the walk is done."""
        if self.done:
            raise InputError(f"The walk has passed all {len(self.blocks)} blocks: start a new one.")
        return self.blocks[self.position]

    def observe(self, see: See, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Run the current block over all texts and stay: `see(matrix, text, x)` gets what enters each matrix, float32 [S, K].

        The weights come from `weights` where it names them (by their names in the model's graph), else from `read`.
        Raises InputError for a name that the block does not read, FusionError where ONNX Runtime cannot run it.
        """
        self._run(see, weights, moves=False)

    def advance(self, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Run the current block over all texts; its outputs become the states, and the next block the current one. Raises as `observe`."""
        self._run(None, weights, moves=True)

    def peek(self, weights: Mapping[str, np.ndarray] = {}) -> list[States]:
        """What the current block would make of the states with these weights; the walk stays. Raises as `observe`."""
        passed: list[States] = []
        self._run(None, weights, moves=False, passed=passed)
        return passed

    def step(self, see: See, weights: Mapping[str, np.ndarray] = {}) -> None:
        """Observe and advance in one pass. Raises as `observe`; after an error in the middle only `restore` leads on."""
        self._run(see, weights, moves=True)

    def save(self, path: Path, beside: Mapping[str, np.ndarray] = {}) -> None:
        """Write the position, the states and other arrays `beside` them, in one step. Raises InputError where they cannot be written.

        The names of the others must not begin with "states/".
        """
        self._check_whole()
        tensors = {f"states/{text}/{part}": state for text, states in enumerate(self.states) for part, state in enumerate(states)}
        checksummed_file.write(path, KIND, tensors | dict(beside), {"walk": self._identity(), "position": str(self.position)})

    def restore(self, path: Path) -> dict[str, np.ndarray]:
        """Take up the position and states that `save` wrote; returns what was written beside them.

        Raises InputError where they are of other blocks, texts or weights, or unreadable; the walk then stays as it was.
        """
        tensors, about = checksummed_file.read(path, KIND)
        if about["walk"] != self._identity():
            raise InputError(f"{path} holds the states of other blocks, texts or weights: remove it and begin again.")
        position = int(about["position"])
        parts = len(self.blocks[position - 1].states_out) if position else 1
        states = [tuple(tensors.pop(f"states/{text}/{part}") for part in range(parts)) for text in range(len(self._texts))]
        self.position, self.states, self._torn = position, states, False
        return tensors

    def _run(self, see: See | None, weights: Mapping[str, np.ndarray], moves: bool, passed: list[States] | None = None) -> None:
        self._check_whole()
        block = self.block
        if unknown := sorted(set(weights) - set(block.weights.values())):
            raise InputError(f"Block {block.name} does not read '{unknown[0]}': expected some of {', '.join(block.weights.values())}.")
        import onnxruntime  # here: it starts threads, and not every import of this module runs a block

        session = self._session(block)
        values = {given: weights[name] if name in weights else self._read(name) for given, name in block.weights.items()}
        # an OrtValue on the CPU is the array's own memory, which it keeps alive
        held = {given: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x, np.float32)) for given, x in values.items()}
        del values
        outputs = list(
            dict.fromkeys(
                (*(block.observed.values() if see is not None else ()), *(block.states_out if moves or passed is not None else ()))
            )
        )
        self._torn = moves
        for number, text in enumerate(self._texts):
            feeds = context(session, text) | held | dict(zip(block.states_in, self.states[number], strict=True))
            try:
                found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime cannot run block {block.name} on text {number} of {len(text)} tokens ({one_line(error)}); expected weights of "
                    "the shapes that the model has, and no text longer than the context it was traced for."
                ) from error
            if see is not None:
                for matrix, output in block.observed.items():
                    see(matrix, number, found[output][0])
            if passed is not None:
                passed.append(tuple(found[output] for output in block.states_out))
            if moves:
                self.states[number] = tuple(found[output] for output in block.states_out)
        self._torn = False
        self.position += moves

    def _session(self, block: Block) -> Any:
        """The session of a block's graph, which equal blocks share."""
        import onnxruntime

        if block.graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # failures are raised; nothing is printed
            options.intra_op_num_threads = self._threads or len(os.sched_getaffinity(0))
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others compute between two runs
            options.enable_cpu_mem_arena = False  # an arena would keep room for the longest text in every session
            try:
                self._sessions[block.graph] = onnxruntime.InferenceSession(block.graph, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime has no public base class for its errors
                raise FusionError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load block {block.name} ({one_line(error)}); install a newer onnxruntime."
                ) from error
        return self._sessions[block.graph]

    def _check_whole(self) -> None:
        """Refuse to go on from states of which only some have passed the current block."""
        if self._torn:
            raise InputError(f"The walk was cut off within block {self.block.name}: restore saved states or begin again.")

    def _identity(self) -> str:
        """A digest of blocks, texts and what the weights are called: states fit no others."""
        digest = hashlib.sha256(self._weights.encode())
        for part in (*(block.graph for block in self.blocks), *(text.tobytes() for text in self._texts)):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


def context(session: Any, text: np.ndarray) -> dict[str, np.ndarray]:
    """What a block's graph may want besides states and weights, for a whole text int64 [S] and an empty cache."""
    length = len(text)
    known = {
        "input_ids": text[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logit_positions": np.arange(length),
    }
    feeds: dict[str, np.ndarray] = {}
    for wanted in session.get_inputs():
        if wanted.name in known:
            feeds[wanted.name] = known[wanted.name]
        elif wanted.name in ("past.key", "past.value"):
            _, heads, _, size = wanted.shape
            feeds[wanted.name] = np.zeros((1, heads, length, size), np.float32)
    return feeds
