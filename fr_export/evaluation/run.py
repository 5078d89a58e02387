"""Evaluate a bundle: every method on every question, spread over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation.methods import SEQUENCE, SEQUENCE_ROUTED, check
from fusionroute.fr_export.evaluation.outcomes import Outcomes, Results, joined
from fusionroute.fr_export.evaluation.pool import answer_all
from fusionroute.fr_export.evaluation.questions import Question, Questions, digest
from fusionroute.fr_export.evaluation.sequence import first_routed, most_likely
from fusionroute.fr_export.evaluation.worker import Job, Piece
from fusionroute.runtime import InputError, UnavailableError
from fusionroute.runtime.backends.ort_cpu import TARGET
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.integrity import checked
from fusionroute.runtime.machine import cores
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.prompt import tokenizer_of
from fusionroute.runtime.text import Text
from fusionroute.runtime.tokenizer_trial import Trial

SLACK = 8  # tokens that an answer may be longer than the domain's longest reference: one that is longer is wrong anyway
PIECE = 16  # questions that a process gets at a time


def evaluate(
    bundle: str | Path,
    precision: str | None,
    methods: Sequence[str],
    questions: Questions,
    *,
    jobs: int | None = None,
    fusion: str | None = None,
    lam: float | None = None,
    chat: bool = False,
    trusted: bool = False,
    known: Results | None = None,
    console: Console | None = None,
    verify_key: Path | None = None,
) -> Results:
    """Answer every question of every domain by every method; results by method and domain, in the orders given.

    methods are the names in `fr_export.evaluation.methods`; `fusion` and `lam` (as exported where None) are those of
    `fused`. Sequence selection needs the outcomes of the experts (and of `fused`), which are then returned too. `known`
    results on the same questions are not computed again, such as those of experts that another bundle shares. An answer
    has at most SLACK tokens more than the domain's longest reference. `jobs` processes (one per core where None) with
    one thread each share the questions; `console` shows a progress bar. `verify_key`, `trusted`: as of
    `FusionRuntime.load`.

    Raises InputError for unknown methods, domains without prompts and prompts that do not fit, BundleError and
    UnavailableError as loading the bundle does.
    """
    opened = Bundle.open(bundle, verify_key)
    manifest = opened.manifest
    opened.variant(TARGET, precision)
    if "tokenizer.json" not in manifest.files:
        raise UnavailableError(f"The bundle {bundle} has no tokenizer.json, which prompts in text need: export it with a tokenizer.")
    if chat and "chat_template.jinja" not in manifest.files:
        raise UnavailableError(f"The bundle {bundle} has no chat_template.jinja: evaluate it on plain text, without chat.")
    fusion_coefficients(fusion or manifest.fusion, manifest.lam if lam is None else lam)
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs={jobs} is out of range: expected at least 1, or None for one per core.")
    if empty := [domain for domain, own in questions.items() if not own]:
        raise InputError(f"The domain '{empty[0]}' has no prompts: give it at least one.")

    alone = [f"expert:{name}" for name in manifest.experts]
    needed = (alone if {SEQUENCE, SEQUENCE_ROUTED} & {*methods} else []) + (["fused"] if SEQUENCE_ROUTED in methods else [])
    decoded = list(dict.fromkeys(name for name in [*methods, *needed] if name not in (SEQUENCE, SEQUENCE_ROUTED)))
    for name in methods:
        check(name, manifest.experts)
    digests = {domain: digest(own, chat) for domain, own in questions.items()}

    def reusable(method: str) -> bool:
        outcomes = (known or {}).get(method, {})
        return all(
            domain in outcomes and outcomes[domain].questions == own and outcomes[domain].experts == manifest.experts
            for domain, own in digests.items()
        )

    results: Results = {name: known[name] for name in decoded if known and reusable(name)}
    if missing := tuple(name for name in decoded if name not in results):
        with checked(opened, False, None if trusted else Trial()) as models_are_loaded:
            models_are_loaded()
            text = tokenizer_of(opened)
        assert text is not None  # `questions` needs it
        pieces = {domain: _pieces(digests[domain], own, text) for domain, own in questions.items()}
        job = Job(str(bundle), precision, missing, fusion, lam, chat, verify_key, trusted)
        results |= _decode(job, pieces, jobs, console)
    if SEQUENCE in methods:
        results[SEQUENCE] = {d: most_likely([results[name][d] for name in alone]) for d in questions}
    if SEQUENCE_ROUTED in methods:
        results[SEQUENCE_ROUTED] = {d: first_routed([results[name][d] for name in alone], results["fused"][d]) for d in questions}
    return {name: {d: results[name][d] for d in questions} for name in dict.fromkeys([*methods, *needed])}


def _pieces(domain_digest: str, questions: Sequence[Question], text: Text) -> list[Piece]:
    pairs = [(question.prompt, question.answer) for question in questions]
    limit = max(len(text.encode(answer, special=False)) for _, answer in pairs) + SLACK
    return [Piece(domain_digest, tuple(pairs[start : start + PIECE]), limit) for start in range(0, len(pairs), PIECE)]


def _decode(job: Job, pieces: Mapping[str, list[Piece]], jobs: int | None, console: Console | None) -> dict[str, dict[str, Outcomes]]:
    """Answer all pieces; outcomes by method and domain."""
    all_pieces = [piece for own in pieces.values() for piece in own]
    processes = min(jobs or cores(), len(all_pieces))
    stages = Stages(console or Console(quiet=True))
    name, prompts = f"{Path(job.bundle).name} {job.precision or ''}".strip(), sum(len(piece.questions) for piece in all_pieces)
    with stages.progress, stages.stage(name, prompts) as advance:
        parts = iter(answer_all(job, all_pieces, processes, advance))
    by_domain = {domain: [next(parts) for _ in own] for domain, own in pieces.items()}
    return {name: {domain: joined([part[name] for part in own]) for domain, own in by_domain.items()} for name in job.methods}
