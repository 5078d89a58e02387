"""A system exported, and compared with plain torch in fp32 over more text than an export's own comparison reads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.verify import measure
from fusionroute.fr_export.verify.compare import compare
from fusionroute.fr_export.verify.torch_reference import Reference, reference
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.options import fusion_coefficients


def export_uncompared(request: Request, stages: Stages) -> dict[str, Any]:
    """Export without the comparison that usually ends an export; returns the report."""
    with patch.object(measure, "REFERENCE_LIMIT", 0):
        return export(request, stages)


def torch_references(system: System, bundle: Path, texts: Sequence[Sequence[int]], stages: Stages) -> list[Reference]:
    """Logits and routing of every position of the texts, fused as the bundle fuses."""
    manifest = Manifest.read(bundle)
    coefficients = fusion_coefficients(manifest.fusion, manifest.lam)
    with stages.stage("reference in torch", len(system.models)) as advance:
        references: list[Reference] = reference(system, texts, coefficients, advance)
    return references


def compare_both(
    bundle: str,
    precision: str,
    texts: Sequence[Sequence[int]],
    references: Sequence[Reference],
    advance: Callable[[float], None],
    decoded: int,
) -> dict[str, Any]:
    """The figures of `compare`: "chunks" of all texts, and "decode" of the first texts of `decoded` tokens in all, every
    token of which is read alone.
    """
    chunks = compare(bundle, precision, texts, references, advance, 0)
    count = next((count for count in range(1, len(texts)) if sum(map(len, texts[:count])) >= decoded), len(texts))
    first = texts[:count]
    return chunks | {"decode": compare(bundle, precision, first, references[:count], lambda _: None, sum(map(len, first)))["decode"]}
