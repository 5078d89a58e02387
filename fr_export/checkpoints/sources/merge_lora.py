"""A LoRA adapter over the tensors of its base: which tensors of the adapted model are made from what."""

from collections.abc import Mapping

from fusionroute.fr_export.checkpoints.sources.lora import LoraAdapter, ModuleAdapter
from fusionroute.fr_export.checkpoints.sources.low_rank import (
    AddedTensor,
    ColumnNormTensor,
    LowRankTensor,
    ReplacedRowsTensor,
    RowNormTensor,
    TransposedTensor,
)
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE
from fusionroute.runtime.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
RESIZABLE = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
ROWS = "token_adapter.trainable_tokens_delta"
TRAINED_ON = "name the base that it was trained on"


def merge(adapter: LoraAdapter, base: Mapping[str, StoredTensor], tied: bool) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of the adapted model, and whether its head is still tied to its embedding. No values are read.

    `tied`: whether the base's is. Raises InputError where adapter and base do not belong together.
    """
    embedding, head = RESIZABLE
    tensors = dict(base)
    for name, tensor in adapter.whole.items():
        if name not in base and not (tied and name == head):
            raise InputError(f"{adapter.where} brings the tensor '{name}', which its base lacks: {TRAINED_ON}.")
        if not adapter.config.saves(module_of(name)):
            tensors[name] = tensor
    if tied:  # a head of its own, until the end shows that nothing parts the two
        tensors[head] = tensors[embedding]
    tensors |= {name: tensor for name, tensor in adapter.whole.items() if adapter.config.saves(module_of(name))}
    if tied and adapter.config.ensure_weight_tying and adapter.config.saves(EMBEDDING):
        tensors[head] = tensors[embedding]
    check_shapes(adapter, tensors, base)
    for module, own in adapter.modules.items():
        adapt(adapter, module, own, tensors)
    if tied and EMBEDDING in adapter.modules and ROWS in adapter.modules[EMBEDDING].parts and HEAD not in adapter.modules:
        tensors[head] = tensors[embedding]  # PEFT ties replaced rows too
    if tied and tensors[head] is tensors[embedding]:
        del tensors[head]
        return tensors, True
    return tensors, False


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def check_shapes(adapter: LoraAdapter, tensors: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor]) -> None:
    """Whole tensors have their base's shape; embedding and head may have other rows, and then both have as many.

    Raises InputError where they do not.
    """
    for name in adapter.whole:
        shape, expected = tensors[name].shape, base[name if name in base else RESIZABLE[0]].shape
        if shape != expected and not (name in RESIZABLE and shape[1:] == expected[1:]):
            raise InputError(f"{adapter.where} has '{name}' of shape {list(shape)}; its base has {list(expected)}: {TRAINED_ON}.")
    rows = {name: tensors[name].shape[0] for name in RESIZABLE if name in tensors}
    if len(set(rows.values())) > 1:
        raise InputError(
            f"{adapter.where} resizes {' and '.join(f'{name} to {count}' for name, count in rows.items())} rows; expected as many in both: "
            "save the adapter again with save_embedding_layers=True."
        )


def adapt(adapter: LoraAdapter, module: str, own: ModuleAdapter, tensors: dict[str, StoredTensor]) -> None:
    """Put one module's parts over its weight and bias in `tensors`. Raises InputError for parts that do not fit."""
    name, bias, parts = f"{module}.weight", f"{module}.bias", own.parts
    if name not in tensors:
        raise InputError(f"{adapter.where} adapts '{module}', which its base lacks: {TRAINED_ON}.")
    embeds = "lora_embedding_A" in parts
    factors = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    adapted = any(part in parts for part in factors)
    expected = {*factors} if adapted else set()
    if adapter.config.use_dora and adapted:
        expected.add("lora_magnitude_vector")
    optional = {ROWS} | ({"lora_B.bias"} if adapted and not embeds else set())
    if wrong := sorted((parts.keys() - optional) ^ expected):
        state = "lacks" if wrong[0] in expected else "has more than it needs, namely"
        raise InputError(f"{adapter.where} {state} the {wrong[0]} of '{module}'; save or download the adapter again.")
    weight = tensors[name]
    if adapted:
        a, b = (parts[part] for part in factors)
        rows_first = (TransposedTensor(b), TransposedTensor(a)) if embeds else (a, b)  # PEFT stores an embedding's factors transposed
        weight = low_rank_tensor(adapter, module, own, weight, *rows_first)
    if "lora_magnitude_vector" in parts:
        magnitude = vector(adapter, module, parts, "lora_magnitude_vector", weight.shape[1 if embeds else 0])
        weight = ColumnNormTensor(weight, magnitude) if embeds else RowNormTensor(weight, magnitude)
    if "lora_B.bias" in parts:
        if bias not in tensors:
            raise InputError(
                f"{adapter.where} adds a bias to '{module}' (lora_bias), which has none in its base: train it without lora_bias."
            )
        delta = vector(adapter, module, parts, "lora_B.bias", weight.shape[0])
        tensors[bias] = AddedTensor(tensors[bias], delta, own.scale)
    if ROWS in parts:
        weight = replaced_rows(adapter, module, weight, parts[ROWS])
    tensors[name] = weight


def low_rank_tensor(
    adapter: LoraAdapter, module: str, own: ModuleAdapter, base: StoredTensor, a: StoredTensor, b: StoredTensor
) -> LowRankTensor:
    """base + scale · B·A. Raises InputError unless B·A has the base's shape and the config's rank."""
    rank = own.rank
    if len(base.shape) != 2 or a.shape != (rank, base.shape[1]) or b.shape != (base.shape[0], rank):
        raise InputError(
            f"{adapter.where} has factors of shapes {list(b.shape)} and {list(a.shape)} for '{module}'; rank {rank} of its {CONFIG_FILE} "
            f"and its base's {list(base.shape)} need {[base.shape[0], rank]} and {[rank, *base.shape[1:]]}: {TRAINED_ON}."
        )
    return LowRankTensor(base, a, b, own.scale)


def vector(adapter: LoraAdapter, module: str, parts: Mapping[str, StoredTensor], part: str, length: int) -> StoredTensor:
    """A part of a module's adapter. Raises InputError unless it is a vector of this length."""
    if parts[part].shape != (length,):
        raise InputError(
            f"{adapter.where} has the {part} of '{module}' in shape {list(parts[part].shape)}; its base needs [{length}]: {TRAINED_ON}."
        )
    return parts[part]


def replaced_rows(adapter: LoraAdapter, module: str, base: StoredTensor, rows: StoredTensor) -> ReplacedRowsTensor:
    """The base with the rows of trainable_token_indices replaced. Raises InputError where they do not fit it."""
    ids = adapter.config.tokens(module)
    if rows.shape != (len(ids), *base.shape[1:]) or (ids and not 0 <= min(ids) <= max(ids) < base.shape[0]):
        raise InputError(
            f"{adapter.where} has rows of shape {list(rows.shape)} for the {len(ids)} trainable_token_indices of '{module}' "
            f"{list(base.shape)}: save or download the adapter again."
        )
    return ReplacedRowsTensor(base, rows, ids)
