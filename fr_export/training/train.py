"""Train a router: the experts' log-probabilities, then stage after stage, then the folder for the exporter."""

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import common_vocabulary
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.console.quiet import quiet
from fusionroute.fr_export.families.family import positions
from fusionroute.fr_export.training.batches import Samples, flat
from fusionroute.fr_export.training.curves import draw
from fusionroute.fr_export.training.data import Encoder, Row, fitting, read_preferences, read_sft
from fusionroute.fr_export.training.expert_cache import (
    Scores,
    cache_key,
    data_digest,
    expert_scores,
    informative,
    model_digest,
    read_scores,
    score,
    write_scores,
)
from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging, Work
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.request import TrainingRequest
from fusionroute.fr_export.training.router import HEAD_KEY, Router, has_head, start_head, stored_dtype, write_router
from fusionroute.fr_export.training.size import lora_rank
from fusionroute.fr_export.training.trainer import RouterTrainer
from fusionroute.runtime.errors import InputError, UnavailableError

_RANKS_WAIT = timedelta(days=7)  # other ranks wait while one computes the experts' log-probabilities


@dataclass(frozen=True)
class Report:
    """What a run did.

    Each of `stages` has name, steps, seconds, peak_mib (anonymous memory, MiB) and last (the loss curve's last point).
    """

    out: str
    rows: int  # SFT samples learnt from
    pairs: int
    skipped: int  # rows and pairs longer than max_length
    lora_rank: int  # 0: all weights were trained
    stages: list[dict[str, Any]]


def train(request: TrainingRequest, display: Stages | None = None) -> Report:
    """Train the router that `request` describes and write it to `request.out`, which appears only when complete.

    Under `accelerate launch` all ranks call this, and rank 0 writes. The same seed gives the same weights, byte for
    byte, on the same CPU with the same number of threads. Raises InputError where data, checkpoints and recipe do not
    fit together, UnavailableError for a missing package.
    """
    for package in ("accelerate", "matplotlib", *([] if request.recipe.lora_rank == 0 else ["peft"])):
        if find_spec(package) is None:
            raise UnavailableError(f"Training needs the package '{package}': install the extra 'train' (pip install 'fusionroute[train]').")
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_RANKS_WAIT)
    if display is None or not state.is_main_process:
        display = Stages(Console(quiet=True))
    return _Run(request, display, state).run()


