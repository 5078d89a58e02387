"""The fusion graph on ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, Fuser, FusionInputs
from fusionroute.runtime.backends.greedy_fusion import GreedyFuser
from fusionroute.runtime.errors import FusionError, one_line


class OrtFuser(Fuser):
    """The fusion graph with bound buffers, bound again when shapes change.

    One candidate without a penalty goes to GreedyFuser instead.
    """

    def __init__(self, session: Any, vocab: int):
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._vocab = vocab
        self._shape = (0, 0)
        self._arrays: dict[str, np.ndarray] = {
            "coefficients": np.zeros(2, np.float32),
            "penalty": np.ones((), np.float32),
            "temperature": np.ones((), np.float32),
            "k": np.zeros(1, np.int64),
        }
        for name, array in self._arrays.items():
            self._bind(name, array)
        self._penalty_ids = np.zeros((0, 0), np.int64)
        self._addresses: dict[str, int] = {}
        self._single = GreedyFuser(vocab)

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def __call__(self, inputs: FusionInputs) -> Fused:
        """See `runtime.backend.Fuser`. `router` and `expert` are float32 [K, V]."""
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        count = len(router)
        if k == count == 1 and not len(penalty_ids):
            return self._single(router, expert, coefficients, temperature)
        arrays = self._arrays
        arrays["coefficients"][:] = coefficients
        arrays["penalty"][()], arrays["temperature"][()], arrays["k"][0] = penalty, temperature, k
        self._rows = (router, expert)  # bound by address: keep them alive until the run is over
        for name, array in (("router_logits", router), ("expert_logits", expert)):
            address = array.ctypes.data
            if self._addresses.get(name) != address or self._shape[0] != count:
                self._bind(name, array)
                self._addresses[name] = address
        if len(penalty_ids) or self._penalty_ids.shape != (count, 0):
            self._penalty_ids = np.ascontiguousarray(np.broadcast_to(penalty_ids, (count, len(penalty_ids))))
            self._bind("penalty_ids", self._penalty_ids)
        if self._shape != (count, k):
            self._allocate(count, k)
        try:
            self._run(self._binding)
        except Exception as error:
            raise FusionError(f"ONNX Runtime failed on the fusion graph: {one_line(error)}") from error
        return self._fused

    def row(self, fused: Fused) -> np.ndarray:
        """See `runtime.backend.Fuser.row`. Not copied: the next fusion writes into new buffers."""
        self._shape = (0, 0)
        self._single.hand_over()
        row: np.ndarray = fused.rows[0]
        return row

    def _allocate(self, count: int, k: int) -> None:
        self._fused = Fused(
            ids=np.empty((count, k), np.int64),
            logits=np.empty((count, k), np.float32),
            unpenalised=np.empty((count, k), np.float32),
            log_normaliser=np.empty(count, np.float32),
            sampling_normaliser=np.empty(count, np.float32),
            rows=np.empty((count, self._vocab), np.float32),
        )
        names = ("candidate_ids", "candidate_logits", "unpenalised", "log_normaliser", "sampling_normaliser", "fused")
        for name, array in zip(names, self._fused, strict=True):
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._shape = (count, k)
