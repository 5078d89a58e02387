"""A method's answers to the questions of a domain, one row per question, and files of such results."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.files import replace


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Row i belongs to question i. N questions, n experts, C = len(CLASSES) token classes.

    answers [N]; correct bool [N]: the text is the reference, character by character; f1 float32 [N]; logprob float32
    [N]: mean log-probability per token, the end of the sequence included; tokens int32 [N], without the end; first
    int16 [N]: index of the expert behind the first decision; counts int32 [N, n, C]: tokens by expert and class.
    `questions` is the digest of the questions and the chat template: only outcomes of the same questions may be
    compared.
    """

    questions: str
    experts: list[str]
    answers: list[str]
    correct: np.ndarray
    f1: np.ndarray
    logprob: np.ndarray
    tokens: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return float(self.correct.mean())

    def rows(self, order: Sequence[int] | np.ndarray) -> Outcomes:
        """The outcomes of these rows, in this order."""
        return Outcomes(
            self.questions, self.experts, [self.answers[i] for i in order],
            *(getattr(self, name)[np.asarray(order, np.int64)] for name in _ARRAYS),
        )  # fmt: skip


_ARRAYS = [field.name for field in fields(Outcomes)][3:]
Results = dict[str, dict[str, Outcomes]]
"""method → domain → outcomes."""


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The rows of several parts, one part after the other."""
    return Outcomes(
        parts[0].questions, parts[0].experts, [answer for part in parts for answer in part.answers],
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS),
    )  # fmt: skip


def save_results(path: str | Path, results: Mapping[str, Mapping[str, Outcomes]]) -> None:
    """Write results to one compressed .npz file, which replaces an older one in one step.

    Raises OSError where it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for method, domains in results.items():
        for domain, outcomes in domains.items():
            texts = {"task": outcomes.questions, "experts": outcomes.experts, "answers": outcomes.answers}
            arrays[json.dumps([method, domain, "texts"])] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
            arrays |= {json.dumps([method, domain, name]): getattr(outcomes, name) for name in _ARRAYS}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    replace(Path(path), content.getvalue())


def load_results(path: str | Path) -> Results:
    """Read what `save_results` wrote. Raises InputError for a file that is missing or something else."""
    results: Results = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                method, domain, name = json.loads(key)
                if name == "texts":
                    texts = json.loads(arrays[key].tobytes())
                    columns = {name: arrays[json.dumps([method, domain, name])] for name in _ARRAYS}
                    outcomes = Outcomes(texts["task"], texts["experts"], texts["answers"], **columns)
                    results.setdefault(method, {})[domain] = outcomes
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no file of evaluation results ({one_line(error)}): evaluate again.") from error
    return results
