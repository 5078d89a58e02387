"""The traces of a system: one per architecture and dialect, made when somebody first asks for it."""

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.dialects import Dialect, ort
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.trace import architecture, trace


class Traces:
    """The graphs of a system's models, by dialect. Equal architectures share a graph: clone it to change it."""

    def __init__(self, system: System, stages: Stages):
        self._system, self._stages = system, stages
        self._by_dialect: dict[Dialect, dict[str, Graph]] = {}

    def of(self, dialect: Dialect = ort) -> dict[str, Graph]:
        """Model name → its graph. Raises FusionError where an architecture cannot be traced."""
        if dialect not in self._by_dialect:
            self._by_dialect[dialect] = self._trace_all(dialect)
        return self._by_dialect[dialect]

    def _trace_all(self, dialect: Dialect) -> dict[str, Graph]:
        system = self._system
        keys = {model.name: architecture(model.config, system.vocab_size) for model in system.models}
        graphs: dict[str, Graph] = {}
        count = len(set(keys.values()))
        with self._stages.stage(f"tracing {count} architecture(s)", count) as advance:
            for model in system.models:
                if keys[model.name] not in graphs:
                    graphs[keys[model.name]] = trace(model.family, model.config, system.vocab_size, system.max_seq_len, dialect)
                    advance(1)
        return {name: graphs[key] for name, key in keys.items()}
