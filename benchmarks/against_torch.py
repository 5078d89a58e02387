"""A system exported, and compared with plain torch in fp32 over more text than an export's own comparison reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fusionroute.fr_export import export as exporter
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.verify.torch_reference import Reference, reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Manifest


def export_uncompared(request: exporter.Request, stages: Stages) -> dict[str, Any]:
    """Export without the comparison that usually ends an export; returns the report."""
    with patch.object(exporter, "REFERENCE_LIMIT", 0):
        return exporter.export(request, stages)


def torch_references(system: System, bundle: Path, texts: Sequence[Sequence[int]], stages: Stages) -> list[Reference]:
    """Logits and routing of every position of the texts, fused as the bundle fuses."""
    manifest = Manifest.read(bundle)
    coefficients = FusionRuntime.coefficients(manifest.fusion, manifest.lam)
    with stages.stage("reference in torch", len(system.models)) as advance:
        references: list[Reference] = reference(system, texts, coefficients, advance)
    return references
