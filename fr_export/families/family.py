"""What distinguishes a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import InputError

TINY_SYSTEMS = Path(__file__).parents[1] / "tiny"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length of the text
LONGROPE = "longrope"  # its frequencies are those of short texts up to the original length
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Preset:
    """A named set of checkpoints: local folders or hub ids. `router` is None where nobody has published one."""

    router: str | None
    experts: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One model family: everything specific to it, which no other module may know.

    `norm_offset` is added to every RMSNorm weight (Gemma stores w where the norm multiplies by 1 + w).
    `wide_residual`: the residual stream of real checkpoints leaves fp16's range (65,504); half-precision graphs keep it
    in fp32. `wide_scores`: products of queries and keys are so large that half precision rounds away what tells keys
    apart; attention in primitive operators has them in fp32. `half`: the half precision of its activations on GPUs.
    `precisions` maps a target to the precisions exported when none is named. `paper`: the paper's checkpoints; None where
    it has none of this family.
    `text_of`: model types of larger models, of which the language model (their `text_config`) is one of this family.
    `check` raises `InputError` for a config of the family that the exporter cannot serve.
    """

    name: str
    model_type: str
    norm_offset: float
    half: str
    precisions: Mapping[str, tuple[str, ...]]
    check: Callable[[str, Any], None]
    paper: Preset | None = None
    wide_residual: bool = False
    wide_scores: bool = False
    text_of: tuple[str, ...] = ()

    @property
    def ships_tiny(self) -> bool:
        """Whether a trained system of this family ships with the package."""
        return (TINY_SYSTEMS / self.name / "router").is_dir()

    def preset(self, name: str) -> Preset:
        """The preset `tiny` (the trained system that ships with the package), `tiny-shared` (another one, of LoRA
        adapters of one base) or `paper` (the paper's hub ids).

        Raises InputError for another name, and where the family has no such preset.
        """
        shipped = {"tiny": TINY_SYSTEMS / self.name, "tiny-shared": TINY_SYSTEMS / f"{self.name}-shared"}
        if name not in (*shipped, "paper"):
            raise InputError(f"Unknown preset '{name}' of family {self.name}: use 'tiny', 'tiny-shared' or 'paper'.")
        if name == "paper" and self.paper is not None:
            return self.paper
        if name in shipped and (router := shipped[name] / "router").is_dir():
            experts = {expert: str(shipped[name] / "experts" / expert) for expert in ("math", "code", "instruction")}
            return Preset(str(router), experts)
        lack = "The paper has no system" if name == "paper" else "The package ships no trained system"
        raise InputError(f"{lack} of family {self.name}: name a router and experts with --router and --expert.")


def rotary_kinds(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of a config's rotary embeddings: one set, or one for each kind of layer. transformers 4 calls them
    `rope_scaling` and has none where nothing is scaled.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [each for each in parameters.values() if isinstance(each, Mapping)] or [parameters]


def rope_type(parameters: Mapping[str, Any]) -> str:
    """How frequencies are scaled, under its new or its old key."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def check_rope(where: str, config: Any) -> None:
    """Refuse rotary scalings whose frequencies change with the length: they do not fit a precomputed table."""
    for parameters in rotary_kinds(config):
        if (kind := rope_type(parameters)) not in (*STATIC_ROPE, LONGROPE):
            raise InputError(
                f"{where} scales its rotary embedding by '{kind}', which depends on the length of the text; supported are "
                f"{', '.join(STATIC_ROPE)} and {LONGROPE}: set rope_parameters in its config.json to one of them."
            )


def positions(config: Any) -> int:
    """How many positions a table can hold: longrope has other frequencies for texts beyond the original length."""
    limits = [int(config.max_position_embeddings)]
    for parameters in rotary_kinds(config):
        original = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if rope_type(parameters) == LONGROPE and original:
            limits.append(int(original))
    return min(limits)


def check_windows(where: str, config: Any) -> None:
    """Refuse kinds of layers that attend to anything but all earlier tokens or the last few of them, and windows without
    a length.
    """
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if unserved := [kind for kind in kinds if kind not in LAYER_KINDS]:
        raise InputError(
            f"{where} has layers of type {unserved[0]!r}; expected {' or '.join(LAYER_KINDS)} in the 'layer_types' of its config.json."
        )
    window = getattr(config, "sliding_window", None)
    if (window is not None and window < 1) or (window is None and "sliding_attention" in kinds):
        raise InputError(
            f"{where} has a 'sliding_window' of {window} in its config.json: set it to a positive number of tokens, or to null where no layer slides."
        )


def check_attention(where: str, config: Any) -> None:
    """All that most families ask of a config: static rotary frequencies, and layers of full or sliding attention."""
    check_rope(where, config)
    check_windows(where, config)