class _Run:
    """One run: all checks first, then the work."""

    def __init__(self, request: TrainingRequest, display: Stages, state: Any) -> None:
        self.request, self.display, self.state = request, display, state
        self.staging = RouterStaging(request.out, request.force)
        if state.is_main_process:  # one rank alone renames folders
            self.staging.recover()
        state.wait_for_everyone()
        self.staging.check()  # now, not after hours of training: an older router that came back needs --force
        self.router = Checkpoint.open("router", request.router, request.family, HEAD_KEY, request.base)
        self.experts = [Checkpoint.open(name, source, base=request.base) for name, source in request.experts.items()]
        if request.base and all(model.source.kind != "adapter" for model in (self.router, *self.experts)):
            raise InputError(f"--base {request.base} is for adapters, and all models of this run are whole ones: leave --base out.")
        self.vocab = common_vocabulary(self.router, tuple(self.experts))
        self.recipe = request.recipe
        self.lora_rank, reason = lora_rank(self.router, self.recipe.lora_rank)
        if reason:
            display.note(reason)
        if self.experts and self.recipe.stages[0].name == "cdpo" and not has_head(self.router):
            raise InputError(f"{self.router.where} has no routing head, which CDPO does not train: begin with the stage sft.")
        self.head = start_head(self.router, list(request.experts))
        adapts = self.lora_rank and not request.merge
        self.dtype = request.dtype or ("float32" if adapts else stored_dtype(self.router))
        self.limit = min(self.recipe.max_length, positions(self.router.config))
        self.rows, self.pairs, self.skipped = self._data()
        self.identity = self._identity()

    def _data(self) -> tuple[list[Row], list[Row], int]:
        """SFT rows, rows of the preferences (chosen and rejected alternate), number of samples that are too long."""
        request, stages = self.request, self.recipe.stages
        rows: list[Row] = []
        pairs: list[Row] = []
        skipped = 0
        if any(stage.supervised for stage in stages):
            if request.sft is None:
                raise InputError("The stages sft and mixed learn from samples: name them with --sft.")
            samples = read_sft(request.sft, Encoder(self.router)) if isinstance(request.sft, Path) else request.sft
            rows, skipped = fitting(samples, lambda row: len(row.ids), self.limit, "samples")
        if any(stage.preferred for stage in stages):
            if request.preferences is None:
                raise InputError("The stages cdpo and mixed learn from preferences: name them with --preferences.")
            source = request.preferences
            preferences = read_preferences(source, Encoder(self.router)) if isinstance(source, Path) else source
            short, too_long = fitting(preferences, lambda pair: max(len(row.ids) for row in pair), self.limit, "preferences")
            pairs, skipped = flat(short), skipped + too_long
        return rows, pairs, skipped

    def run(self) -> Report:
        """Score, train, write."""
        request, writer = self.request, self.state.is_main_process
        keep = request.checkpoint_every is not None
        work = Work(request.out, self.identity, keep=keep, resume=request.resume, force=request.force, writer=writer)
        self.state.wait_for_everyone()  # all ranks have checked the folder before rank 0 writes there
        with work:
            self.state.wait_for_everyone()
            cache = request.cache or work.folder / "cache"
            sft = self._samples(self.rows, False, "samples", cache)
            preferences = self._samples(self.pairs, True, "preferences", cache)
            router = Router.load(self.router, self.head, self.vocab, self.lora_rank, self.recipe.seed, self._base())
            curves = [self._stage(stage, router, sft, preferences, work) for stage in self.recipe.stages]
            stages = [_summary(curve) for curve in curves]
            report = Report(str(request.out), len(self.rows), len(self.pairs) // 2, self.skipped, self.lora_rank, stages)
            if writer:
                with self.display.stage("writing the router"), self.staging as staging:
                    self._write(router, curves, report, staging.folder, work)
            self.state.wait_for_everyone()
        return report

    def _base(self) -> str | None:
        """What written adapters name as their base; None: what the router names, which is an adapter itself."""
        source = self.request.base if self.router.source.kind == "adapter" else self.request.router
        # a relative path would lead nowhere from another folder
        return str(Path(source).expanduser().resolve()) if source and Path(source).expanduser().is_dir() else source

    def _identity(self) -> dict[str, Any]:
        """Digests of all inputs: a run can only be resumed where these are the same."""
        return {
            "recipe": asdict(self.recipe) | {"lora_rank": self.lora_rank},
            "data": [data_digest(self.rows), data_digest(self.pairs)],
            "router": model_digest(self.router),
            "experts": {expert.name: model_digest(expert) for expert in self.experts},
            "processes": self.state.num_processes,
        }

    def _samples(self, rows: Sequence[Row], preferred: bool, what: str, cache: Path) -> Samples | None:
        """The rows with the experts' scores. Rank 0 computes those that the cache lacks, the other ranks read them."""
        if not rows:
            return None
        if not self.experts:
            return Samples(rows, preferred)
        scores = []
        for expert in self.experts:
            with self.display.stage(f"{expert.name} expert on {what}", len(rows)) as advance:
                scores.append(self._scored(expert, rows, cache, advance))
        return Samples(rows, preferred, np.stack([expert.log_probs for expert in scores]), informative(scores))

    def _scored(self, expert: Checkpoint, rows: Sequence[Row], cache: Path, advance: Callable[[float], None]) -> Scores:
        name = cache_key(self.identity["experts"][expert.name], data_digest(rows), self.vocab, self.recipe.precision)
        with self.state.main_process_first():
            return expert_scores(expert, rows, self.vocab, self.recipe.precision, self.state.device, cache / f"{name}.safetensors", advance)

    def _stage(self, stage: Stage, router: Router, sft: Samples | None, preferences: Samples | None, work: Work) -> dict[str, Any]:
        """Train one stage, or load it where an interrupted run had finished it. Returns its loss curve."""
        weights, curve_file = work.folder / f"{stage.name}.safetensors", work.folder / f"{stage.name}.json"
        if curve_file.is_file():  # only in a resumed run
            router.load_state_dict(load_file(weights), strict=False)
            return dict(json.loads(curve_file.read_text(encoding="utf-8")))
        sets = [sft] if stage.supervised and sft is not None else []
        if stage.preferred and preferences is not None:
            reference = self._reference(router, preferences, work.folder / f"{stage.name}-reference.safetensors")
            sets.append(replace(preferences, reference=reference))
        folder = work.folder / stage.name
        started = time.perf_counter()
        with quiet():
            trainer = RouterTrainer(router, stage, self.recipe, sets, folder, self.request.checkpoint_every)
        with self.display.stage(f"stage {stage.name}", len(trainer.steps)) as advance, quiet():
            trainer.run(work.checkpoint(folder), advance)
        curve = {
            "name": stage.name,
            "steps": len(trainer.steps),
            "seconds": round(time.perf_counter() - started, 2),
            "peak_mib": self.display.done[-1].peak_anonymous_mib,
            "points": trainer.points(),
        }
        if self.state.is_main_process:
            if self.request.keep_stages and stage is not self.recipe.stages[-1]:
                self._write_router(router, work.folder / "stages" / stage.name)
            if self.request.checkpoint_every is not None:
                save_file(router.trained(), weights)
                curve_file.write_text(json.dumps(curve), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
        self.state.wait_for_everyone()
        return curve

    def _reference(self, router: Router, preferences: Samples, file: Path) -> npt.NDArray[np.float32]:
        """log π_ref float32 [T] of the preferences, under the router as it is now.

        A resumed stage reads them from `file`.
        """
        router.to(self.state.device).eval()
        # as in the stage itself
        autocast = torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
        with self.state.main_process_first(), autocast:
            scores = read_scores(file)
            if scores is None:
                with self.display.stage("router on preferences, as the reference", len(preferences.rows)) as advance:
                    scores = score(
                        lambda ids, positions: router(ids, positions)[0], preferences.rows, self.vocab, self.state.device, advance
                    )
                write_scores(file, scores)
        return scores.log_probs

    def _write_router(self, router: Router, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_router(router, self.router, folder, self.dtype, self.request.merge)

    def _write(self, router: Router, curves: list[dict[str, Any]], report: Report, folder: Path, work: Work) -> None:
        """Write the router, and how it was trained, into the staging folder."""
        self._write_router(router, folder)
        if (earlier := work.folder / "stages").is_dir():
            shutil.copytree(earlier, folder / "stages")
        described = {
            **self.identity,
            "dtype": self.dtype,
            **{name: value for name, value in asdict(report).items() if name != "out"},
            "versions": {package: version(package) for package in ("torch", "transformers", "accelerate")}
            | {"python": platform.python_version()},
        }
        (folder / TRAINING_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        (folder / "losses.json").write_text(json.dumps({"stages": curves}) + "\n", encoding="utf-8")
        draw(curves, folder / "loss.png")


def _summary(curve: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in curve.items() if name != "points"}, "last": curve["points"][-1] if curve["points"] else {}}
