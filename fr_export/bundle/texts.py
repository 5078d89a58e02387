"""The texts that a bundle and its folders for Optimum have of a checkpoint: tokenizer, special tokens, chat templates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.runtime.chat import DEFAULT
from fusionroute.runtime.prompt import CHAT_TEMPLATE, MORE_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG


def write_texts(folder: Path, model: Checkpoint) -> None:
    """Write what there is, as transformers 4 and 5 read it."""
    tokenizer = model.tokenizer_files
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer.content)
        write_json(folder / TOKENIZER_CONFIG, {**tokenizer.config, **model.named_tokens})
    for name, template in model.chat_templates.items():
        file = folder / CHAT_TEMPLATE if name == DEFAULT else folder / MORE_TEMPLATES / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
