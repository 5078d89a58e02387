"""Where the base of an adapter lies."""

from pathlib import Path

from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE, LoraConfig
from fusionroute.runtime.errors import FusionError, InputError


def locate_base(config: LoraConfig, folder: Path, where: str, named: str | None) -> Path:
    """The folder of the base of the adapter in `folder`: the one `named` on the command line, or its own.

    Raises InputError where the adapter names none, or one that cannot be found or is an adapter itself.
    """
    source = named or config.base_model_name_or_path
    if not source:
        raise InputError(f"{where} is an adapter that names no base: name it with --base.")
    if not named and (beside := folder / source).is_dir():  # a path in a config is first one from its own folder
        source = str(beside)
    try:
        base = locate(source, None if named else config.revision)
    except FusionError as error:
        if named:
            raise
        reason = str(error).rstrip(".")
        raise type(error)(f"{where} is an adapter of {source}, which cannot be opened ({reason}): name its base with --base.") from error
    if (base / CONFIG_FILE).is_file():
        raise InputError(
            f"{where} is an adapter over another adapter ({base}): merge that one into its base first, and name it with --base."
        )
    return base
