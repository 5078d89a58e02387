"""Final hidden states in place of logits: a head of its own makes logits of those that are needed, and only of them."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from fusionroute.runtime.errors import FusionError, one_line


class Head:
    """The session of the head: `hidden` float32 [1, R, H] → `logits` float32 [1, R, V]."""

    def __init__(self, session: Any, vocab: int):
        self.session, self.vocab = session, vocab
        self.seconds = 0.0  # that its runs have taken
        shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        self.width = shapes["hidden"][2] if shapes.keys() == {"hidden", "logits"} and shapes["logits"][2] == vocab else 0

    def run(self, binding: Any) -> None:
        """One pass over what is bound. Raises FusionError where it fails."""
        begun = perf_counter()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise FusionError(f"ONNX Runtime failed on the head: {one_line(error)}") from error
        self.seconds += perf_counter() - begun


class BoundHead:
    """Buffers for the head, bound once for each number of rows in a row."""

    def __init__(self, head: Head):
        self._head = head
        self._binding = head.session.io_binding()
        self._states = np.empty((0, head.width), np.float32)
        self._logits = np.empty((0, head.vocab), np.float32)
        self._count = 0

    def states(self, count: int) -> np.ndarray:
        """Where the hidden states of the next run are to be written, float32 [count, H]."""
        if count != self._count:
            if count > len(self._states):
                self._states = np.empty((count, self._head.width), np.float32)
                self._logits = np.empty((count, self._head.vocab), np.float32)
            self._count = 0  # until both are bound
            self._binding.bind_input("hidden", "cpu", 0, np.float32, (1, count, self._head.width), self._states.ctypes.data)
            self._binding.bind_output("logits", "cpu", 0, np.float32, (1, count, self._head.vocab), self._logits.ctypes.data)
            self._count = count
        return self._states[:count]

    def logits(self) -> np.ndarray:
        """Their logits, float32 [count, V]; the next call overwrites them."""
        self._head.run(self._binding)
        return self._logits[: self._count]


class HiddenRows:
    """Hidden states [K, H] where others have logits [K, V]: NumPy sees the logits, and the head runs when it looks.

    Every model that shares the head has such rows: a fusion may mix them before the head.
    """

    def __init__(self, states: np.ndarray, head: Head):
        self.states, self.head = states, head

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | np.ndarray) -> HiddenRows:
        return HiddenRows(self.states[rows], self.head)

    def __setitem__(self, rows: slice, other: HiddenRows) -> None:
        self.states[rows] = other.states

    def room(self, count: int) -> HiddenRows:
        """Room for `count` rows."""
        return HiddenRows(np.empty((count, self.head.width), np.float32), self.head)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        bound = BoundHead(self.head)
        bound.states(len(self))[:] = self.states
        return np.asarray(bound.logits(), dtype)
