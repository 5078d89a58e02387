"""How the two models' logits are fused: as the command line, the router's fusion.json or the default says."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import Fusion
from fusionroute.runtime.options import fusion_coefficients

FILE = "fusion.json"


class FusionSettings(BaseModel):
    """Mode and λ. `lam_curve` holds (λ, accuracy on the validation split) where λ was tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fusion: Fusion = "weighted"
    lam: Annotated[float, Field(ge=0, le=1)] = 0.5
    lam_curve: list[tuple[float, float]] | None = None

    def write(self, folder: Path) -> None:
        """Put the settings into a router folder."""
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "FusionSettings":
        """What a router folder says, or the default. Raises InputError for a broken file."""
        try:
            return cls.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise InputError(
                f"{folder / FILE} cannot be read ({reason}): mend it, or delete it to fuse with the default λ = 0.5."
            ) from error

    def replaced(self, fusion: str | None, lam: float | None) -> "FusionSettings":
        """These settings with the given ones instead. Another λ or mode drops the curve, which belongs to the old one.

        Raises InputError for an unknown mode or a λ outside of 0 to 1.
        """
        fusion_coefficients(fusion or self.fusion, self.lam if lam is None else lam)
        changed = {key: value for key, value in (("fusion", fusion), ("lam", lam)) if value is not None}
        return FusionSettings.model_validate(self.model_dump() | changed | ({"lam_curve": None} if changed else {}))
