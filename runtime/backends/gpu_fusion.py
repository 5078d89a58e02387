"""The fusion graph on an NVIDIA GPU: logits stay on the device, candidates come back, the full row only where it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, FusionInputs
from fusionroute.runtime.backends.device_buffers import Inputs, Place, Rows
from fusionroute.runtime.errors import FusionError, one_line


class BoundFusion:
    """The fusion graph bound for K positions, k candidates and P penalised ids."""

    def __init__(self, session: Any, place: Place, shape: tuple[int, int, int], rows: Any):
        count, k, penalised = shape
        self.binding = session.io_binding()
        self.inputs = Inputs(
            place,
            {
                "coefficients": ((2,), np.float32),
                "penalty": ((), np.float32),
                "temperature": ((), np.float32),
                "k": ((1,), np.int64),
                "penalty_ids": ((count, penalised), np.int64),
            },
        )
        self.inputs.bind(self.binding)
        self.bound: dict[str, int] = {}  # addresses of logits on the device
        self.kept: dict[str, np.ndarray] = {}  # logits that came from the host, for as long as they are bound
        self.rows = rows
        found: dict[str, np.ndarray] = {
            "candidate_ids": np.empty((count, k), np.int64),
            "candidate_logits": np.empty((count, k), np.float32),
            "unpenalised": np.empty((count, k), np.float32),
            "log_normaliser": np.empty(count, np.float32),
            "sampling_normaliser": np.empty(count, np.float32),
        }
        for name, array in found.items():
            self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.binding.bind_output("fused", place.memory, 0, np.float32, rows.shape(), int(rows.data_ptr()))
        self.fused = GpuFused(found, rows)


class GpuFused:
    """See `backend.Fused`; `rows` are copied from the device when they are asked for."""

    def __init__(self, found: dict[str, np.ndarray], rows: Any):
        self.ids, self.logits, self.unpenalised = found["candidate_ids"], found["candidate_logits"], found["unpenalised"]
        self.log_normaliser, self.sampling_normaliser = found["log_normaliser"], found["sampling_normaliser"]
        self._rows = rows

    @property
    def rows(self) -> np.ndarray:
        """Fused and penalised logits, float32 [K, V]."""
        return np.asarray(self._rows.numpy())


class GpuFuser:
    """The fusion graph with one session's buffers (see `backend.Fuser`)."""

    def __init__(self, session: Any, place: Place, vocab: int):
        self._session, self._place, self._vocab = session, place, vocab
        self._plans: dict[tuple[int, int, int], BoundFusion] = {}
        self._row = place.buffer((1, vocab), np.float32)

    def __call__(self, inputs: FusionInputs) -> Any:
        """A GpuFused, see `backend.Fuser`. `router` and `expert` are a model's `Rows`, or float32 [K, V] on the host."""
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        if not len(penalty_ids):
            penalty_ids, penalty = np.zeros(1, np.int64), 1.0  # changes nothing, and no tensor is empty
        plan = self._plan((len(router), k, 1 << (len(penalty_ids) - 1).bit_length()))  # powers of two: few shapes
        arrays = plan.inputs.arrays
        for name, value in (("coefficients", coefficients), ("penalty", penalty), ("temperature", temperature), ("k", k)):
            arrays[name][...] = value
        arrays["penalty_ids"][:, : len(penalty_ids)] = penalty_ids
        arrays["penalty_ids"][:, len(penalty_ids) :] = penalty_ids[-1]  # an id may stand twice
        plan.inputs.send()
        self._bind(plan, "router_logits", router)
        self._bind(plan, "expert_logits", expert)
        try:
            self._session.run_with_iobinding(plan.binding)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime failed on the fusion graph: {one_line(error)}") from error
        return plan.fused

    def row(self, fused: Fused) -> np.ndarray:
        """See `backend.Fuser.row`."""
        row: np.ndarray = fused.rows[0].copy()
        return row

    def _plan(self, shape: tuple[int, int, int]) -> BoundFusion:
        """The buffers of a shape. Those of one row, which decoding needs, are kept; those of scoring serve once."""
        if shape in self._plans:
            return self._plans[shape]
        rows = self._row if shape[0] == 1 else self._place.buffer((shape[0], self._vocab), np.float32)
        plan = BoundFusion(self._session, self._place, shape, rows)
        if shape[0] == 1:
            self._plans[shape] = plan
        return plan

    def _bind(self, plan: BoundFusion, name: str, rows: Any) -> None:
        """Bind logits where they are, if the fusion runs there too; others are copied now."""
        if isinstance(rows, Rows) and rows.memory == self._place.memory and self._place.holds(name):
            if plan.bound.get(name) != rows.address:
                plan.binding.bind_input(name, self._place.memory, 0, np.float32, (1, self._vocab), rows.address)
                plan.bound[name] = rows.address
            return
        array = plan.kept[name] = np.ascontiguousarray(rows, np.float32)
        plan.binding.bind_cpu_input(name, array)
        plan.binding.synchronize_inputs()
        plan.bound.pop(name, None)
