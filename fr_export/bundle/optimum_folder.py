"""The files that Optimum reads beside a graph, and the routing head, for which such graphs have no output."""

import json
from pathlib import Path

from safetensors.numpy import save

from fusionroute.fr_export.bundle.texts import write_json, write_texts
from fusionroute.fr_export.checkpoints.checkpoint import HEAD_FILE, Checkpoint
from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.checkpoints.system import RoutingHead

PRIVATE = ("_name_or_path",)  # a path on the machine that wrote the checkpoint


def complete(folder: Path, model: Checkpoint, vocab_size: int, head: RoutingHead | None) -> None:
    """Write config.json of the language model with the graph's vocabulary, generation_config.json and the checkpoint's texts.

    A router also gets routing_head.safetensors: routing_head.weight float32 [n_experts, hidden] and routing_head.bias
    float32 [n_experts].
    """
    config = json.loads(model.config.to_json_string()) | {"vocab_size": vocab_size, "use_cache": True}
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in PRIVATE})
    generation = model.file("generation_config.json")
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.end_tokens, "pad_token_id": model.config.pad_token_id}
    write_json(
        folder / "generation_config.json",
        read_json(generation, model.where) if generation else {k: v for k, v in ids.items() if v is not None},
    )
    write_texts(folder, model)
    if head is not None:
        (folder / HEAD_FILE).write_bytes(save({"routing_head.weight": head.weight, "routing_head.bias": head.bias}))
