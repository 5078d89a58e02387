"""Checkpoints whose config.json has a `quantization_config`: a weight for every module from what stands for it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fusionroute.fr_export.checkpoints.sources import awq, bitsandbytes, compressed_tensors, fp8, gptq
from fusionroute.fr_export.checkpoints.stored_blocks import BlockStored
from fusionroute.fr_export.checkpoints.tensors import SafetensorsTensor, StoredTensor
from fusionroute.runtime.errors import InputError

Parts = Mapping[str, SafetensorsTensor]


class Method(NamedTuple):
    """How a method's checkpoints are read. `parts`: suffix of a stored tensor → what it is.

    `key`: the part that a quantised module has, with the dtype that it has then. `weight` makes the module's weight of
    (where, quantization_config, module, parts).
    """

    title: str
    parts: Mapping[str, str]
    key: Mapping[str, str]
    weight: Callable[[str, Mapping[str, Any], str, Parts], StoredTensor]


FP8 = Method("FP8", fp8.PARTS, {"weight": "F8_E4M3"}, fp8.fp8)
METHODS = {
    "gptq": Method("GPTQ", gptq.PARTS, {"qweight": "I32"}, gptq.gptq),
    "awq": Method("AWQ", awq.PARTS, {"qweight": "I32"}, awq.awq),
    "compressed-tensors": Method(
        "compressed-tensors",
        compressed_tensors.PARTS,
        {"packed": "I32 U8", "weight": "I8 F8_E4M3"},
        compressed_tensors.compressed,
    ),
    "bitsandbytes": Method("bitsandbytes", bitsandbytes.PARTS, {"state": "U8", "weight": "I8"}, bitsandbytes.bitsandbytes),
    "fp8": FP8,
    "fbgemm_fp8": FP8,
}


def dequantised(where: str, settings: Mapping[str, Any], entries: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with a weight for every quantised module; others as they are.

    Raises InputError for a method, or a form of it, that is not read here, and for a module that lacks a part.
    """
    method = method_of(where, settings)
    modules: dict[str, dict[str, SafetensorsTensor]] = {}
    owner: dict[str, str] = {}  # stored tensor → the module that it is a part of
    for name, entry in entries.items():
        suffix = next((suffix for suffix in sorted(method.parts, key=len, reverse=True) if name.endswith(f".{suffix}")), None)
        if suffix is not None and isinstance(entry, SafetensorsTensor):
            owner[name] = name.removesuffix(f".{suffix}")
            modules.setdefault(owner[name], {})[method.parts[suffix]] = entry
    quantised = {
        module: parts
        for module, parts in modules.items()
        if any(key in parts and parts[key].dtype in dtypes.split() for key, dtypes in method.key.items())
    }
    result = {name: entry for name, entry in entries.items() if owner.get(name) not in quantised}
    for module, parts in quantised.items():
        try:
            result[f"{module}.weight"] = method.weight(where, settings, module, parts)
        except KeyError as error:
            raise InputError(f"{where} lacks the {error.args[0]} of '{module}': download it again.") from error
    return result


def method_of(where: str, settings: Mapping[str, Any]) -> Method:
    """The method that the settings name. Raises InputError for one that is not read here."""
    name = settings.get("quant_method")
    if name not in METHODS:
        raise InputError(
            f"{where} is quantised by {name!r}; read are {', '.join(METHODS)}: export from the fp32, fp16 or bf16 checkpoint it was made from."
        )
    return METHODS[name]


def note(settings: Mapping[str, Any], entries: Mapping[str, StoredTensor]) -> str:
    """What was done to the tensors that `dequantised` has made, a sentence for the report."""
    title = METHODS[settings["quant_method"]].title
    made = [entry for entry in entries.values() if not isinstance(entry, SafetensorsTensor)]
    blocks = sum(isinstance(entry, BlockStored) and entry.layout is not None for entry in made)
    text = f"it was quantised already ({title}, {len(made)} matrices) and is dequantised to fp32 while it is read"
    return f"{text}; int4 or int8 for ort:cpu takes over {blocks} matrices as they are" if blocks else text
