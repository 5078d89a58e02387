"""One process's share of an evaluation: all methods on some questions of a domain."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusionroute.fr_export.evaluation.methods import Answer, MethodDecoder, method_named
from fusionroute.fr_export.evaluation.outcomes import Outcomes
from fusionroute.fr_export.evaluation.scoring import f1
from fusionroute.fr_export.evaluation.token_classes import CLASSES, TokenClasses
from fusionroute.runtime import FusionRuntime


class Job(NamedTuple):
    """The settings that are the same for all questions."""

    bundle: str
    precision: str | None
    methods: tuple[str, ...]
    fusion: str | None
    lam: float | None
    chat: bool
    verify_key: Path | None = None
    trusted: bool = False


class Piece(NamedTuple):
    """Some questions of a domain as pairs of prompt and reference.

    `digest` stands for all of the domain; `limit` is in tokens per answer.
    """

    digest: str
    questions: tuple[tuple[str, str], ...]
    limit: int


class Worker:
    """A loaded bundle and its methods."""

    def __init__(self, job: Job):
        self._runtime = runtime = FusionRuntime.load(
            job.bundle, job.precision, "cpu", fusion=job.fusion, lam=job.lam, threads=1, verify_key=job.verify_key, trusted=job.trusted
        )
        assert runtime.tokenizer is not None  # the questions were read with it
        self._text = runtime.tokenizer
        self._chat = job.chat
        self._methods = {name: method_named(name, runtime.expert_names, runtime.fusion, runtime.lam) for name in job.methods}
        self._decoder = MethodDecoder(runtime)
        self._classes = TokenClasses(self._text)

    def answer(self, piece: Piece) -> dict[str, Outcomes]:
        """Outcomes by method, one row per question of the piece."""
        answers: dict[str, list[Answer]] = {name: [] for name in self._methods}
        for prompt, reference in piece.questions:
            ids = self._runtime.prompt_ids([{"role": "user", "content": prompt}] if self._chat else prompt)
            self._decoder.start(ids, self._text.encode(reference, special=False))
            for name, method in self._methods.items():
                answers[name].append(self._decoder.answer(method, piece.limit))
        return {name: self._outcomes(piece, own) for name, own in answers.items()}

    def _outcomes(self, piece: Piece, answers: list[Answer]) -> Outcomes:
        references = [reference for _, reference in piece.questions]
        counts = np.zeros((len(answers), len(self._runtime.expert_names), len(CLASSES)), np.int32)
        for row, answer in enumerate(answers):
            np.add.at(counts[row], (answer.experts[: len(answer.token_ids)], self._classes.of(answer.token_ids)), 1)
        return Outcomes(
            questions=piece.digest,
            experts=self._runtime.expert_names,
            answers=[answer.text for answer in answers],
            correct=np.array([answer.text == reference for answer, reference in zip(answers, references, strict=True)]),
            f1=np.array([f1(answer.text, reference) for answer, reference in zip(answers, references, strict=True)], np.float32),
            logprob=np.array([answer.logprob for answer in answers], np.float32),
            tokens=np.array([len(answer.token_ids) for answer in answers], np.int32),
            first=np.array([answer.experts[0] for answer in answers], np.int16),
            counts=counts,
        )
