"""The fusion graph on an NVIDIA GPU: logits stay on the device, candidates and, where read, a full row come back."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, Fuser, FusionInputs
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
        self.addresses: dict[str, int] = {}  # of the logits bound on the device
        self.host_rows: dict[str, np.ndarray] = {}  # logits copied from the host, kept alive while they are bound
        self.rows = rows
        outputs: dict[str, np.ndarray] = {
            "candidate_ids": np.empty((count, k), np.int64),
            "candidate_logits": np.empty((count, k), np.float32),
            "unpenalised": np.empty((count, k), np.float32),
            "log_normaliser": np.empty(count, np.float32),
            "sampling_normaliser": np.empty(count, np.float32),
        }
        for name, array in outputs.items():
            self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.binding.bind_output("fused", place.memory, 0, np.float32, rows.shape(), int(rows.data_ptr()))
        self.fused = GpuFused(outputs, rows)


class GpuFused:
    """See `runtime.backend.Fused`; `rows` are copied from the device when they are read."""

    def __init__(self, outputs: dict[str, np.ndarray], rows: Any):
        self.ids, self.logits, self.unpenalised = outputs["candidate_ids"], outputs["candidate_logits"], outputs["unpenalised"]
        self.log_normaliser, self.sampling_normaliser = outputs["log_normaliser"], outputs["sampling_normaliser"]
        self._rows = rows

    @property
    def rows(self) -> np.ndarray:
        """Fused and penalised logits, float32 [K, V]."""
        return np.asarray(self._rows.numpy())


class GpuFuser(Fuser):
    """The fusion graph with one session's buffers (see `runtime.backend.Fuser`)."""

    def __init__(self, session: Any, place: Place, vocab: int):
        self._session, self._place, self._vocab = session, place, vocab
        self._bindings: dict[tuple[int, int, int], BoundFusion] = {}
        self._row = place.buffer((1, vocab), np.float32)

    def __call__(self, inputs: FusionInputs) -> Any:
        """A GpuFused, see `runtime.backend.Fuser`.

        `router` and `expert` are a model's `Rows`, or float32 [K, V] on the host.
        """
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        if not len(penalty_ids):
            penalty_ids, penalty = np.zeros(1, np.int64), 1.0  # no penalty; no tensor may be empty
        bound = self._bound((len(router), k, 1 << (len(penalty_ids) - 1).bit_length()))  # powers of two: few shapes
        arrays = bound.inputs.arrays
        for name, value in (("coefficients", coefficients), ("penalty", penalty), ("temperature", temperature), ("k", k)):
            arrays[name][...] = value
        arrays["penalty_ids"][:, : len(penalty_ids)] = penalty_ids
        arrays["penalty_ids"][:, len(penalty_ids) :] = penalty_ids[-1]  # to repeat an id changes nothing
        bound.inputs.send()
        self._bind(bound, "router_logits", router)
        self._bind(bound, "expert_logits", expert)
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise FusionError(f"ONNX Runtime failed on the fusion graph: {one_line(error)}") from error
        return bound.fused

    def row(self, fused: Fused) -> np.ndarray:
        """See `runtime.backend.Fuser.row`."""
        row: np.ndarray = fused.rows[0].copy()
        return row

    def _bound(self, shape: tuple[int, int, int]) -> BoundFusion:
        """The binding for a shape. Decoding's, of one row, is used again; scoring's serves once."""
        if shape in self._bindings:
            return self._bindings[shape]
        rows = self._row if shape[0] == 1 else self._place.buffer((shape[0], self._vocab), np.float32)
        bound = BoundFusion(self._session, self._place, shape, rows)
        if shape[0] == 1:
            self._bindings[shape] = bound
        return bound

    def _bind(self, bound: BoundFusion, name: str, rows: Any) -> None:
        """Bind logits in place where the fusion runs on their device; others are copied now."""
        if isinstance(rows, Rows) and rows.memory == self._place.memory and self._place.holds(name):
            if bound.addresses.get(name) != rows.address:
                bound.binding.bind_input(name, self._place.memory, 0, np.float32, (1, self._vocab), rows.address)
                bound.addresses[name] = rows.address
            return
        array = bound.host_rows[name] = np.ascontiguousarray(rows, np.float32)
        bound.binding.bind_cpu_input(name, array)
        bound.binding.synchronize_inputs()
        bound.addresses.pop(name, None)
