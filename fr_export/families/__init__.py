"""The table of model families: a new one is one new file and two lines here."""

from fusionroute.fr_export.families.family import Family, Preset
from fusionroute.fr_export.families.gemma2 import GEMMA2
from fusionroute.fr_export.families.gemma3 import GEMMA3
from fusionroute.fr_export.families.llama3 import LLAMA3
from fusionroute.fr_export.families.mistral import MISTRAL
from fusionroute.fr_export.families.olmo2 import OLMO2
from fusionroute.fr_export.families.phi3 import PHI3
from fusionroute.fr_export.families.qwen2 import QWEN2
from fusionroute.fr_export.families.qwen3 import QWEN3
from fusionroute.fr_export.families.smollm3 import SMOLLM3

# sorted by name
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GEMMA2,
        GEMMA3,
        LLAMA3,
        MISTRAL,
        OLMO2,
        PHI3,
        QWEN2,
        QWEN3,
        SMOLLM3,
    )
}

__all__ = ["FAMILIES", "Family", "Preset"]
