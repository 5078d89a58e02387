"""A system whose models compute with other matrices: what calibration learned of it, and what such a system loses."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from fusionroute.calibration.prompts import load_parts
from fusionroute.fr_export.bundle.describe import describe, write_common_files
from fusionroute.fr_export.bundle.recording import calibration_table
from fusionroute.fr_export.bundle.variant import VariantWriter
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import delta_of
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.factors import LOOKUP
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.approximation import Change, ChangedExpert
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence, evidence
from fusionroute.fr_export.precision.fit_model import fit_model
from fusionroute.fr_export.precision.read_back import read_back
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, draw_many
from fusionroute.fr_export.verify import torch_reference
from fusionroute.fr_export.verify.compare import sequences
from fusionroute.fr_export.verify.metrics import differences, summarise
from fusionroute.runtime.options import fusion_coefficients

CONTEXT = 1024  # tokens

Matrices = Mapping[str, np.ndarray]  # matrix of the graph → float32 [N, K]; an embedding under its name and LOOKUP


class Laboratory:
    """A system, what calibration learned of it, and the measurement of its rows."""

    def __init__(self, system: System, out: Path, tokens: int, stages: Stages):
        self.system, self.out, self.stages = system, out, stages
        self.traces = Traces(system, stages)
        self.graphs: Mapping[str, Graph] = self.traces.of()
        prompts = load_parts("builtin")
        settings = FusionSettings.read(system.router.folder)
        saved = out / "calibration.safetensors"
        source = str(saved) if saved.exists() else "builtin"
        table = calibration_table(system, {}, self.traces, settings, source, prompts.calibration, out, stages)
        table.save(saved)
        self.evidence: Mapping[str, Evidence] = evidence(table)
        self.texts = sequences(system, prompts.held_out, tokens)
        self.coefficients = fusion_coefficients(settings.fusion, settings.lam)
        self.untied: Traces | None = None
        with stages.stage("reference in torch", len(system.models)) as advance:
            self.references = torch_reference.reference(system, self.texts, self.coefficients, advance)

    def rounded(self, model: Checkpoint, precision: str) -> tuple[Matrices, float]:
        """A model's matrices as the int8 or int4 of a bundle reads them, and their bits per weight."""
        with TemporaryDirectory(dir=self.out) as folder, self.stages.stage(f"rounding {model.name} to {precision}"):
            graph, own, _ = fit_model(
                model, ort, SCHEMES["ort:cpu"][precision], self.traces, self.evidence, Store(Path(folder)), SharedMatrices(), lambda _: None
            )
            bind(graph, model.weights, own, Store(Path(folder)), lambda _: None)
            shapes = self.graphs[model.name].model.graph.initializers
            names = [name for name, source in graph.sources.items() if source.tensors and len(shapes[name].shape) == 2]
            return {name: read_back(graph, name, model.weights) for name in names}, own.bits

    def changes(self, expert: Checkpoint, base: Matrices, calibrated: bool) -> Iterator[Change]:
        """What an expert's matrices have changed by, from a rounded base."""
        delta = delta_of(self.system.router, expert, approximate=True)
        texts = self.evidence[expert.name].texts if calibrated else ()
        return ChangedExpert.of(self.graphs[expert.name], expert.weights, texts, delta).changes(lambda name: base[name])

    def measured(self, name: str, matrices: Mapping[str, Matrices], questions: int) -> dict[str, Any]:
        """KL, perplexity and routing of a row, and its accuracy on `questions` of each task. matrices: of each model."""
        with self.stages.stage(f"measuring {name}", len(self.system.models)) as advance:
            load = self.loader(matrices)
            with patch.object(torch_reference, "load", load):
                scores = torch_reference.reference(self.system, self.texts, self.coefficients, advance)
        parts = [differences(s.logits, s.experts, r, ids) for s, r, ids in zip(scores, self.references, self.texts, strict=True)]
        figures: dict[str, Any] = summarise(parts)
        return figures | ({"accuracy": self.accuracy(load, questions)} if questions else {})

    def loader(self, matrices: Mapping[str, Matrices]) -> Callable[[Checkpoint], Any]:
        """Models as torch runs them, with other matrices."""

        def load(model: Checkpoint) -> Any:
            instance, graph = torch_model(model), self.graphs[model.name]
            parameters = instance.state_dict()
            tied = model.config.tie_word_embeddings
            for name, values in matrices.get(model.name, {}).items():
                lookup = name.endswith(LOOKUP)
                source = graph.sources[name.removesuffix(LOOKUP)]
                rows = torch.from_numpy(values.T if lookup else values)
                for tensor, part in zip(source.tensors, rows.split([model.weights.shape(t)[0] for t in source.tensors]), strict=True):
                    if tied and "embed_tokens" in tensor and not lookup and name + LOOKUP in matrices[model.name]:
                        instance.lm_head.weight = torch.nn.Parameter(part.clone())  # a tied head has factors of its own
                    else:
                        parameters[tensor].copy_(part)
            return instance

        return load

    def accuracy(self, load: Callable[[Checkpoint], Any], questions: int) -> float:
        """Mean exact match of the fused system over the embedded systems' tasks, as an fp32 bundle answers them."""
        with TemporaryDirectory(dir=self.out) as scratch:
            bundle, folders = Path(scratch) / "bundle", {model.name: Path(scratch) / model.name for model in self.system.models}
            for model in self.system.models:
                self.write(model, load(model), folders[model.name])
            experts = {expert.name: str(folders[expert.name]) for expert in self.system.experts}
            system = System.open(None, str(folders["router"]), experts, max_seq_len=CONTEXT)
            self.untied = self.untied or Traces(system, self.stages)  # all rows have one architecture
            variant, _ = VariantWriter(system, self.untied, {}, bundle, self.stages).write("ort:cpu", SCHEMES["ort:cpu"]["fp32"])
            write_common_files(system.router, bundle)
            describe(system, FusionSettings.read(self.system.router.folder), self.untied.of(), [variant], {}, bundle).write(bundle)
            drawn = {domain: draw_many(domain, "test", questions, 0) for domain in ALL_DOMAINS}
            results = evaluate(bundle, "fp32", ["fused"], drawn, jobs=1)["fused"]
        return float(np.mean([own.accuracy for own in results.values()]))

    def write(self, model: Checkpoint, instance: Any, folder: Path) -> None:
        """A checkpoint of a model, whose head is not tied to the embedding."""
        folder.mkdir()
        for file in model.folder.iterdir():
            if file.suffix != ".safetensors" and file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"tie_word_embeddings": False}, default=str))
        state = {name: value.contiguous().clone() for name, value in instance.state_dict().items()}
        if model is self.system.router:
            state |= {f"routing_head.{kind}": torch.from_numpy(getattr(self.system.head, kind)) for kind in ("weight", "bias")}
        save_file(state, folder / "model.safetensors")
