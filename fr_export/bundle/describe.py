"""The files beside a bundle's graphs: texts, the fusion graph, and the manifest that describes them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionroute.fr_export.bundle.targets import FUSION_GRAPH
from fusionroute.fr_export.bundle.texts import write_texts
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.fusion_graph import write_fusion_graph
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import FOLDER
from fusionroute.runtime.digests import digest_of
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.manifest import FORMAT, Manifest, Model, Variant


def write_common_files(router: Checkpoint, folder: Path) -> None:
    """Write what all variants share: the fusion graph, and the router's tokenizer and chat templates, if any."""
    (folder / FUSION_GRAPH).parent.mkdir(parents=True, exist_ok=True)
    write_fusion_graph(folder / FUSION_GRAPH)
    write_texts(folder, router)


def describe(
    system: System,
    fusion: FusionSettings,
    graphs: Mapping[str, Graph],
    variants: Sequence[Variant],
    weights: Mapping[str, File],
    folder: Path,
) -> Manifest:
    """The manifest of everything that is in the folder so far.

    `graphs` are the traces of the models in any dialect. `weights` are the entries of weight files, which were hashed
    while they were written.
    """
    router = system.router
    models = [
        Model(name=name, layers=graph.layers, kv_heads=graph.cache[0], head_size=graph.cache[1], parameters=graph.parameters)
        for name, graph in graphs.items()
    ]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return Manifest(
        format=FORMAT,
        family=system.family.name,
        models=models,
        **fusion.model_dump(),
        vocab_size=system.vocab_size,
        max_seq_len=system.max_seq_len,
        bos_token=router.named_tokens.get("bos_token"),
        eos_token=router.named_tokens.get("eos_token"),
        eos_token_ids=router.end_tokens,
        variants=list(variants),
        files={name: weights.get(name) or file_entry(path) for name, path in paths.items()},
    )


def with_file(manifest: Manifest, folder: Path, name: str) -> Manifest:
    """The manifest with the entry of one more file of the folder, or a new entry for a file that has changed."""
    return manifest.model_copy(update={"files": manifest.files | {name: file_entry(folder / name)}})


def file_entry(path: Path) -> File:
    """Size and hashes of a file. Weights in files of their own are named by their SHA-256, so they are not read again."""
    return File(sha256=path.stem, bytes=path.stat().st_size) if path.parent.name == FOLDER else File.of(digest_of(path))
