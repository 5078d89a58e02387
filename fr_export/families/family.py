"""What a model family has to say about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import InputError

TINY_SYSTEMS = Path(__file__).parents[1] / "tiny"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length of the text


@dataclass(frozen=True)
class Preset:
    """A named set of checkpoints: local folders or hub ids. `router` is None where nobody has published one."""

    router: str | None
    experts: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One model family: everything that is peculiar to it and that no other module may know.

    `norm_offset` is added to every RMSNorm weight (Gemma stores w where the norm multiplies by 1 + w).
    `wide_residual`: the residual stream of real checkpoints leaves fp16's range (65,504); half-precision graphs keep it in fp32.
    `half`: the half precision of its activations on GPUs.
    `precisions` maps a target to the precisions exported when none is named.
    `check` raises `InputError` for a config of the family that the exporter cannot serve.
    """

    name: str
    model_type: str
    norm_offset: float
    half: str
    paper: Preset
    precisions: Mapping[str, tuple[str, ...]]
    check: Callable[[str, Any], None]
    wide_residual: bool = False

    def preset(self, name: str) -> Preset:
        """The preset `tiny` (the trained system that ships with the package) or `paper` (the paper's hub ids)."""
        if name == "paper":
            return self.paper
        if name == "tiny":
            root = TINY_SYSTEMS / self.name
            experts = {expert: str(root / "experts" / expert) for expert in ("math", "code", "instruction")}
            return Preset(str(root / "router"), experts)
        raise InputError(f"Unknown preset '{name}' of family {self.name}: use 'tiny' or 'paper'.")


def check_rope(where: str, config: Any) -> None:
    """Refuse rotary scalings whose frequencies change with the length: they do not fit a precomputed table."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise InputError(
            f"{where} scales its rotary embedding by '{kind}', which depends on the length of the text; "
            f"supported are {', '.join(STATIC_ROPE)}: set rope_parameters in its config.json to one of them."
        )
