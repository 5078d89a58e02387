"""Train the routers of a family, tune λ on their bundles, and write the best system to the shipped folder."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation import lambdas
from fusionroute.fr_export.evaluation.outcomes import Results
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.tasks.domains import COMPOSITE, DOMAINS, Sample, draw_many
from fusionroute.fr_export.tiny.workshop import Workshop
from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE

SEEDS = (0, 1, 2)  # of the routers, from the same experts and rows; the best on the validation split is shipped
SHARED_SEEDS = (0,)  # of routers that are adapters
VALIDATION = 500  # prompts per domain, for λ
TUNED_ON = (*DOMAINS, COMPOSITE)  # the unseen composites have no part in any choice


def validation() -> dict[str, list[Sample]]:
    """Domain → the prompts that λ, and the baselines' own constants, are chosen on."""
    return {domain: draw_many(domain, "validation", VALIDATION, seed=0) for domain in TUNED_ON}


def tuned(results: Results) -> FusionSettings:
    """The best λ of a sweep, with the curve."""
    curve = lambdas.curve(results)
    return FusionSettings(lam=lambdas.best(curve), lam_curve=curve)


def chosen(settings: Mapping[int, FusionSettings]) -> int:
    """The seed whose router is the best on the validation split, each at its own λ; the first among equals."""
    return max(settings, key=lambda seed: max(accuracy for _, accuracy in settings[seed].lam_curve or []))


class SystemStaging(RouterStaging):
    """The folder of a whole system. The training file of its router marks it as one that was written here."""

    mark = f"router/{TRAINING_FILE}"


def name_base(config: Path, base: Path) -> None:
    """Let an adapter's config name its base by the way from its own folder, so that both can be moved together."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = Path(os.path.relpath(base, config.parent)).as_posix()
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def ship(workshop: Workshop, out: Path, jobs: int, console: Console) -> FusionSettings:
    """Train the family's systems, tune λ, and write the best one to `out`; returns its settings.

    An older system at `out` is replaced once the new one is complete. `jobs` processes tune λ.
    """
    settings, shared = {}, bool(workshop.lora_rank)
    for seed in SHARED_SEEDS if shared else SEEDS:
        bundle, router = workshop.folder / "bundle", workshop.router(seed)
        family = FAMILIES[workshop.architecture.name]
        request = Request(family, str(router), workshop.expert_folders, ("fp32",), ("ort:cpu",), bundle, force=True, shared_base=shared)
        export(request, Stages(Console(quiet=True)))
        settings[seed] = tuned(evaluate(bundle, "fp32", lambdas.methods(), validation(), jobs=jobs, console=console))
    best = chosen(settings)
    with SystemStaging(out, force=True) as staging:
        shutil.copytree(workshop.router(best), staging.folder / "router", ignore=shutil.ignore_patterns("stages", "losses.json"))
        settings[best].write(staging.folder / "router")
        for name, folder in workshop.expert_folders.items():
            shutil.copytree(folder, staging.folder / "experts" / name, ignore=shutil.ignore_patterns("losses.json", "loss.png"))
        if shared:
            shutil.copytree(workshop.base(), staging.folder / "base", ignore=shutil.ignore_patterns("losses.json", "loss.png"))
            for adapter in sorted(staging.folder.rglob(CONFIG_FILE)):
                name_base(adapter, staging.folder / "base")
    return settings[best]
