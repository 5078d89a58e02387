"""A summary of training files: what they hold, what cannot be learnt from, and how long the rows are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families.family import positions
from fusionroute.fr_export.training.data import DataFile, Encoder, Pair, Row, examine_preferences, examine_sft


@dataclass(frozen=True)
class FileSummary:
    """One file. `tokens` and `learnt` are (mean, median, 95th percentile, most) per row; of a preference both rows count."""

    file: str
    kind: str  # sft or preferences
    samples: int
    tokens: tuple[float, float, float, float]
    learnt: tuple[float, float, float, float]
    problems: list[str]  # "line: field: reason"
    duplicates: list[tuple[int, int]]  # line, line that it repeats
    limit: int  # tokens of a row: max_length, or the model's context where that is shorter
    too_long: list[int]  # lines with a row of more tokens than that, which training skips

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def check_data(router: str, sft: Path | None, preferences: Path | None, max_length: int, base: str | None = None) -> list[FileSummary]:
    """Tokenise the files as training of this router would. Raises InputError where router or files cannot be opened."""
    checkpoint = Checkpoint.open("router", router, None, "routing_head", base)
    encoder, limit = Encoder(checkpoint), min(max_length, positions(checkpoint.config))
    summaries = []
    if sft is not None:
        samples = examine_sft(sft, encoder)
        summaries.append(_summary("sft", samples, [[row] for row in samples.samples], limit))
    if preferences is not None:
        pairs = examine_preferences(preferences, encoder)
        summaries.append(_summary("preferences", pairs, [list(pair) for pair in pairs.samples], limit))
    return summaries


def _summary(kind: str, data: DataFile[Row] | DataFile[Pair], rows: Sequence[Sequence[Row]], limit: int) -> FileSummary:
    lengths = [max(len(row.ids) for row in sample) for sample in rows]
    return FileSummary(
        file=str(data.file),
        kind=kind,
        samples=len(rows),
        tokens=_spread([len(row.ids) for sample in rows for row in sample]),
        learnt=_spread([len(row.labels) for sample in rows for row in sample]),
        problems=[str(problem) for problem in data.problems],
        duplicates=data.duplicates,
        limit=limit,
        too_long=[line for line, length in zip(data.lines, lengths, strict=True) if length > limit],
    )


def _spread(lengths: Sequence[int]) -> tuple[float, float, float, float]:
    if not lengths:
        return 0.0, 0.0, 0.0, 0.0
    median, high = np.percentile(lengths, [50, 95])
    return round(float(np.mean(lengths)), 1), float(median), round(float(high), 1), float(max(lengths))
